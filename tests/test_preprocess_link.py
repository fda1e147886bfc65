import csv
import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from dicom_factory import make_series, uid

from preprocess.__main__ import main
from preprocess.link import LinkError, LinkJob, link_files
from preprocess.pipeline import ConvertJob, convert_tree
from preprocess.store import SliceStore

MIRRORED = (0.0, -1.0, 0.0, 0.0, 0.0, -1.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """P1 and P2 with one exam, P3 with two, P4 mirrored, P5 with an exam that is not converted."""
    root = tmp_path_factory.mktemp("link")
    for patient, study, kw in [
        ("P1", "s1", {}),
        ("P2", "s1", {}),
        ("P3", "s1", {}),
        ("P3", "s2", {}),
        ("P4", "s1", {"orientation": MIRRORED}),
        ("P5", "s1", {"EchoTime": 10.0, "RepetitionTime": 500.0}),
    ]:
        make_series(root / "dicom", patient=patient, study=study, series=f"{patient}{study}", **kw)
    convert_tree(ConvertJob(root / "dicom", root / "x.zarr"))
    return root / "x.zarr"


def link(store, tmp_path, text, **options):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    report = link_files(LinkJob(store, tmp_path / "out", (path,), allow_unlinked=True, **options))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "labels.csv").read_text())))
    return rows, [reason for _, _, reason in report.rows], report


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("P1,A-P1-s1", "linked"),
        ("P1,", "linked"),
        (" p1 ,", "linked"),
        (",A-P3-s2", "linked"),
        ("P3,A-P3-s2", "linked"),
        ("P3,", "multi_exam"),
        ("P9,", "unmatched"),
        ("P1,A-nothing", "unmatched"),
        ("P2,A-P1-s1", "patient_mismatch"),
        ("P5,", "not_stored"),
        (",", "no_key"),
    ],
)
def test_rows_are_matched_or_say_why_not(store, tmp_path, row, reason):
    rows, reasons, report = link(store, tmp_path, f"PatientID,AccessionNumber,pain\n{row},2\n")
    assert reasons == [reason]
    assert len(rows) == (reason == "linked") == 1 - report.num_unlinked
    if rows:
        manifest = SliceStore.open(store).manifest.set_index("study_id")
        assert rows[0]["pain"] == "2"
        assert manifest.loc[rows[0]["study_id"], "patient_id"] == rows[0]["patient_id"]


def test_second_row_of_an_exam_is_a_duplicate_unless_another_reader_wrote_it(store, tmp_path):
    assert link(store, tmp_path, "PatientID,pain\nP1,1\nP1,2\n")[1] == ["linked", "duplicate"]
    assert link(store, tmp_path, "PatientID,reader,grade\nP1,1,3\nP1,2,3\n")[1] == ["linked", "linked"]


def test_slices_become_series_and_index(store, tmp_path):
    # The factory's sagittal normal points to the right: its last file is the first canonical slice.
    last = uid("P1", "s1", "P1s1", 4)
    rows, _, _ = link(store, tmp_path, f"SOPInstanceUID,PatientID\n{last},P1\n")
    assert rows[0]["slice_index"] == "0"
    assert link(store, tmp_path, f"SOPInstanceUID\n{last}\n")[1] == ["linked"]
    assert link(store, tmp_path, f"SOPInstanceUID,PatientID\n{last},P2\n")[1] == ["slice_unmatched"]
    assert link(store, tmp_path, "SOPInstanceUID,PatientID\n1.2.3,P1\n")[1] == ["slice_unmatched"]


def test_text_columns_are_withheld_unless_named(store, tmp_path):
    table = "PatientID,name,grade,slices,site\nP1,Meier,-1.5e3,7;8,north\nP2,,2,,south\n"
    rows, _, report = link(store, tmp_path, table)
    assert list(rows[0]) == ["patient_id", "study_id", "grade", "slices"]
    assert report.dropped == {"labels.csv": ["name", "site"]}
    rows, _, _ = link(store, tmp_path, table, keep_text=frozenset({"site"}))
    assert [row["site"] for row in rows] == ["north", "south"]


def annotations(*images):
    text = "".join(
        f'<image id="{n}" name="{name}" width="{size[0]}" height="{size[1]}"><box label="L1L2" xtl="1" ytl="2" '
        f'xbr="4.5" ybr="6" occluded="0"><attribute name="note">Meier</attribute></box></image>'
        for n, (name, size) in enumerate(images)
    )
    return f"<annotations><meta><owner>Meier</owner></meta>{text}</annotations>"


@pytest.mark.parametrize(
    ("patient", "edges"),
    [("P1", ("1.00", "4.50")), ("P4", ("5.50", "9.00"))],
    ids=["as-stored", "mirrored-columns"],
)
def test_boxes_move_with_the_flips_of_the_store(store, tmp_path, patient, edges):
    path = tmp_path / "boxes.xml"
    path.write_text(annotations((f"folder/{uid(patient, 's1', f'{patient}s1', 2)}.png", (10, 12))))
    link_files(LinkJob(store, tmp_path / "out", annotations=(path,)))
    text = (tmp_path / "out" / "boxes.xml").read_text()
    image = ET.fromstring(text).find("image")
    box = image.find("box")
    assert (box.get("xtl"), box.get("xbr")) == edges
    assert (box.get("ytl"), box.get("ybr")) == ("2.00", "6.00")
    study_id, series_id, name = image.get("name").split("/")
    manifest = SliceStore.open(store).manifest.set_index("series_id")
    assert manifest.loc[series_id, "study_id"] == study_id
    assert name == "2.png"
    assert "Meier" not in text


def test_a_box_shows_the_same_pixels_before_and_after(store, tmp_path):
    from pydicom import dcmread

    for patient in ("P1", "P4"):
        path = tmp_path / f"{patient}.xml"
        path.write_text(annotations((f"{uid(patient, 's1', f'{patient}s1', 2)}.png", (10, 12))))
        link_files(LinkJob(store, tmp_path / "out", annotations=(path,)))
        image = ET.parse(tmp_path / "out" / path.name).getroot().find("image")
        box = {edge: round(float(image.find("box").get(edge))) for edge in ("xtl", "xbr", "ytl", "ybr")}
        stored = SliceStore.open(store).read(image.get("name").split("/")[1])[2]
        original = dcmread(store.parent / "dicom" / f"{patient}s1-002.dcm").pixel_array
        inside, before = stored[box["ytl"] : box["ybr"], box["xtl"] : box["xbr"]], original[2:6, 1:4]
        assert set(before.ravel()) <= set(np.unique(inside))


def test_images_that_cannot_be_linked_say_why(store, tmp_path):
    known = uid("P1", "s1", "P1s1", 1)
    path = tmp_path / "boxes.xml"
    path.write_text(annotations((f"{known}.png", (10, 12)), (f"{known}.png", (10, 12)), ("1.2.png", (10, 12))))
    report = link_files(LinkJob(store, tmp_path / "out", annotations=(path,), allow_unlinked=True))
    assert [reason for _, _, reason in report.rows] == ["linked", "duplicate", "slice_unmatched"]
    path.write_text(annotations((f"{known}.png", (12, 10))))
    with pytest.raises(LinkError, match="1 bad_size"):
        link_files(LinkJob(store, tmp_path / "out", annotations=(path,)))


def test_unlinked_row_is_refused_unless_allowed(store, tmp_path, capsys):
    path = tmp_path / "labels.csv"
    path.write_text("PatientID,pain\nP1,1\nSECRET,2\n")
    words = ["link", str(store), "--out", str(tmp_path / "out"), "--csv", str(path)]
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert "1 row(s) cannot be linked and nothing was written" in printed
    assert not (tmp_path / "out" / "labels.csv").exists()
    assert "1 linked" in printed
    assert "1 unmatched" in printed
    assert "SECRET" not in printed
    assert "SECRET" not in (tmp_path / "out" / "link_report.csv").read_text()
    assert (tmp_path / "out" / "link_report.csv").read_text().splitlines()[2] == "labels.csv,3,unmatched"
    assert main([*words, "--allow-unlinked"]) == 0
    assert (tmp_path / "out" / "labels.csv").read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("a,b\n1,2\n", "key column"), ("PatientID,pain\nP1,1,2\n", "more cells"), (b"\xff\xfe\x00", "UTF-8")],
)
def test_unusable_tables_are_refused(store, tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LinkError, match=message):
        link_files(LinkJob(store, tmp_path / "out", (path,)))


def test_inputs_are_never_overwritten(store, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("PatientID,pain\nP1,1\n")
    with pytest.raises(LinkError, match="overwritten"):
        link_files(LinkJob(store, tmp_path, (path,)))

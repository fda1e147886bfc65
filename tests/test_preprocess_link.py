import csv
import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from dicom_factory import make_series, uid
from pydicom import dcmread

from preprocess.__main__ import main
from preprocess.link import link as link_module
from preprocess.link.link import LinkError, LinkJob, link_files
from preprocess.link.uid_index import ExamEntry, SliceEntry, UidIndex, write_index_part
from preprocess.pipeline import ConvertJob, convert_tree
from preprocess.store.read import SliceStore
from preprocess.store.schema import IncompleteStoreError

MIRRORED = (0.0, -1.0, 0.0, 0.0, 0.0, -1.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """P1 and P2 with one exam, P3 with two, P4 mirrored, P5 and P6 with none converted, P7 of two issuers."""
    root = tmp_path_factory.mktemp("link")
    for patient, study, kw in [
        ("P1", "s1", {}),
        ("P2", "s1", {}),
        ("P3", "s1", {}),
        ("P3", "s2", {}),
        ("P4", "s1", {"orientation": MIRRORED}),
        ("P5", "s1", {"shape": (3, 12, 10)}),
        ("P6", "s1", {"ImagePositionPatient": None}),
        ("P7", "s1", {"IssuerOfPatientID": "North"}),
        ("P7", "s2", {"IssuerOfPatientID": "South"}),
    ]:
        make_series(root / "dicom", patient=patient, study=study, series=f"{patient}{study}", **kw)
    convert_tree(ConvertJob(root / "dicom", root / "x.zarr"))
    return root / "x.zarr"


def link(store, tmp_path, text, **options):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    report = link_files(LinkJob(store, tmp_path / "out", (path,), allow_unlinked=True, **options))
    return table(tmp_path, "labels.csv"), reasons(tmp_path), report


def table(tmp_path, name):
    with (tmp_path / "out" / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def reasons(tmp_path):
    return [row["reason"] for row in table(tmp_path, "link_report.csv")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("P1,A-P1-s1,", "linked"),
        ("P1,,", "linked"),
        (" p1 ,,", "linked"),
        (",A-P3-s2,", "linked"),
        ("P3,A-P3-s2,", "linked"),
        ("P3,,", "multi_exam"),
        ("P9,,", "unmatched"),
        ("P1,A-nothing,", "unmatched"),
        ("P2,A-P1-s1,", "patient_mismatch"),
        ("P5,,", "not_stored"),
        ("P6,,", "not_stored"),
        ("P7,,", "shared_patient_id"),
        ("P7,, north", "linked"),
        ("P7,A-P7-s2,", "linked"),
        ("P7,A-P7-s2,South", "linked"),
        ("P7,A-P7-s2,North", "patient_mismatch"),
        ("P7,,West", "unmatched"),
        (",,North", "no_key"),
        (",,", "no_key"),
    ],
)
def test_rows_are_matched_or_say_why_not(store, tmp_path, row, reason):
    rows, found, report = link(store, tmp_path, f"PatientID,AccessionNumber,IssuerOfPatientID,pain\n{row},2\n")
    assert found == [reason]
    assert len(rows) == (reason == "linked") == 1 - report.num_unlinked
    if rows:
        manifest = SliceStore.open(store).manifest.set_index("study_id")
        assert rows[0]["pain"] == "2"
        assert manifest.loc[rows[0]["study_id"], "patient_id"] == rows[0]["patient_id"]


def test_issuer_tells_patients_apart(store, tmp_path):
    text = "PatientID,IssuerOfPatientID\nP7,North\nP7,South\n"
    rows, found, _ = link(store, tmp_path, text)
    assert found == ["linked", "linked"]
    assert rows[0]["patient_id"] != rows[1]["patient_id"]


def test_many_chunks_are_one_table(store, tmp_path, monkeypatch):
    monkeypatch.setattr(link_module, "CHUNK_ROWS", 2)
    text = 'PatientID,remark,pain,later\nP1,1,1,1\nP9,2,2,2\n\nP2,"3",3,3\nP1,4,4\nP3,"a\nb",5,5\nP7,6,6,x\n'
    rows, found, report = link(store, tmp_path, text)
    assert found == ["linked", "unmatched", "linked", "duplicate", "multi_exam", "shared_patient_id"]
    assert [row["line"] for row in table(tmp_path, "link_report.csv")] == ["2", "3", "5", "6", "7", "9"]
    assert [row["pain"] for row in rows] == ["1", "3"]
    assert report.dropped == {"labels.csv": ["remark", "later"]}
    assert report.counts["labels.csv", "linked"] == 2


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


@pytest.fixture
def copied(store, tmp_path):
    """A store that a test may change."""
    for folder in store.parent.glob("x.*"):
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / "x.zarr"


def exam_of(store, patient):
    return UidIndex(store.with_suffix(".private")).exams_of([patient], []).to_pylist()[0]


def add_to_index(store, study_id, exams=(), slices=()):
    parts = [path.stem for path in (store.with_suffix(".private") / "exams").glob("*.parquet")]
    part = next(part for part in parts if study_id.startswith(part))
    write_index_part(store.with_suffix(".private"), part, exams, slices)


def test_object_id_of_two_exams_needs_another_key(copied, tmp_path):
    shared, study_id = uid("P1", "s1", "P1s1", 4), exam_of(copied, "P2")["study_id"]
    series_id = SliceStore.open(copied).manifest.set_index("study_id").loc[study_id, "series_id"]
    add_to_index(copied, study_id, slices=[SliceEntry(shared, study_id, series_id, 3)])
    rows, found, _ = link(copied, tmp_path, f"SOPInstanceUID,PatientID\n{shared},\n{shared},P2\n{shared},P1\n")
    assert found == ["slice_ambiguous", "linked", "linked"]
    assert [(row["study_id"] == study_id, row["slice_index"]) for row in rows] == [(True, "3"), (False, "0")]


def test_frames_are_named_by_number(copied, tmp_path):
    study_id = exam_of(copied, "P2")["study_id"]
    series_id = SliceStore.open(copied).manifest.set_index("study_id").loc[study_id, "series_id"]
    add_to_index(copied, study_id, slices=[SliceEntry("1.2.3#7", study_id, series_id, 2)])
    rows, found, _ = link(copied, tmp_path, "SOPInstanceUID\n1.2.3\n1.2.3#7\n")
    assert found == ["slice_unmatched", "linked"]
    assert rows[0]["slice_index"] == "2"


def test_study_that_the_store_holds_of_another_patient_is_not_linked(copied, tmp_path):
    exam = exam_of(copied, "P1")
    other = ExamEntry("", "P8", "", "1.2", "another-pseudonym", exam["study_id"])
    add_to_index(copied, exam["study_id"], exams=[other])
    assert link(copied, tmp_path, "PatientID\nP8\n")[1] == ["patient_mismatch"]


@pytest.mark.parametrize("lost", ["{}/*/c.0.0.0", "manifest/{}*.parquet"], ids=["shard", "manifest"])
def test_incomplete_store_is_refused(copied, tmp_path, lost):
    for path in copied.glob(lost.format(exam_of(copied, "P1")["study_id"][: 2 if "c.0" in lost else 1])):
        path.unlink()
    with pytest.raises(IncompleteStoreError, match="python -m preprocess"):
        link(copied, tmp_path, "PatientID\nP2\n")


def test_text_columns_are_withheld_unless_named(store, tmp_path):
    table = "PatientID,name,grade,slices,site,born\nP1,Meier,-1.5e3,7;8,north,19661231\nP2,,2,,south,\n"
    rows, _, report = link(store, tmp_path, table)
    assert list(rows[0]) == ["patient_id", "study_id", "grade", "slices"]
    assert report.dropped == {"labels.csv": ["name", "site", "born"]}
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
    assert reasons(tmp_path) == ["linked", "duplicate", "slice_unmatched"]
    assert report.num_unlinked == 2
    path.write_text(annotations((f"{known}.png", (12, 10))))
    with pytest.raises(LinkError, match="1 bad_size"):
        link_files(LinkJob(store, tmp_path / "out", annotations=(path,)))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('ytl="2"', 'ytl="nan"', "bad_coordinates"),
        ('ytl="2"', "", "bad_coordinates"),
        ("<box", '<polygon label="L1L2" points="1,2;3,4"/><box', "linked_partly"),
    ],
)
def test_what_would_be_lost_of_an_image_is_said(store, tmp_path, old, new, reason):
    path = tmp_path / "boxes.xml"
    path.write_text(annotations((f"{uid('P1', 's1', 'P1s1', 1)}.png", (10, 12))).replace(old, new))
    with pytest.raises(LinkError, match=f"1 {reason}"):
        link_files(LinkJob(store, tmp_path / "out", annotations=(path,)))
    link_files(LinkJob(store, tmp_path / "out", annotations=(path,), allow_unlinked=True))
    written = ET.parse(tmp_path / "out" / "boxes.xml").getroot().findall("image")
    assert [[shape.tag for shape in image] for image in written] == ([["box"]] if reason == "linked_partly" else [])


@pytest.mark.parametrize(
    ("text", "message"),
    [("<annotations><track/></annotations>", "tracks of a video"), ("<a/>", "root must be"), ("no", "cannot be read")],
)
def test_unusable_annotations_are_refused(store, tmp_path, text, message):
    path = tmp_path / "boxes.xml"
    path.write_text(text)
    with pytest.raises(LinkError, match=message):
        link_files(LinkJob(store, tmp_path / "out", annotations=(path,)))


def test_unlinked_row_is_refused_unless_allowed(store, tmp_path, capsys):
    path = tmp_path / "labels.csv"
    path.write_text("PatientID,pain\nP1,1\nSECRET,2\n")
    words = ["link", str(store), "--out", str(tmp_path / "out"), "--csv", str(path)]
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert "1 row(s) cannot be linked and nothing was written" in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["link_report.csv"]
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

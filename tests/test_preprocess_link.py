import csv
import io
import os
import shutil
import xml.etree.ElementTree as ET
import zipfile

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dicom_factory import SAGITTAL, make_series, uid
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image
from pydicom import dcmread

from preprocess.__main__ import main
from preprocess.cvat.read import read_cvat
from preprocess.cvat.shapes import Box, CvatImage, Mask, Polygon, rasterise
from preprocess.cvat.write import write_cvat
from preprocess.link import source
from preprocess.link.link import LinkJob, link_files
from preprocess.link.source import LinkError
from preprocess.link.uid_index import ExamEntry, SliceEntry, UidIndex, write_index_part
from preprocess.pipeline import ConvertJob, convert_tree
from preprocess.store.read import SliceStore
from preprocess.store.schema import IncompleteStoreError

MIRRORED = (0.0, -1.0, 0.0, 0.0, 0.0, -1.0)
TURNED = (0.0, 0.0, 1.0, 0.0, -1.0, 0.0)
OBLIQUE = (0.0, 0.6, 0.8, 0.0, -0.8, 0.6)
ORIENTATIONS = {"P1": SAGITTAL, "P4": MIRRORED, "T1": TURNED, "T2": OBLIQUE}
"""Patients whose stored slices are those of the files, mirrored, transposed and flipped twice, oblique and flipped."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """P1 and P2 with one exam, P3 with two, P4 mirrored, P5 and P6 with none converted, P7 of two issuers, T turned."""
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
        ("T1", "s1", {"orientation": TURNED, "PixelSpacing": [1.0, 1.5]}),
        ("T2", "s1", {"orientation": OBLIQUE}),
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
    monkeypatch.setattr(source, "CHUNK_ROWS", 2)
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
        ("<box", '<points label="L1L2" points="1,2;3,4"/><box', "linked_partly"),
        ("<box", '<polygon label="L1L2" points="1,2;3,4"/><box', "bad_coordinates"),
        ("<box", '<mask label="L1L2" rle="1" left="9" top="0" width="2" height="1"/><box', "bad_coordinates"),
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


# --- every kind of shape, and masks from files: what is marked is the same pixels before and after -------------------

BRIGHT = 2000
"""Masks of these tests mark the pixels above; make_series draws each pixel at random."""


def files_of(store, patient):
    """Headers and pixels of the series' files."""
    return [dcmread(path) for path in sorted((store.parent / "dicom").glob(f"{patient}s1-*.dcm"))]


def stored_of(store, patient):
    """Pseudonyms of a patient's series, and its pixels (S, H, W)."""
    place = exam_of(store, patient)["study_id"]
    manifest = SliceStore.open(store).manifest.set_index("study_id")
    return (place, manifest.loc[place, "series_id"]), SliceStore.open(store).read(manifest.loc[place, "series_id"])


def marked(path):
    """Linked image name → what is marked on it; names are those of `stored_of` and the slice."""
    images = {}
    for image in read_cvat(path):
        study_id, series_id, index = image.name.removesuffix(".png").split("/")
        drawn = [rasterise(shape, (image.height, image.width)) for shape in image.shapes]
        images[(study_id, series_id), int(index)] = np.logical_or.reduce(drawn)
    return images


def link_out(store, tmp_path, **sources):
    """Link everything that links; returns the reasons."""
    link_files(LinkJob(store, tmp_path / "out", allow_unlinked=True, **sources))
    return reasons(tmp_path)


@pytest.mark.parametrize("patient", ORIENTATIONS)
def test_masks_of_cvat_mark_the_same_pixels_before_and_after(store, tmp_path, patient):
    images = []
    for file in files_of(store, patient):
        mask = Mask.from_pixels("lumbar", file.pixel_array > BRIGHT)
        images.append(CvatImage(f"x/{file.SOPInstanceUID}.png", file.Columns, file.Rows, (mask,)))
    write_cvat(tmp_path / "m.xml", images)
    assert set(link_out(store, tmp_path, annotations=(tmp_path / "m.xml",))) == {"linked"}
    place, stored_SHW = stored_of(store, patient)
    found = marked(tmp_path / "out" / "m.xml")
    assert set(found) == {(place, index) for index in range(len(stored_SHW))}
    for (_, index), mask in found.items():
        np.testing.assert_array_equal(mask, stored_SHW[index] > BRIGHT)


@pytest.mark.parametrize("patient", ORIENTATIONS)
@pytest.mark.parametrize(
    "shape",
    [
        Box("L1L2", 1, 2.5, 4, 8),
        Box("L1L2", 1, 2, 4, 9.5, 30.0),
        Polygon("L1L2", ((0.5, 0.5), (9, 2.25), (3, 11.5), (4, 5))),
    ],
    ids=["box", "turned-box", "polygon"],
)
def test_shapes_mark_the_same_pixels_before_and_after(store, tmp_path, patient, shape):
    file = files_of(store, patient)[1]
    write_cvat(tmp_path / "m.xml", [CvatImage(f"{file.SOPInstanceUID}.png", file.Columns, file.Rows, (shape,))])
    assert link_out(store, tmp_path, annotations=(tmp_path / "m.xml",)) == ["linked"]
    (image,) = read_cvat(tmp_path / "out" / "m.xml")
    assert type(image.shapes[0]) is type(shape)
    place, stored_SHW = stored_of(store, patient)
    (((found_place, index), mask),) = marked(tmp_path / "out" / "m.xml").items()
    assert found_place == place
    before = file.pixel_array[rasterise(shape, file.pixel_array.shape)]
    np.testing.assert_array_equal(np.sort(stored_SHW[index][mask]), np.sort(before))


@pytest.mark.parametrize("folder", ["", "deep/er/"])
def test_exported_pictures_link_as_themselves(store, tmp_path, folder):
    (study_id, series_id), stored_SHW = stored_of(store, "T1")
    images = []
    for index in (3, 1):
        mask = Mask.from_pixels("lumbar", stored_SHW[index] > BRIGHT)
        name = f"{folder}{study_id}/{series_id}/{index}.png"
        images.append(CvatImage(name, stored_SHW.shape[2], stored_SHW.shape[1], (mask, Box("L1L2", 0, 1, 2, 3))))
    write_cvat(tmp_path / "m.xml", images)
    assert link_out(store, tmp_path, annotations=(tmp_path / "m.xml",)) == ["linked", "linked"]
    linked = list(read_cvat(tmp_path / "out" / "m.xml"))
    assert [image.shapes for image in linked] == [image.shapes for image in images]
    assert [image.name for image in linked] == [f"{study_id}/{series_id}/{index}.png" for index in (3, 1)]


def test_names_that_are_no_pictures_of_this_store_do_not_link(store, tmp_path):
    (study_id, series_id), _ = stored_of(store, "P1")
    (other_study, _), _ = stored_of(store, "P2")
    file = files_of(store, "P1")[0]
    names = [
        f"{study_id}/{series_id}/99.png",
        f"{other_study}/{series_id}/1.png",
        f"{study_id}/{series_id[::-1]}/1.png",
        f"{study_id}/{series_id}/4.png",
        f"{study_id}/{series_id}/004.png",
        f"{file.SOPInstanceUID}.png",  # the factory's first file is the last slice
    ]
    write_cvat(tmp_path / "m.xml", [CvatImage(name, 10, 12, (Box("L1L2", 1, 2, 3, 4),)) for name in names])
    unmatched, repeated = ["slice_unmatched"] * 3, ["duplicate"] * 2
    assert link_out(store, tmp_path, annotations=(tmp_path / "m.xml",)) == [*unmatched, "linked", *repeated]


@pytest.mark.parametrize(
    ("label", "linked"),
    [
        ("L4L5", "L4L5"),
        ("lumbar", "lumbar"),
        ("T12", "T12"),
        ("Meier", "unnamed"),
        ("l1l2", "unnamed"),
        ("", "unnamed"),
    ],
)
def test_only_labels_that_name_anatomy_pass(store, tmp_path, label, linked):
    file = files_of(store, "P1")[0]
    shapes = (Box(label, 1, 2, 3, 4), Polygon(label, ((1, 1), (2, 1), (2, 2))), Mask(label, 0, 0, 1, 1, (0, 1)))
    write_cvat(tmp_path / "m.xml", [CvatImage(f"{file.SOPInstanceUID}.png", 10, 12, shapes)])
    link_out(store, tmp_path, annotations=(tmp_path / "m.xml",))
    (image,) = read_cvat(tmp_path / "out" / "m.xml")
    assert [shape.label for shape in image.shapes] == [linked] * 3


def test_archive_of_cvat_is_linked_as_xml(store, tmp_path):
    file = files_of(store, "P1")[0]
    write_cvat(tmp_path / "m.xml", [CvatImage(f"{file.SOPInstanceUID}.png", 10, 12, (Box("L1L2", 1, 2, 3, 4),))])
    with zipfile.ZipFile(tmp_path / "task.zip", "w") as archive:
        archive.write(tmp_path / "m.xml", "annotations.xml")
    link_out(store, tmp_path, annotations=(tmp_path / "m.xml", tmp_path / "task.zip"))
    assert (tmp_path / "out" / "task.xml").read_bytes() == (tmp_path / "out" / "m.xml").read_bytes()
    shutil.copy(tmp_path / "task.zip", tmp_path / "m.zip")
    with pytest.raises(LinkError, match="would have one name"):
        link_files(LinkJob(store, tmp_path / "out", annotations=(tmp_path / "m.xml", tmp_path / "m.zip")))


# --- PNG masks


def save_png(folder, name, values, mode=None):
    path = folder / "masks" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    image.save(path)
    return path


@pytest.mark.parametrize(
    ("patient", "kind"),
    [*((patient, np.uint8) for patient in ORIENTATIONS), ("T1", np.uint16), ("T1", bool), ("T1", "palette")],
)
def test_png_masks_mark_the_same_pixels(store, tmp_path, patient, kind):
    file = files_of(store, patient)[2]
    bright = file.pixel_array > BRIGHT
    scale = {np.uint8: 255, np.uint16: 40_000}.get(kind, 1)
    values = bright.astype(np.uint8) if kind == "palette" else (bright * scale).astype(kind)
    save_png(tmp_path, file.SOPInstanceUID, values, mode="P" if kind == "palette" else None)
    assert link_out(store, tmp_path, masks=(tmp_path / "masks",)) == ["linked"]
    place, stored_SHW = stored_of(store, patient)
    (((found_place, index), mask),) = marked(tmp_path / "out" / "masks.xml").items()
    assert found_place == place
    np.testing.assert_array_equal(mask, stored_SHW[index] > BRIGHT)


def test_values_are_levels_and_exported_pictures_stay_where_they_are(store, tmp_path):
    (study_id, series_id), _ = stored_of(store, "T1")
    shape = SliceStore.open(store).read(series_id).shape[1:]
    values = np.zeros(shape, np.uint8)
    values[1:3, 2:5], values[4:6, 2:5] = 2, 5
    save_png(tmp_path, f"{study_id}/{series_id}/3", values)
    assert link_out(store, tmp_path, masks=(tmp_path / "masks",)) == ["linked"]
    (image,) = read_cvat(tmp_path / "out" / "masks.xml")
    assert image.name == f"{study_id}/{series_id}/3.png"
    assert image.shapes == (Mask("L2L3", 2, 1, 3, 2, (0, 6)), Mask("L5S1", 2, 4, 3, 2, (0, 6)))


def png_bytes(values, **options):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG", **options)
    return file.getvalue()


MARKED = np.eye(12, 10, dtype=np.uint8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png_bytes(MARKED[:, :9]), "bad_size"),
        (png_bytes(MARKED * 0), "empty_mask"),
        (png_bytes(MARKED * 7 + MARKED[::-1]), "bad_mask"),
        (png_bytes(np.dstack([MARKED] * 3)), "bad_mask"),
        (png_bytes(MARKED)[:48], "bad_mask"),
        (png_bytes(MARKED)[:20], "bad_mask"),
        (b"", "bad_mask"),
        (b"\xff\xd8\xff" * 30, "bad_mask"),
        (png_bytes(MARKED).replace(b"IDAT", b"IDAX"), "bad_mask"),
    ],
    ids=["size", "empty", "values", "colour", "cut", "cut-early", "nothing", "jpeg", "damaged"],
)
def test_png_that_is_no_mask_says_why(store, tmp_path, content, reason):
    path = tmp_path / "masks" / f"{files_of(store, 'P1')[0].SOPInstanceUID}.png"
    path.parent.mkdir()
    path.write_bytes(content)
    assert link_out(store, tmp_path, masks=(tmp_path / "masks",)) == [reason]
    assert list(read_cvat(tmp_path / "out" / "masks.xml")) == []


def test_every_file_of_a_mask_folder_is_accounted_for(store, tmp_path):
    first, second = files_of(store, "P1")[:2]
    for name in (f"a/{first.SOPInstanceUID}", f"b/{first.SOPInstanceUID}", "b/1.2.3", f"c/{second.SOPInstanceUID}"):
        save_png(tmp_path, name, MARKED)
    (tmp_path / "masks" / "a" / "notes.txt").write_text("Meier")
    (tmp_path / "masks" / ".DS_Store").write_text("")
    found = sorted([(f"a/{first.SOPInstanceUID}", "linked"), ("a/notes", "bad_mask")])
    wanted = [reason for _, reason in found] + [
        reason for _, reason in sorted([(first.SOPInstanceUID, "duplicate"), ("1.2.3", "slice_unmatched")])
    ]
    assert link_out(store, tmp_path, masks=(tmp_path / "masks",)) == [*wanted, "linked"]
    rows = table(tmp_path, "link_report.csv")
    assert [(row["file"], row["line"]) for row in rows] == [("masks", str(number)) for number in range(1, 6)]
    assert first.SOPInstanceUID not in (tmp_path / "out" / "link_report.csv").read_text()


def test_mask_folder_is_checked(store, tmp_path):
    (tmp_path / "masks").mkdir()
    with pytest.raises(LinkError, match="no folder of masks"):
        link_files(LinkJob(store, tmp_path / "out", masks=(tmp_path / "masks",)))
    save_png(tmp_path, "1.2.3", MARKED)
    with pytest.raises(LinkError, match="lies in the masks"):
        link_files(LinkJob(store, tmp_path / "masks" / "out", masks=(tmp_path / "masks",)))


def test_command_line_links_masks(store, tmp_path, capsys):
    save_png(tmp_path, files_of(store, "P1")[0].SOPInstanceUID, MARKED)
    assert main(["link", str(store), "--out", str(tmp_path / "out"), "--masks", str(tmp_path / "masks")]) == 0
    assert "masks:      1 linked" in capsys.readouterr().out
    assert main(["link", str(store), "--out", str(tmp_path / "out"), "--masks", os.path.relpath(tmp_path)]) == 2


# --- NIfTI masks


def scanner_nifti(files, values_SHW, codes="LAS"):
    """The files' volume as converters write it: absolute RAS affine, axes turned to `codes`."""
    row_mm, column_mm = files[0].PixelSpacing
    along_row, along_column = np.reshape([float(v) for v in files[0].ImageOrientationPatient], (2, 3))
    positions = [np.array([float(v) for v in file.ImagePositionPatient]) for file in files]
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1], lps[:3, 3] = along_row * column_mm, along_column * row_mm, positions[0]
    lps[:3, 2] = (positions[-1] - positions[0]) / (len(files) - 1)
    affine = np.diag([-1, -1, 1, 1]) @ lps
    image = nib.Nifti1Image(np.asarray(values_SHW).transpose(2, 1, 0), affine)
    return image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(codes)))


def save_nifti(folder, name, image):
    path = folder / "masks" / f"{name}.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.to_filename(path)


@pytest.mark.parametrize("patient", ORIENTATIONS)
@pytest.mark.parametrize("codes", ["RAS", "PIL"])
def test_nifti_masks_of_the_scanner_mark_the_same_pixels(store, tmp_path, patient, codes):
    files = files_of(store, patient)
    bright = np.stack([file.pixel_array > BRIGHT for file in files]).astype(np.uint8)
    bright[1] = 0
    save_nifti(tmp_path, files[0].SeriesInstanceUID, scanner_nifti(files, bright, codes))
    assert link_out(store, tmp_path, masks=(tmp_path / "masks",)) == ["linked"]
    place, stored_SHW = stored_of(store, patient)
    found = marked(tmp_path / "out" / "masks.xml")
    unmarked = next(
        index for index in range(5) if sorted(stored_SHW[index].ravel()) == sorted(files[1].pixel_array.ravel())
    )
    assert set(found) == {(place, index) for index in range(5)} - {(place, unmarked)}
    for (_, index), mask in found.items():
        np.testing.assert_array_equal(mask, stored_SHW[index] > BRIGHT)


@pytest.mark.parametrize("patient", ORIENTATIONS)
@pytest.mark.parametrize("codes", [None, "PIR"])
def test_masks_drawn_on_an_exported_volume_mark_the_same_pixels(store, tmp_path, patient, codes):
    (study_id, series_id), stored_SHW = stored_of(store, patient)
    main(["export", str(store), "--out", str(tmp_path / "volumes"), "--num-cpus", "0"])
    volume = nib.load(tmp_path / "volumes" / study_id / f"{series_id}.nii.gz")
    levels = np.digitize(np.asanyarray(volume.dataobj), [BRIGHT, BRIGHT + 900]).astype(np.float32)
    image = nib.Nifti1Image(levels, volume.affine)
    if codes:
        image = image.as_reoriented(ornt_transform(io_orientation(volume.affine), axcodes2ornt(codes)))
    save_nifti(tmp_path, f"{study_id}/{series_id}", image)
    assert link_out(store, tmp_path, masks=(tmp_path / "masks",)) == ["linked"]
    for image in read_cvat(tmp_path / "out" / "masks.xml"):
        pixels_HW = stored_SHW[int(image.name.split("/")[2].removesuffix(".png"))]
        assert [shape.label for shape in image.shapes] == ["L1L2", "L2L3"]
        found = [rasterise(shape, pixels_HW.shape) for shape in image.shapes]
        np.testing.assert_array_equal(found[0], (pixels_HW >= BRIGHT) & (pixels_HW < BRIGHT + 900))
        np.testing.assert_array_equal(found[1], pixels_HW >= BRIGHT + 900)


def shifted(image, offset_mm):
    affine = image.affine.copy()
    affine[:3, 3] += offset_mm
    return nib.Nifti1Image(np.asanyarray(image.dataobj), affine)


def without_codes(image):
    image.header["sform_code"] = image.header["qform_code"] = 0
    return nib.Nifti1Image(np.asanyarray(image.dataobj), None, image.header)


def changed(image, change):
    return nib.Nifti1Image(change(np.asanyarray(image.dataobj)), image.affine)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda image: shifted(image, [0.05, 0, 0]), "linked"),
        (lambda image: shifted(image, [0, 1, 0]), "bad_grid"),
        (lambda image: shifted(image, [4, 0, 0]), "bad_grid"),
        (
            lambda image: nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine @ np.diag([1, 1.1, 1, 1])),
            "bad_grid",
        ),
        (
            lambda image: nib.Nifti1Image(np.asanyarray(image.dataobj), np.diag([-1, -1, 1, 1]) @ image.affine),
            "bad_grid",
        ),
        (lambda image: image.slicer[:-1], "bad_grid"),
        (lambda image: image.slicer[:, :, 1:], "bad_grid"),
        (without_codes, "bad_grid"),
        (lambda image: changed(image, lambda data: np.stack([data, data], axis=3)), "bad_grid"),
        (lambda image: changed(image, lambda data: data[..., None]), "linked"),
        (lambda image: changed(image, lambda data: data * np.float32(0.5)), "bad_mask"),
        (lambda image: changed(image, lambda data: data + np.float32(np.nan)), "bad_mask"),
        (lambda image: changed(image, lambda data: data * 6 + 1), "bad_mask"),
        (lambda image: changed(image, lambda data: data * 0), "empty_mask"),
    ],
    ids=[
        "nudge",
        "shift",
        "slice",
        "spacing",
        "lps",
        "rows",
        "slices",
        "codes",
        "frames",
        "one-frame",
        "half",
        "nan",
        "values",
        "empty",
    ],
)
def test_nifti_off_the_grid_or_without_a_mask_is_refused(store, tmp_path, change, reason):
    files = files_of(store, "P1")
    bright = np.stack([file.pixel_array > BRIGHT for file in files]).astype(np.uint8)
    save_nifti(tmp_path, files[0].SeriesInstanceUID, change(scanner_nifti(files, bright, "RAS")))
    assert link_out(store, tmp_path, masks=(tmp_path / "masks",)) == [reason]


def test_nifti_names_that_find_no_series_or_another_grid_say_so(store, tmp_path):
    files = files_of(store, "P1")
    bright = np.stack([file.pixel_array > BRIGHT for file in files]).astype(np.uint8)
    (study_id, series_id), _ = stored_of(store, "P1")
    save_nifti(tmp_path, "a/1.2.3", scanner_nifti(files, bright))
    save_nifti(tmp_path, f"b/{series_id[::-1]}", scanner_nifti(files, bright))
    save_nifti(tmp_path, f"c/{files[0].SeriesInstanceUID}", scanner_nifti(files, bright))
    save_nifti(tmp_path, f"d/{files[0].SeriesInstanceUID}", scanner_nifti(files, bright))
    save_png(tmp_path, f"e/{study_id}/{series_id}/0", MARKED)
    wanted = ["series_unmatched", "series_unmatched", "linked", "duplicate", "duplicate"]
    assert link_out(store, tmp_path, masks=(tmp_path / "masks",)) == wanted
    assert len(list(read_cvat(tmp_path / "out" / "masks.xml"))) == 5


def test_frames_of_a_series_are_named_by_number(copied):
    """The header index counts frames from 0, the index of slices from 1."""
    folder = copied.with_suffix(".private") / "index" / "a"
    folder.mkdir(exist_ok=True)
    columns = {
        "series_uid": ["9.9"] * 2,
        "sop_uid": ["1.2"] * 2,
        "frame": [0, 1],
        "position_mm": [[0.0] * 3, [1.0] * 3],
    }
    pq.write_table(pa.table(columns), folder / "batch.parquet")
    objects = UidIndex(copied.with_suffix(".private")).objects_of_series(["9.9", "9.8"])
    assert objects["sop_uid"].to_pylist() == ["1.2#1", "1.2#2"]
    assert objects["position_mm"].to_pylist() == columns["position_mm"]


def test_volume_by_pseudonym_begins_where_exported_ones_do(store, tmp_path):
    files = files_of(store, "P1")
    bright = np.stack([file.pixel_array > BRIGHT for file in files]).astype(np.uint8)
    save_nifti(tmp_path, stored_of(store, "P1")[0][1], scanner_nifti(files, bright))
    assert link_out(store, tmp_path, masks=(tmp_path / "masks",)) == ["bad_grid"]


@pytest.mark.parametrize("length", [0, 60, -20])
def test_damaged_nifti_is_no_mask(store, tmp_path, length):
    files = files_of(store, "P1")
    noise = np.random.default_rng(1).integers(0, 6, (5, 12, 10)).astype(np.uint8)
    save_nifti(tmp_path, files[0].SeriesInstanceUID, scanner_nifti(files, noise))
    (path,) = (tmp_path / "masks").iterdir()
    path.write_bytes(path.read_bytes()[:length])
    assert link_out(store, tmp_path, masks=(tmp_path / "masks",)) == ["bad_mask"]

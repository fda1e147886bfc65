"""What one run after the other makes of a tree that changes, and what options change."""

import csv
import os

import numpy as np
import pytest
from dicom_factory import make_series
from pydicom import dcmread

from preprocess import partitions
from preprocess.__main__ import main
from preprocess.headers.index import FileRow, WalkedFile, walk
from preprocess.mapper import map_here
from preprocess.pipeline import ConvertJob, PreprocessError, convert_tree
from preprocess.select import Policy
from preprocess.store.read import SliceStore
from preprocess.store.schema import StoreError
from preprocess.store.verify import verify_store

T1 = {"EchoTime": 12.0, "RepetitionTime": 600.0}


def convert(tree, out, **options):
    return convert_tree(ConvertJob(tree, out, **options)).summary


def edit(path, **changes):
    status = path.stat()
    dataset = dcmread(path)
    for name, value in changes.items():
        setattr(dataset, name, value)
    dataset.save_as(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture
def tree(tmp_path):
    for patient in ("P1", "P2"):
        make_series(tmp_path / "dicom" / patient, patient=patient, StudyDate="20120229")
        make_series(tmp_path / "dicom" / patient, patient=patient, series="t1", **T1)
    return tmp_path / "dicom"


def test_pixels_changed_in_place_are_noticed(tmp_path, tree):
    first = convert(tree, tmp_path / "x.zarr")
    edit(tree / "P1" / "t2-002.dcm", PatientComments="touched, not changed")
    assert convert(tree, tmp_path / "x.zarr") == first
    pixels = dcmread(tree / "P1" / "t2-002.dcm").pixel_array
    edit(tree / "P1" / "t2-002.dcm", PixelData=(pixels + 1).tobytes())
    assert convert(tree, tmp_path / "x.zarr").codes["changed_after_commit"] == 5
    assert len(SliceStore.open(tmp_path / "x.zarr")) == 2


def test_a_series_without_its_private_record_is_compared_not_trusted(tmp_path, tree):
    convert(tree, tmp_path / "x.zarr")
    for path in (tmp_path / "x.private" / "parts").glob("*.sources.json"):
        path.unlink()
    assert convert(tree, tmp_path / "x.zarr").codes == {"converted": 10, "t1_weighted": 10}


def test_a_second_contrast_joins_the_store(tmp_path, tree):
    convert(tree, tmp_path / "x.zarr")
    before = SliceStore.open(tmp_path / "x.zarr").content_hash
    both = Policy(contrasts=("t2_sagittal", "t1_sagittal"))
    assert convert(tree, tmp_path / "x.zarr", policy=both).codes == {"converted": 20}
    assert SliceStore.open(tmp_path / "x.zarr").manifest["contrast"].value_counts().to_dict() == {
        "t2_sagittal": 2,
        "t1_sagittal": 2,
    }
    assert SliceStore.open(tmp_path / "x.zarr", contrast="t2_sagittal").content_hash == before
    with pytest.raises(StoreError, match="no t2_fatsat_sagittal series"):
        SliceStore.open(tmp_path / "x.zarr", contrast="t2_fatsat_sagittal")


def test_gaps_are_converted_on_request_and_stay_known(tmp_path, tree):
    edit(tree / "P1" / "t2-003.dcm", PixelData=b"12")
    assert convert(tree, tmp_path / "x.zarr").codes["series_incomplete"] == 4
    for _ in range(2):
        summary = convert(tree, tmp_path / "x.zarr", policy=Policy(allow_gaps=True))
        assert summary.codes == {"converted": 9, "t1_weighted": 10, "truncated": 1}
    manifest = SliceStore.open(tmp_path / "x.zarr").manifest.sort_values("num_slices")
    assert [list(missing) for missing in manifest["missing_mm"]] == [[4.0], []]
    assert manifest["confidence"].tolist() == ["flagged", "high"]


def test_overrides_are_obeyed_and_must_exist(tmp_path, tree, capsys):
    uid = str(dcmread(tree / "P1" / "t2-000.dcm").SeriesInstanceUID)
    (tmp_path / "o.csv").write_text(f"series,action\n{uid},skip\n")
    words = [str(tree), "--out", str(tmp_path / "x.zarr"), "--num-cpus", "0", "--overrides", str(tmp_path / "o.csv")]
    assert main(words) == 0
    assert len(SliceStore.open(tmp_path / "x.zarr")) == 1
    (tmp_path / "o.csv").write_text(f"series,action\n{uid},skip\n1.2.3.4,use\n")
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "1 of 2 lines of the override file" in message
    assert "1.2.3.4" not in message


def test_dates_are_shifted_by_the_patient(tmp_path):
    for number, (patient, date) in enumerate([("P1", "20120229"), ("P1", "20130228"), ("P2", "20120229")]):
        make_series(tmp_path / "d" / str(number), patient=patient, study=f"s{number}", StudyDate=date)
    convert(tmp_path / "d", tmp_path / "x.zarr", shift_dates=True)
    manifest = SliceStore.open(tmp_path / "x.zarr").manifest
    days = [np.sort(dates.to_numpy(dtype="datetime64[D]")) for _, dates in manifest.groupby("patient_id")["study_date"]]
    alone, pair = sorted(days, key=len)
    assert pair[1] - pair[0] == np.timedelta64(365)
    assert alone[0] != pair[0]
    assert (np.concatenate(days) < np.datetime64("2013-02-28")).all()
    assert "MODIFIED" in (tmp_path / "x.zarr" / "zarr.json").read_text()
    with pytest.raises(StoreError, match="--dates shift"):
        convert(tmp_path / "d", tmp_path / "x.zarr")


def test_dates_are_dropped_by_default(tmp_path, tree):
    convert(tree, tmp_path / "x.zarr")
    assert SliceStore.open(tmp_path / "x.zarr").manifest["study_date"].tolist() == ["", ""]


def test_mapping_table_is_private_and_complete(tmp_path, tree):
    convert(tree, tmp_path / "x.zarr", mapping_table=tmp_path / "map.csv")
    rows = read_csv(tmp_path / "map.csv")
    assert {row["PatientID"] for row in rows} == {"P1", "P2"}
    assert {row["study_id"] for row in rows} == set(SliceStore.open(tmp_path / "x.zarr").manifest["study_id"])
    assert (tmp_path / "map.csv").stat().st_mode & 0o777 == 0o600


def test_candidates_say_why_every_stack_was_taken_or_not(tmp_path, tree):
    convert(tree, tmp_path / "x.zarr")
    stacks = read_csv(tmp_path / "x.report" / "stacks.csv")
    assert sorted((stack["contrast"], stack["code"], stack["evidence"]) for stack in stacks) == [
        *[("t1_sagittal", "t1_weighted", "physics;te=12;tr=600")] * 2,
        *[("t2_sagittal", "converted", "physics;te=112.7;tr=3500")] * 2,
    ]


def test_headers_are_read_once(tmp_path, tree, monkeypatch):
    convert(tree, tmp_path / "x.zarr")
    read = []
    index_files = partitions.index_files
    monkeypatch.setattr(partitions, "index_files", lambda root, files: read.append(files) or index_files(root, files))
    convert(tree, tmp_path / "x.zarr")
    assert not read
    edit(tree / "P1" / "t2-002.dcm", PatientComments="touched")
    convert(tree, tmp_path / "x.zarr")
    assert len(read) == 1


def test_large_trees_get_more_parts_and_bounded_blocks(tmp_path, tree, monkeypatch):
    convert(tree, tmp_path / "small.zarr")
    monkeypatch.setattr(partitions, "LARGE_TREE_FILES", 3)
    monkeypatch.setattr(partitions, "ROWS_IN_MEMORY", 1)
    monkeypatch.setattr(partitions, "FILES_PER_BATCH", 3)
    key = tmp_path / "small.private" / "pseudonym.key"
    convert(tree, tmp_path / "large.zarr", key_file=key)
    small, large = (SliceStore.open(tmp_path / name) for name in ("small.zarr", "large.zarr"))
    assert {path.stem for path in (large.path / "manifest").iterdir()} == set(large.manifest["study_id"].str[:2])
    assert small.content_hash == large.content_hash
    assert verify_store(large.path) == []
    reports = [(tmp_path / f"{name}.report" / "stacks.csv").read_text() for name in ("small", "large")]
    assert reports[0] == reports[1]


def test_batches_end_with_folders_and_keep_their_place_when_files_are_added():
    def named(folders):
        files = [WalkedFile(f"{folder}/{number}") for folder, count in folders for number in range(count)]
        return [partitions.batch_name(batch) for batch in partitions.batches(files)]

    before = named([("a", 300), ("b", 300), ("c", 3000), ("d", 10)])
    after = named([("a", 301), ("b", 300), ("c", 3000), ("d", 10)])
    assert len(before) == 6
    assert before[1:] == after[1:]


def test_odd_header_text_survives_the_index(tmp_path):
    task = partitions.IndexTask(str(tmp_path), str(tmp_path / "index"), b"k" * 32, 1)
    rows = [FileRow(os.fsdecode(b"bad\xff"), 1, study_uid="1.2", protocol="\udcff", image_type=("A",), frame=2)]
    outcome = partitions.write_batch(task, "batch", rows, "signature")
    (part,) = outcome.parts
    ((row,),) = partitions.part_rows(tmp_path / "index", part, frozenset({"batch"}))
    assert (row.path, row.protocol, row.image_type, row.frame) == (os.fsdecode(b"bad\xff"), "?", ("A",), 2)


def test_a_tree_that_kills_tasks_without_a_culprit_is_an_error(tmp_path, tree):
    from preprocess.mapper import TaskFailure

    def dying(function, items, *, title, **options):
        for item, result in map_here(function, items, title=title, **options):
            yield item, TaskFailure() if title.startswith("exams") else result

    with pytest.raises(PreprocessError, match="too little memory"):
        convert_tree(ConvertJob(tree, tmp_path / "x.zarr"), dying)


def test_the_walk_is_the_same_every_time(tmp_path, tree):
    (tree / "loop").symlink_to(tree)
    assert list(walk(tree)) == list(walk(tree))
    assert sum(1 for _ in walk(tree)) == 21

import os
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from dicom_factory import AXIAL, make_series

from preprocess.exam import ExamError, convert_exam
from preprocess.mapper import TaskFailure
from preprocess.pipeline import ConvertJob, PreprocessError, convert_tree
from preprocess.store.read import SliceStore


@pytest.fixture(scope="module")
def cluster():
    from preprocess.job import connect

    with connect(2):
        yield


@pytest.mark.ray
def test_ray_and_one_process_give_the_same_bytes(tmp_path, cluster):
    from preprocess.job import map_on_ray

    for patient in ("P1", "P2", "P3"):
        make_series(tmp_path / "dicom" / patient, patient=patient)
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    for name, options in (("here", {}), ("ray", {"mapper": map_on_ray})):
        (tmp_path / name).mkdir()
        convert_tree(ConvertJob(tmp_path / "dicom", tmp_path / name / "x.zarr", key_file=key), **options)
    here, there = (
        {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("here", "ray")
    )
    assert here == there


@pytest.mark.ray
def test_a_dead_worker_costs_one_item_and_an_error_is_raised(cluster):
    from preprocess.job import map_on_ray

    # Local functions travel by value: workers cannot import test modules.
    def die_on_two(item):
        if item == 2:
            os._exit(1)
        return item * 10

    def refuse(item):
        msg = f"item {item} refused"
        raise ValueError(msg)

    items = [("a", 1), ("b", 2), ("c", 3)]
    results = dict(map_on_ray(die_on_two, items, title="items", total=3))
    assert (results[1], results[3]) == (10, 30)
    assert isinstance(results[2], TaskFailure)
    with pytest.raises(ValueError, match="item 1 refused"):
        list(map_on_ray(refuse, [("a", 1)], title="items", total=1))


def test_relative_paths_are_refused_inside_a_ray_job(monkeypatch):
    from preprocess.job import require_absolute

    require_absolute([Path("relative")])
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    require_absolute([Path("/absolute")])
    with pytest.raises(PreprocessError, match="absolute"):
        require_absolute([Path("/absolute"), Path("relative")])


def crash_on(bad, function, items, **_):
    """A mapper whose tasks die when they hold one certain file."""
    for _, item in items:
        paths = [file.path for file in item] if isinstance(item, list) else []
        yield item, TaskFailure() if bad in paths else function(item)


def test_a_header_that_kills_its_process_costs_one_file(tmp_path):
    make_series(tmp_path / "dicom")
    make_series(tmp_path / "dicom", series="other", orientation=AXIAL)
    job = ConvertJob(tmp_path / "dicom", tmp_path / "x.zarr")
    summary = convert_tree(job, partial(crash_on, "other-003.dcm")).summary
    assert summary.codes == {"converted": 5, "localizer": 4, "unreadable_header": 1}


def test_one_exam_is_converted_by_the_same_path(tmp_path):
    make_series(tmp_path / "dicom" / "t2")
    make_series(tmp_path / "dicom" / "t1", series="t1", EchoTime=10.0, RepetitionTime=500.0)
    exam = convert_exam(tmp_path / "dicom")
    convert_tree(ConvertJob(tmp_path / "dicom", tmp_path / "x.zarr"))
    store = SliceStore.open(tmp_path / "x.zarr")
    np.testing.assert_array_equal(exam.pixels_SHW, store.read(store.manifest["series_id"][0]))
    assert exam.spacing_mm == (1.0, 1.0)
    assert sorted(set(exam.codes.values())) == ["converted", "t1_weighted"]


@pytest.mark.parametrize(
    ("series", "message"),
    [
        ([], "0 exams.*no file"),
        ([{"orientation": AXIAL, "shape": (6, 8, 8)}], "not_sagittal"),
        ([{"patient": "P1"}, {"patient": "P2"}], "2 exams"),
        ([{"PixelData": b"12"}], "truncated"),
    ],
    ids=["empty", "axial", "two-exams", "truncated"],
)
def test_folders_without_one_exam_are_refused(tmp_path, series, message):
    (tmp_path / "dicom").mkdir()
    for number, options in enumerate(series):
        make_series(tmp_path / "dicom" / str(number), **options)
    with pytest.raises(ExamError, match=message):
        convert_exam(tmp_path / "dicom")


@pytest.mark.parametrize(("length", "fits"), [(26, True), (27, False)])
def test_sockets_of_a_cluster_fit_where_its_folder_lies(monkeypatch, length, fits):
    """Ray's longest socket path is 64 bytes longer than its folder, and Linux takes 107."""
    from preprocess.job import _private_ray_folder

    with tempfile.TemporaryDirectory(prefix="t" * (length - len("/tmp/12345678")), dir="/tmp") as base:
        monkeypatch.setattr("tempfile.tempdir", base)
        with _private_ray_folder() as folder:
            assert len(folder) <= 107 - 64
            assert folder.startswith(f"{base}/") == fits


def test_folder_of_a_cluster_is_closed_to_others_and_gone_after_an_error(monkeypatch):
    from preprocess import job

    given = []

    def init(_temp_dir, **_):
        (Path(_temp_dir) / "session").mkdir(parents=True)
        Path(_temp_dir).chmod(0o777)  # as Ray does
        given.append(Path(_temp_dir))
        raise OSError("no room")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(job, "ray", SimpleNamespace(is_initialized=bool, init=init, shutdown=lambda: entered(given[0])))
    with pytest.raises(OSError, match="no room"), job.connect():
        pass
    assert not given[0].parent.exists()


def entered(folder):
    """Look at Ray's folder as its processes end: it must still be there, and closed."""
    assert folder.is_dir()
    assert folder.parent.stat().st_mode & 0o777 == 0o700

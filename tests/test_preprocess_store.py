import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from dicom_factory import AXIAL, make_dataset, make_series, save
from pydicom import dcmread

from preprocess.__main__ import main
from preprocess.commit import KILL_AT_VARIABLE
from preprocess.pipeline import ConvertJob, PreprocessError, convert_tree
from preprocess.store.read import SliceStore
from preprocess.store.schema import SHARD_NAME, IncompleteStoreError, StoreError, series_path
from preprocess.store.verify import verify_store

T1 = {"EchoTime": 12.0, "RepetitionTime": 600.0}


def make_tree(root, patients=("P1", "P2", "P3")):
    """Per patient a sagittal T2, a sagittal T1 and an axial localizer; junk beside them."""
    for patient in patients:
        folder = root / patient
        make_series(folder, patient=patient, study="s1", series="t2")
        make_series(folder, patient=patient, study="s1", series="t1", **T1)
        make_series(folder, (3, 8, 8), patient=patient, study="s1", series="loc", orientation=AXIAL)
    (root / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" + bytes(300))
    (root / "empty").touch()
    return root


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "dicom")


@pytest.fixture
def store(tmp_path, tree):
    convert_tree(ConvertJob(tree, tmp_path / "x.zarr"))
    return tmp_path / "x.zarr"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def everything(store):
    """Bytes of the store and all its siblings, the lock apart."""
    found = {}
    for sibling in sorted(store.parent.glob(f"{store.stem}.*")):
        found |= {f"{sibling.name}/{name}": data for name, data in contents(sibling).items() if name != "lock"}
    return found


def public_part(found):
    return {name: data for name, data in found.items() if not name.startswith("x.private")}


def first_series(store):
    row = SliceStore.open(store).manifest.iloc[0]
    return row["series_id"], series_path(store, row["study_id"], row["series_id"])


def test_store_returns_what_pydicom_reads(tree, store):
    opened = SliceStore.open(store)
    assert opened.manifest["series_id"].is_monotonic_increasing
    expected = {
        np.stack([dcmread(path).pixel_array for path in sorted((tree / patient).glob("t2-*"), reverse=True)]).tobytes()
        for patient in ("P1", "P2", "P3")
    }
    assert {opened.read(series_id).tobytes() for series_id in opened.manifest["series_id"]} == expected
    np.testing.assert_allclose(opened.positions_mm(opened.manifest["series_id"][0]), [0, 4, 8, 12, 16])


def test_manifest_states_the_acquisition(store):
    row = SliceStore.open(store).manifest.iloc[0]
    assert (row["contrast"], row["num_slices"], row["rows"], row["columns"]) == ("t2_sagittal", 5, 12, 10)
    assert (row["spacing_slice_mm"], row["echo_time_ms"], row["manufacturer"]) == (4.0, 112.7, "ge")
    assert (row["evidence"], row["confidence"]) == ("physics;te=112.7;tr=3500", "high")


def test_any_zarr_reader_finds_checksummed_one_slice_chunks(store):
    _, folder = first_series(store)
    array = zarr.open_array(folder, mode="r")
    assert (array.chunks, array.shards) == ((1, 12, 10), (5, 12, 10))
    codecs = json.loads((folder / "zarr.json").read_text())["codecs"][0]["configuration"]["codecs"]
    assert [codec["name"] for codec in codecs] == ["bytes", "blosc", "crc32c"]
    assert sorted(path.name for path in folder.iterdir()) == [SHARD_NAME, "commit.json", "zarr.json"]


def test_every_file_has_one_state(tmp_path, tree):
    summary = convert_tree(ConvertJob(tree, tmp_path / "x.zarr")).summary
    assert summary.files_walked == sum(summary.states.values()) == 3 * 13 + 2
    assert summary.codes == {"converted": 15, "empty_file": 1, "localizer": 9, "not_dicom": 1, "t1_weighted": 15}


def test_an_all_zero_series_is_no_missing_series(tmp_path):
    make_series(tmp_path / "dicom", pixels=np.zeros((5, 8, 8), np.uint16))
    convert_tree(ConvertJob(tmp_path / "dicom", tmp_path / "x.zarr"))
    opened = SliceStore.open(tmp_path / "x.zarr")
    assert not opened.read(opened.manifest["series_id"][0]).any()


def remove_shard(store):
    (first_series(store)[1] / SHARD_NAME).unlink()


def remove_series(store):
    shutil.rmtree(first_series(store)[1])


def cut_shard(store):
    path = first_series(store)[1] / SHARD_NAME
    path.write_bytes(path.read_bytes()[:-1])


def leave_partial(store):
    (first_series(store)[1].parent / ".partial-abc").mkdir()


def forget_in_manifest(store):
    (next((store / "manifest").iterdir())).unlink()


@pytest.mark.parametrize("damage", [remove_shard, remove_series, cut_shard, leave_partial, forget_in_manifest])
def test_incomplete_stores_are_refused_and_repaired(tree, store, damage):
    before = everything(store)
    damage(store)
    with pytest.raises(IncompleteStoreError, match="run the same"):
        SliceStore.open(store)
    assert verify_store(store)
    if damage in {remove_shard, cut_shard}:
        shutil.rmtree(next(store.glob(f"*/{verify_store(store)[0].series_id}")))
    convert_tree(ConvertJob(tree, store))
    assert everything(store) == before


def test_verify_names_the_series_of_an_emptied_manifest(tmp_path):
    convert_tree(ConvertJob(make_tree(tmp_path / "d", ("P1",)), tmp_path / "x.zarr"))
    forget_in_manifest(tmp_path / "x.zarr")
    assert [finding.fault for finding in verify_store(tmp_path / "x.zarr")] == ["not_in_manifest"]


def test_verify_finds_every_flipped_bit(store):
    series_id, folder = first_series(store)
    path = folder / SHARD_NAME
    sound = path.read_bytes()
    assert verify_store(store) == []
    for position in np.random.default_rng(0).integers(0, len(sound), 20):
        damaged = bytearray(sound)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert [(finding.series_id, finding.fault) for finding in verify_store(store)] == [(series_id, "corrupted")]
        with pytest.raises(IncompleteStoreError, match=series_id):
            SliceStore.open(store).read(series_id)


def test_verify_finds_exchanged_and_edited_series(store):
    (_, first), (_, second) = [
        (row["series_id"], series_path(store, row["study_id"], row["series_id"]))
        for _, row in SliceStore.open(store).manifest.iloc[:2].iterrows()
    ]
    attributes = (first / "zarr.json").read_text()
    (first / "zarr.json").write_text(attributes.replace("112.7", "112.8"))
    assert [finding.fault for finding in verify_store(store)] == ["corrupted"]
    (first / "zarr.json").write_text(attributes)
    assert verify_store(store) == []
    shutil.copy(second / "zarr.json", first / "zarr.json")
    assert [finding.fault for finding in verify_store(store)] == ["corrupted"]


def test_rerun_changes_nothing(tree, store):
    before = everything(store)
    convert_tree(ConvertJob(tree, store))
    assert everything(store) == before


def test_a_grown_tree_adds_exams_only(tree, store):
    before = contents(store)
    make_tree(tree, patients=("P4",))
    summary = convert_tree(ConvertJob(tree, store)).summary
    after = contents(store)
    assert summary.series_stored == 4
    assert {name: after[name] for name in before if not name.startswith(("manifest", "candidates"))} == {
        name: data for name, data in before.items() if not name.startswith(("manifest", "candidates"))
    }


def test_a_changed_exam_is_not_overwritten(tree, store):
    normal_end = dcmread(tree / "P1" / "t2-004.dcm")
    normal_end.SOPInstanceUID = normal_end.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    x, y, z = normal_end.ImagePositionPatient
    normal_end.ImagePositionPatient = [x - 4, y, z]
    normal_end.save_as(tree / "P1" / "late.dcm")
    summary = convert_tree(ConvertJob(tree, store)).summary
    assert summary.codes["changed_after_commit"] == 6
    assert SliceStore.open(store).manifest["num_slices"].tolist() == [5, 5, 5]


def test_another_key_is_refused(tmp_path, tree, store):
    other = tmp_path / "other.key"
    other.write_text("ab" * 32)
    other.chmod(0o600)
    with pytest.raises(StoreError, match="two names"):
        convert_tree(ConvertJob(tree, store, key_file=other))
    other.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        convert_tree(ConvertJob(tree, store, key_file=other))


def test_two_writers_are_refused(tree, store):
    import fcntl

    with (store.with_suffix(".private") / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PreprocessError, match="another run"):
            convert_tree(ConvertJob(tree, store))


@pytest.mark.parametrize("out", ["x.store", "dicom/x.zarr"])
def test_bad_outputs_are_refused(tmp_path, tree, out):
    with pytest.raises(ValueError, match=r"zarr|never written"):
        convert_tree(ConvertJob(tree, tmp_path / out))
    assert not (tmp_path / out).exists()


def test_names_numbers_and_folders_do_not_matter(tmp_path):
    make_tree(tmp_path / "dicom")
    convert_tree(ConvertJob(tmp_path / "dicom", tmp_path / "a" / "x.zarr"))
    rng = np.random.default_rng(5)
    paths = sorted(path for path in (tmp_path / "dicom").rglob("*") if path.is_file())
    for number, (path, rank) in enumerate(zip(paths, rng.permutation(len(paths)), strict=True)):
        target = tmp_path / "shuffled" / f"{rank % 4}" / f"{rank:05d}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        if path.suffix == ".dcm":
            dataset = dcmread(target)
            dataset.InstanceNumber = int(rng.integers(1, 9)) if number % 2 else None
            dataset.save_as(target)
    (tmp_path / "b" / "x.private").mkdir(parents=True, mode=0o700)
    shutil.copy(tmp_path / "a" / "x.private" / "pseudonym.key", tmp_path / "b" / "x.private")
    convert_tree(ConvertJob(tmp_path / "shuffled", tmp_path / "b" / "x.zarr"))
    first, second = everything(tmp_path / "a" / "x.zarr"), everything(tmp_path / "b" / "x.zarr")
    assert public_part(first) == public_part(second)
    for kind in ("exams", "slices"):
        assert {n: d for n, d in first.items() if f"/{kind}/" in n} == {
            n: d for n, d in second.items() if f"/{kind}/" in n
        }


CANARY = "CANARYPHI"


def plant_canaries(dataset):
    """Put a recognisable word into every text element and a private tag."""
    for element in dataset.iterall():
        if (
            element.VR in {"PN", "LO", "SH", "ST", "LT", "UT", "AE", "DA", "AS", "TM"}
            and element.keyword != "PatientID"
        ):
            element.value = CANARY
    for name in ("PatientComments", "InstitutionName", "StudyDescription", "SeriesDescription", "OperatorsName"):
        setattr(dataset, name, f"{CANARY} {name}")
    dataset.PatientID, dataset.AccessionNumber, dataset.StationName = f"{CANARY}ID", f"{CANARY}ACC", CANARY
    dataset.ScanOptions, dataset.Manufacturer = [CANARY], f"{CANARY} Inc"
    dataset.private_block(0x0029, CANARY, create=True).add_new(0x01, "LO", CANARY)


def test_no_identifier_leaves_the_private_folder(tmp_path, capsys):
    folder = tmp_path / CANARY
    paths, _ = make_series(folder, patient="P1", study="s1")
    paths += make_series(folder, patient="P1", study="s1", series="t1", **T1)[0]
    uids = set()
    for path in paths:
        dataset = dcmread(path)
        plant_canaries(dataset)
        uids |= {str(dataset.SOPInstanceUID), str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID)}
        dataset.save_as(path)
    broken = dcmread(paths[0])
    broken.SOPInstanceUID, broken.PixelData = "1.2.3", b"12"
    broken.SeriesInstanceUID = "1.2.4"
    broken.save_as(folder / "broken.dcm")
    assert main([str(folder), "--out", str(tmp_path / "x.zarr"), "--num-cpus", "0"]) in {0, 1}
    printed = capsys.readouterr()
    public = public_part(everything(tmp_path / "x.zarr"))
    public["stdout"], public["stderr"] = printed.out.encode(), printed.err.encode()
    assert len(public) > 5
    for name, data in public.items():
        assert CANARY.encode() not in data.upper(), name
        assert CANARY.lower() not in name.lower()
        assert not [uid for uid in uids if uid.encode() in data], name


def test_private_folder_is_private(store):
    private = store.with_suffix(".private")
    assert private.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in private.rglob("*") if path.is_file())


def test_quarantine_above_the_limit_is_a_failure(tmp_path, tree, capsys):
    path = tree / "P2" / "t2-002.dcm"
    dataset = dcmread(path)
    dataset.PixelData = dataset.PixelData[:10]
    dataset.save_as(path)
    words = [str(tree), "--out", str(tmp_path / "x.zarr"), "--num-cpus", "0"]
    assert main(words) == 1
    assert "--max-quarantine" in capsys.readouterr().err
    assert main([*words, "--max-quarantine", "0.2"]) == 0
    report = (tmp_path / "x.report" / "files.csv").read_text()
    assert ",quarantined,truncated,1" in report
    assert ",quarantined,series_incomplete,4" in report
    assert len(SliceStore.open(tmp_path / "x.zarr")) == 2


def test_one_study_of_two_patients_is_not_converted(tmp_path):
    make_series(tmp_path / "dicom")
    save(
        make_dataset(np.ones((12, 10), np.uint16), number=99, study="s1", PatientID="P2"), tmp_path / "dicom" / "other"
    )
    summary = convert_tree(ConvertJob(tmp_path / "dicom", tmp_path / "x.zarr")).summary
    assert summary.codes == {"patient_mismatch": 6}


COMMIT_POINTS = [
    "series:before-rename",
    "series:after-rename",
    "index:batch",
    "manifest:before",
    "manifest:after",
    "uid-index:before",
    "uid-index:between",
    "uid-index:after",
    "midsagittal:before-rename",
    "midsagittal:after-rename",
    "reports:before",
    "reports:part",
    "reports:start",
    "reports:after",
]


def run_command(words, **environment):
    command = [sys.executable, "-m", "preprocess", *map(str, words), "--num-cpus", "0"]
    root = Path(__file__).parents[1]
    return subprocess.run(
        command, env={**os.environ, **environment}, cwd=root, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("point", COMMIT_POINTS)
def test_kill_at_every_commit_point(tmp_path, point):
    check_kill(tmp_path, point)


@pytest.mark.parametrize("point", ["series:before-rename", "reports:before"])
def test_kill_and_resume_gives_the_same_bytes(tmp_path, point):
    check_kill(tmp_path, point)


def check_kill(tmp_path, point):
    tree = make_tree(tmp_path / "dicom")
    templates = tmp_path / "templates.csv"
    uids = [str(dcmread(tree / patient / "t2-002.dcm").SOPInstanceUID) for patient in ("P1", "P2")]
    templates.write_text("\n".join(["SOPInstanceUID", *uids]) + "\n")
    key = tmp_path / "key"
    key.write_text("cd" * 32)
    key.chmod(0o600)
    (tmp_path / "killed").mkdir()
    words = [tree, "--templates", templates, "--key-file", key, "--out", tmp_path / "killed" / "x.zarr"]
    killed = run_command(words, **{KILL_AT_VARIABLE: f"{point}@{tmp_path / 'marker'}"})
    assert killed.returncode == -9, killed.stderr
    assert run_command(words).returncode == 0
    undisturbed = ConvertJob(tree, tmp_path / "calm" / "x.zarr", templates, key_file=key)
    convert_tree(undisturbed)
    assert everything(tmp_path / "killed" / "x.zarr") == everything(undisturbed.out)


def test_inspect_and_verify_commands(store, capsys):
    assert main(["inspect", str(store)]) == 0
    assert "3 patients, 3 exams, 3 series" in capsys.readouterr().out
    assert main(["verify", str(store), "--num-cpus", "0"]) == 0
    remove_shard(store)
    assert main(["verify", str(store), "--num-cpus", "0"]) == 1
    assert "missing_shard" in capsys.readouterr().out
    assert main(["inspect", str(store)]) == 2
    assert main(["inspect", str(store.parent)]) == 2


def test_sound_stack_wins_over_a_longer_one_that_images_positions_twice(tmp_path):
    make_series(tmp_path / "d" / "good", (11, 12, 10), series="good")
    for repeat in range(3):
        for number, path in enumerate(make_series(tmp_path / "d" / f"rep{repeat}", (5, 12, 10), series="rep")[0]):
            dataset = dcmread(path)
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{repeat}.{number}"
            save(dataset, path)
    outcome = convert_tree(ConvertJob(tmp_path / "d", tmp_path / "x.zarr"))
    assert outcome.summary.series_stored == 1
    assert SliceStore.open(tmp_path / "x.zarr").manifest["num_slices"].tolist() == [11]


def test_tree_without_a_sagittal_t2_ends_with_an_error(tmp_path, capsys):
    make_series(tmp_path / "d", series="t1", **T1)
    assert main([str(tmp_path / "d"), "--out", str(tmp_path / "x.zarr"), "--num-cpus", "0"]) == 1
    assert "no t2_sagittal series was found" in capsys.readouterr().err


def test_reports_are_there_when_the_templates_are_not(tmp_path, tree, capsys):
    (tmp_path / "t.csv").write_text("SOPInstanceUID\n1.2.3\n")
    words = [str(tree), "--out", str(tmp_path / "x.zarr"), "--templates", str(tmp_path / "t.csv"), "--num-cpus", "0"]
    assert main(words) == 2
    assert (tmp_path / "x.report" / "files.csv").is_file()
    assert (tmp_path / "x.private" / "files.csv").is_file()

"""Every breakage of a clinical tree ends as it must; the order and the names of things change nothing."""

import csv
import json
import os
import signal
import sys
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from dicom_factory import make_series, transcode
from hostile_cases import CASES
from hostile_exam import SHAPE, draw
from hostile_tree import build_hostile_tree
from pydicom import dcmread
from pydicom.pixels import pixel_array
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless

from preprocess.__main__ import main
from preprocess.accounting import CONVERTED, QUARANTINED, SKIPPED
from preprocess.deidentify import Pseudonymiser, load_key
from preprocess.mapper import map_here
from preprocess.pipeline import ConvertJob, convert_tree
from preprocess.store.read import SliceStore
from preprocess.store.verify import verify_store

NOT_A_MATTER_OF_CONTENT = {
    "changed_after_commit",
    "decoder_crash",
    "internal_error",
    "overridden",
    "t2_weighted",
    "unreadable_file",
    "unreadable_folder",
}
"""Codes that need a second run, options, or a fault of the machine; other tests have them."""

CLEANED = {"monochrome1", "junk_in_high_bits", "signed_12_bits", "signedness_varies"}
"""Cases whose stored values are, as documented, not those that pydicom gives."""


@pytest.fixture(scope="module")
def workplace(module_folder):
    key = module_folder / "key"
    key.write_text("5a" * 32)
    key.chmod(0o600)
    return module_folder


def convert(workplace, tree, name, *options):
    """Run the command; the store has the same name every time, so that reports can be compared."""
    out = workplace / name / "x.zarr"
    arguments = [str(tree.root), "--out", str(out), "--key-file", str(workplace / "key"), "--max-quarantine", "1"]
    with redirect_stdout(StringIO()) as printed:
        assert main([*arguments, *(options or ("--num-cpus", "0"))]) == 0
    assert f"{len(tree.expected)} files walked" in printed.getvalue()
    return out


@pytest.fixture(scope="module")
def tree(workplace):
    return build_hostile_tree(workplace / "dicom")


@pytest.fixture(scope="module")
def out(workplace, tree):
    return convert(workplace, tree, "in-order")


def file_report(out):
    with open(out.with_suffix(".private") / "files.csv", newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def codes(out):
    return {row["path"]: row["code"].partition(":")[0] for row in file_report(out)}


def wrong(tree, found):
    """Case → what was expected and found, where they differ."""
    paths = sorted(tree.expected.keys() | found.keys())
    return {
        f"{tree.case_of.get(path)}: {path}": (tree.expected.get(path), found.get(path))
        for path in paths
        if tree.expected.get(path) != found.get(path)
    }


def shareable(out):
    """Bytes of every file of the store and the shareable report."""
    folders = (out, out.with_suffix(".report"))
    files = (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(out.parent)): path.read_bytes() for path in files}


def series_of(out, tree, case):
    """Manifest row of a case that has one volume."""
    study_id = next(row["study_id"] for row in file_report(out) if tree.case_of[row["path"]] == case)
    manifest = SliceStore.open(out).manifest
    return manifest[manifest["study_id"] == study_id].iloc[0]


def test_every_file_ends_as_expected(tree, out):
    assert wrong(tree, codes(out)) == {}


def test_the_tree_has_every_code_that_content_can_cause(tree):
    every = {CONVERTED, *SKIPPED, *QUARANTINED}
    assert every - set(tree.expected.values()) == NOT_A_MATTER_OF_CONTENT


def test_states_add_up_to_the_files_walked(tree, out):
    summary = json.loads((out.with_suffix(".report") / "summary.json").read_bytes())
    on_disk = sum(len(files) for _, _, files in os.walk(tree.root)) + 1  # a link to a folder is listed as a folder
    assert sum(summary["states"].values()) == sum(summary["codes"].values()) == summary["files_walked"] == on_disk
    with open(out.with_suffix(".report") / "files.csv") as file:
        assert sum(int(row["num_files"]) for row in csv.DictReader(file)) == on_disk


def test_volumes_are_what_was_drawn(tree, out):
    names, store = Pseudonymiser(load_key(out.parents[1] / "key", create=False)), SliceStore.open(out)
    stored = {row["study_id"]: row["series_id"] for row in store.manifest.to_dict("records")}
    expected = {names.study(study_uid.rstrip(" \0")): volume for (study_uid, _), volume in tree.volumes.items()}
    assert len(store) == len(expected) == len(tree.volumes)
    assert stored.keys() == expected.keys()
    for study_id, volume in expected.items():
        np.testing.assert_array_equal(store.read(stored[study_id]), volume)


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom has much to say of these files
def test_volumes_are_pydicoms_values_after_the_recorded_flips(tree, out):
    store, paths = SliceStore.open(out), {}
    for row in file_report(out):
        if row["code"] == CONVERTED and tree.case_of[row["path"]] not in CLEANED:
            paths.setdefault(row["series_id"], []).append(tree.root / row["path"])
    compared = 0
    for row in store.manifest.to_dict("records"):
        images = [dcmread(path, force=True) for path in paths.get(row["series_id"], [])]
        if not images or "NumberOfFrames" in images[0]:
            continue
        images.sort(key=lambda image: float(image.ImagePositionPatient[0]))
        expected = np.stack([own_pixels(image) for image in images])
        expected = expected.swapaxes(1, 2) if row["transpose"] else expected
        expected = expected[:, :: -1 if row["flip_rows"] else 1, :: -1 if row["flip_columns"] else 1]
        np.testing.assert_array_equal(store.read(row["series_id"]), expected)
        compared += 1
    assert compared > 50


def own_pixels(image):
    """What pydicom makes of an image, told its encoding where the file does not say."""
    if "TransferSyntaxUID" not in image.file_meta:
        implicit = image.original_encoding[0]
        image.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return pixel_array(image, raw=True)


@pytest.mark.parametrize(
    ("case", "column", "value"),
    [
        ("plain", "spacing_slice_mm", 4.0),
        ("plain", "uneven_spacing", False),
        ("decimal_noise", "uneven_spacing", False),
        ("spacing_slightly_uneven", "uneven_spacing", True),
        ("oblique", "spacing_slice_mm", 4.0),
        ("oblique", "confidence", "high"),
        ("steep", "spacing_slice_mm", 4.0),
        ("steep", "confidence", "flagged"),
        ("pixel_spacing_unequal", "spacing_row_mm", 0.5),
        ("pixel_spacing_unequal", "spacing_column_mm", 1.25),
        ("both_reversed", "flip_rows", True),
        ("both_reversed", "flip_columns", True),
        ("transposed", "transpose", True),
        ("enhanced", "num_slices", 7),
        ("enhanced", "echo_time_ms", 112.7),
        ("enhanced_with_a_scout_frame", "num_slices", 7),
        ("enhanced_rescale_per_frame", "rescale_slope", [1, 2, 3, 4, 5, 6, 7]),
        ("monochrome1", "inverted", True),
        ("padded", "padding_value", -32768),
        ("signed", "dtype", "int16"),
        ("signedness_varies", "dtype", "int16"),
        ("eight_bits", "dtype", "uint16"),
        ("rescale_per_slice", "rescale_slope", [1, 2, 3, 4, 5, 6, 7]),
        ("rescale_per_slice", "rescale_intercept", [-5] * 7),
        ("jpeg_2000_lossy", "lossy", True),
        ("lossy_flag", "lossy", True),
        ("jpeg_2000", "lossy", False),
        ("contrast_by_name", "confidence", "low"),
    ],
)
def test_the_manifest_says_what_was_odd(tree, out, case, column, value):
    found = series_of(out, tree, case)[column]
    assert (list(found) if isinstance(value, list) else found) == pytest.approx(value, abs=1e-5)


def test_the_store_is_sound(out):
    assert verify_store(out) == []


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_names_numbers_folders_and_order_change_nothing(workplace, out, seed):
    shuffled = build_hostile_tree(workplace / f"dicom-{seed}", shuffle_seed=seed)
    again = convert(workplace, shuffled, f"shuffled-{seed}")
    assert wrong(shuffled, codes(again)) == {}
    assert shareable(again) == shareable(out)


def vanish(path):
    path.unlink()


def shrink(path):
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize(("change", "code"), [(vanish, "unreadable_file"), (shrink, "truncated")])
def test_a_file_that_changes_under_the_scan_costs_its_stack(tmp_path, change, code):
    changing = build_hostile_tree(tmp_path / "dicom", cases=["plain", "oblique"])

    def mapper(function, items, *, title, **options):
        if title == "exams":
            change(changing.root / "plain" / "IM0004")
        yield from map_here(function, items, title=title, **options)

    convert_tree(ConvertJob(changing.root, tmp_path / "x.zarr"), mapper)
    stack = {f"plain/IM{number:04d}": "series_incomplete" for number in range(7)}
    assert codes(tmp_path / "x.zarr") == {**changing.expected, **stack, "plain/IM0004": code}


def test_paths_beyond_the_systems_limit_cost_what_lies_there(tmp_path):
    make_series(tmp_path / "dicom" / "sound")
    here = os.getcwd()
    try:
        os.chdir(tmp_path / "dicom")
        while len(os.getcwd()) < os.pathconf("/", "PC_PATH_MAX") - 250:
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
        with open("f" * 250, "wb"):
            pass
        os.mkdir("e" * 250)
    finally:
        os.chdir(here)
    assert main([str(tmp_path / "dicom"), "--out", str(tmp_path / "x.zarr"), "--num-cpus", "0"]) == 1
    found = sorted(codes(tmp_path / "x.zarr").values())
    assert found == ["converted"] * 5 + ["unreadable_file", "unreadable_folder"]


# --- on Ray ----------------------------------------------------------------------------------------------------------

MARK = np.array([0, 4095, 0, 4095, 1, 2, 3, 4], "<u2").tobytes()
"""First pixels of the image on which the decoder dies."""


def kill_on(mark):
    """What makes every JPEG-LS decoder of a worker die on one image, as a fault in native code would."""

    def patch():
        import types

        from pydicom.pixels import get_decoder
        from pydicom.pixels.decoders.pyjpegls import _decode_frame

        def decode(source, runner):
            frame = bytes(_decode_frame(source, runner))
            if frame.startswith(mark):
                os.kill(os.getpid(), signal.SIGSEGV)
            return frame

        module = types.ModuleType("decoder_that_dies")
        module.decode, module.is_available, module.DECODER_DEPENDENCIES = decode, lambda uid: True, {JPEGLSLossless: ()}
        sys.modules[module.__name__] = module
        decoder = get_decoder(JPEGLSLossless)
        for name in decoder.available_plugins:
            decoder.remove_plugin(name)
            decoder.add_plugin(name, (module.__name__, "decode"))

    return patch


@pytest.fixture(scope="module")
def deadly_cluster():
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": kill_on(MARK)},
    )
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_the_same_bytes(workplace, tree, out, deadly_cluster):
    on_ray = convert(workplace, tree, "ray", "--num-cpus", "2")
    assert wrong(tree, codes(on_ray)) == {}
    assert shareable(on_ray) == shareable(out)


def deadly(exam):
    """A stack of which one image kills its decoder."""
    pixels = draw((exam.patient,), (7, *SHAPE))
    pixels[3].flat[:8] = np.frombuffer(MARK, "<u2")
    entries = exam.stack(pixels=pixels)
    for entry in entries:
        transcode(entry.dataset, JPEGLSLossless)
    exam.fail(entries, "series_incomplete", {3: "decoder_crash"})


@pytest.mark.ray
@pytest.mark.slow
def test_a_decoder_that_dies_costs_one_file(workplace, monkeypatch, deadly_cluster):
    monkeypatch.setitem(CASES, "deadly", deadly)
    cases = ["deadly", "plain", "jpeg_ls", "jpeg_2000", "oblique", "enhanced", "pixels_truncated"]
    few = build_hostile_tree(workplace / "deadly", cases=cases)
    out = convert(workplace, few, "after-the-crash", "--num-cpus", "2")
    assert wrong(few, codes(out)) == {}
    assert len(SliceStore.open(out)) == len(few.volumes) == 5

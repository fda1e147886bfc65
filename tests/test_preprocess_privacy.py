"""No identifier leaves.

Canaries are planted in every text element, private element, name and burned-in pixel; then everything is searched.
"""

import csv
import hashlib
import io
import logging
import os
import re
import shutil
import tempfile
import time
from base64 import b32encode
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from dicom_factory import make_dataset, transcode
from hostile_cases import CASES
from hostile_exam import ENHANCED_MR, SHAPE, draw, make_enhanced
from hostile_tree import build_hostile_tree
from pydicom.datadict import DicomDictionary, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless

from preprocess import convert
from preprocess.__main__ import main
from preprocess.commit import PARTIAL_PREFIX
from preprocess.store.read import SliceStore

TEXTS = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"}
NUMBERS = {"AS": "117Y", "DA": "18930417", "DS": "7391.82645", "DT": "18930417112233.739182", "IS": "739182645"}
NUMBERS |= {"TM": "112233.739182"}
"""Value representations without room for a random text → a value that occurs nowhere else."""

CANARY = re.compile(rb"zqc[0-9a-f]{4}|739182645|7391\.82645|112233\.739|18930417|1893-04-17|(?-i:117Y)", re.IGNORECASE)
"""What every planted value contains, however it is cut, cased or padded."""

NEEDED = {"SpecificCharacterSet", "SOPClassUID", "Modality", "PhotometricInterpretation", "BurnedInAnnotation"}
NEEDED |= {"ImageType", "ScanningSequence", "SequenceVariant", "NumberOfFrames", "AcquisitionNumber"}
NEEDED |= {"TemporalPositionIdentifier", "ComplexImageComponent", "InversionRecovery", "EchoPlanarPulseSequence"}
"""Elements without which an image is not converted; those with several values get a canary as a further one."""

EVERYWHERE = [
    tag_for_keyword(name)
    for name in [
        "PatientID",
        "PatientName",
        "PatientBirthDate",
        "PatientAge",
        "IssuerOfPatientID",
        "AccessionNumber",
        "StudyID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "FrameOfReferenceUID",
        "StudyDate",
        "StudyTime",
        "SeriesDate",
        "AcquisitionDate",
        "AcquisitionTime",
        "StudyDescription",
        "SeriesDescription",
        "ProtocolName",
        "InstitutionName",
        "StationName",
        "OperatorsName",
        "Manufacturer",
        "ManufacturerModelName",
        "DeviceSerialNumber",
        "BodyPartExamined",
        "PatientPosition",
        "ContrastBolusAgent",
        "ScanOptions",
        "MRAcquisitionType",
        "ImageComments",
        "InstanceCreatorUID",
    ]
]
"""Elements that identify, and every text that selection reads."""

NOT_IN_A_DATASET = {0x0000, 0x0002, 0x0004, 0x7FE0, 0xFFFE}
"""Groups of commands, meta, DICOMDIR, pixels and delimiters."""


def canary(*parts):
    """A text of 12 characters that no one else writes."""
    return "ZQC" + hashlib.sha256(repr(parts).encode()).hexdigest()[:9]


def canary_uid(*parts):
    return "2.25.739182645" + str(int(hashlib.sha256(repr(parts).encode()).hexdigest()[:12], 16))


def value_of(representation, *parts):
    if representation == "UI":
        return canary_uid(*parts)
    return canary(*parts) if representation in TEXTS else NUMBERS.get(representation)


def plant(dataset, owner, number=0):
    """Write a canary into every text element, private ones, nested ones and the file's meta information.

    The first image of an exam gets every element that the dictionary knows, the others those of `EVERYWHERE`.
    """
    kept = {element.tag for element in dataset if element.VR in {"DS", "IS"}}
    for tag in EVERYWHERE if number else DicomDictionary:
        representation, _, _, _, keyword = DicomDictionary[tag]
        physics = representation in {"DS", "IS"} and tag >> 16 in {0x0018, 0x0028}
        value = value_of(representation, owner, tag)
        if value is not None and not (physics or keyword in NEEDED or tag in kept or tag >> 16 in NOT_IN_A_DATASET):
            dataset.add_new(tag, representation, value)
    for name in ("ImageType", "ScanningSequence", "SequenceVariant"):
        if name in dataset:
            values = dataset[name].value
            dataset[name].value = [*([values] if isinstance(values, str) else values), canary(owner, name)]
    dataset.SOPInstanceUID = canary_uid(owner, "object", number)
    _plant_private(dataset, owner)
    meta = dataset.file_meta
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.ImplementationVersionName = meta.SourceApplicationEntityTitle = canary(owner, "meta")
    meta.PrivateInformationCreatorUID, meta.PrivateInformation = canary_uid(owner, "meta"), canary(owner).encode()


def _plant_private(dataset, owner):
    inner = Dataset()
    inner.PatientName = inner.TextValue = canary(owner, "nested")
    inner.ReferencedSOPInstanceUID = canary_uid(owner, "nested")
    for tag in ("RequestAttributesSequence", "ReferencedImageSequence", "OtherPatientIDsSequence"):
        setattr(dataset, tag, Sequence([inner]))
    block = dataset.private_block(0x0029, canary(owner, "creator"), create=True)
    block.add_new(0x10, "LO", canary(owner, "private"))
    block.add_new(0x11, "OB", canary(owner, "private bytes").encode())
    block.add_new(0x12, "SQ", Sequence([inner]))


# --- the exams -------------------------------------------------------------------------------------------------------

PIXEL_WORD = b"stored-pixels-are-read-by-the-search"
"""Drawn into an image that is converted: shows that the search would find words in pixels."""


def planted_stack(exam, code="converted", **header):
    entries = exam.stack(code=code, **header)
    for number, entry in enumerate(entries):
        plant(entry.dataset, exam.patient, number)
        entry.name = f"{canary(exam.patient, 'folder')}/{canary(exam.patient, 'file')}^{number}.dcm".encode()
    return entries


def with_word(word):
    pixels = draw((word,), (7, *SHAPE))
    padded = word + b" " * (-len(word) % 2)
    pixels[2].reshape(-1)[: len(padded) // 2] = np.frombuffer(padded, "<u2")
    return pixels


def sound(exam):
    planted_stack(exam, pixels=with_word(PIXEL_WORD))


def second(exam):
    planted_stack(exam)


def burned_in(exam):
    """The name of the patient is in the pixels, and the header says so."""
    entries = exam.stack(code="burned_in", pixels=with_word(canary(exam.patient, "pixels").encode() * 3))
    for number, entry in enumerate(entries):
        plant(entry.dataset, exam.patient, number)
        entry.dataset.BurnedInAnnotation = "YES"


def unknown_charset(exam):
    for entry in planted_stack(exam):
        entry.dataset.SpecificCharacterSet = [canary(exam.patient, "charset")]


def broken_codestream(exam):
    for entry in planted_stack(exam, "decode_error"):
        transcode(entry.dataset, JPEG2000Lossless)
        entry.dataset.PixelData = encapsulate([canary(exam.patient, "stream").encode() * 9])


def broken_jpeg_ls(exam):
    for entry in planted_stack(exam, "decode_error"):
        transcode(entry.dataset, JPEGLSLossless)
        entry.dataset.PixelData = encapsulate([canary(exam.patient, "stream").encode() * 9])


def unknown_syntax(exam):
    for entry in planted_stack(exam, "transfer_syntax"):
        entry.dataset.file_meta.TransferSyntaxUID = canary_uid(exam.patient, "syntax")


def spacing_is_a_word(exam):
    """An element that must be a number holds a word: a parser's complaint would quote it."""
    element = b"\x28\0\x30\0DS\x08\0"
    for entry in planted_stack(exam, "no_geometry"):
        entry.finish = lambda content: content.replace(element + b"1.0\\1.0 ", element + b"ZQC00000")


def truncated(exam):
    entries = planted_stack(exam, "series_incomplete")
    entries[3].code, entries[3].finish = "truncated", lambda content: content[:-300]


def raises(exam):
    """`explode_in_workers` makes the conversion of this exam raise its headers."""
    planted_stack(exam, "internal_error", shape=(32, 41))


def two_patients(exam):
    for entry in planted_stack(exam, "patient_mismatch")[:3]:
        entry.dataset.PatientID = canary(exam.patient, "somebody else")


def enhanced(exam):
    dataset = make_enhanced(draw((exam.patient,), (7, *SHAPE)), list(range(7)))
    plant(dataset, exam.patient)
    dataset.SOPClassUID = ENHANCED_MR
    exam.expect([exam.add(dataset, "converted")], draw((exam.patient,), (7, *SHAPE)))


def other_files(exam):
    report = make_dataset(np.zeros((2, 2), np.uint16))
    plant(report, exam.patient)
    for name in ("Rows", "Columns", "PixelData"):
        del report[name]
    report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.22"
    exam.add(report, "no_pixels", name=canary(exam.patient, "report").encode())
    exam.add(canary(exam.patient, "letter").encode() * 40, "not_dicom", name=canary(exam.patient, "letter").encode())
    exam.add(b"", "empty_file", name=canary(exam.patient, "empty").encode())
    link = canary(exam.patient, "link")
    exam.add(None, "symlink", make=lambda path: path.symlink_to(f"/nowhere/{link}"), name=link.encode())


EXAMS = (sound, second, enhanced, unknown_charset, burned_in, broken_codestream, broken_jpeg_ls, unknown_syntax)
EXAMS += (spacing_is_a_word, truncated, raises, two_patients, other_files)


# --- the search ------------------------------------------------------------------------------------------------------


def readable(path):
    """Bytes of a file, and what a reader of its format would see."""
    yield path.read_bytes()
    if path.suffix == ".parquet":
        yield repr(pq.read_table(path).to_pylist()).encode()
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            yield from (np.ascontiguousarray(array).tobytes() for array in arrays.values())


def everything_in(*folders):
    """Path → contents of every file, with the path among them."""
    paths = [path for folder in folders for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path): [str(path.name).encode(), *readable(path)] for path in paths}


def pixels_in(store):
    opened = SliceStore.open(store)
    return {f"pixels of {name}": [opened.read(name).tobytes()] for name in opened.manifest["series_id"]}


def canaries_in(contents):
    """Name → canaries found."""
    found = {name: {hit for blob in blobs for hit in CANARY.findall(blob)} for name, blobs in contents.items()}
    return {name: hits for name, hits in found.items() if hits}


def digests_of(texts):
    """First 12 characters of every plain hash, hexadecimal and base32: longer ones begin with them."""
    for text in texts:
        for algorithm in ("md5", "sha1", "sha256"):
            digest = hashlib.new(algorithm, text if isinstance(text, bytes) else os.fsencode(text)).digest()
            yield from (digest.hex()[:12].encode(), b32encode(digest)[:12].lower())


def hashes_in(contents, texts):
    """Names of contents in which a hash of one of the texts begins."""
    wanted, word = set(digests_of(texts)), re.compile(rb"[0-9a-z]{12,}", re.IGNORECASE)
    found = {
        name: {run[:12].lower() for blob in blobs for run in word.findall(blob)} for name, blobs in contents.items()
    }
    return {name for name, starts in found.items() if starts & wanted}


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    out: Path
    tree: object
    printed: dict[str, list[bytes]] = field(default_factory=dict)
    """What commands printed or logged."""

    def call(self, *arguments):
        """Run a command and keep what it says, on every channel."""
        said, log = io.StringIO(), io.StringIO()
        handler = logging.StreamHandler(log)
        logging.getLogger().addHandler(handler)
        try:
            with redirect_stdout(said), redirect_stderr(said):
                status = main([str(argument) for argument in arguments])
        finally:
            logging.getLogger().removeHandler(handler)
        self.printed[" ".join(map(str, arguments[:1])) + f" ({len(self.printed)})"] = [
            said.getvalue().encode(),
            log.getvalue().encode(),
        ]
        return status

    @property
    def shareable(self):
        folders = [self.out.with_suffix(suffix) for suffix in (".zarr", ".report", ".midsagittal", ".linked", ".png")]
        return {**everything_in(*folders), **pixels_in(self.out), **self.printed}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("privacy")
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        for exam in EXAMS:
            patched.setitem(CASES, f"exam-{exam.__name__}", exam)
        patched.setattr(convert, "load_volume", convert.load_volume)  # put back afterwards
        explode_in_workers()()
        tree = build_hostile_tree(folder / "dicom", cases=[f"exam-{exam.__name__}" for exam in EXAMS])
        run = Run(folder / "x.zarr", tree)
        templates = folder / "templates.csv"
        names = [canary_uid(f"exam-{exam}", "object", 3) for exam in ("sound", "second")]
        templates.write_text("\n".join(["SOPInstanceUID", *names]) + "\n")
        convert_it = (tree.root, "--out", run.out, "--num-cpus", 0, "--max-quarantine", 1)
        assert run.call(*convert_it, "--templates", templates) == 0
        _misuse(run, folder, convert_it)
        _link(run, folder)
    return run


def _misuse(run, folder, convert_it):
    """Commands that are refused, with messages about what they were given."""
    wrong = folder / "wrong.csv"
    wrong.write_text(f"SOPInstanceUID\n{canary_uid('nobody')}\n")
    assert run.call(*convert_it, "--templates", wrong) == 2
    wrong.write_text(f"series,action\n{canary_uid('nobody')},skip\n")
    assert run.call(*convert_it, "--overrides", wrong) == 2
    assert run.call(*convert_it) == 0
    assert run.call("verify", run.out, "--num-cpus", 0) == 0
    assert run.call("inspect", run.out) == 0
    assert run.call("export", run.out, "--out", run.out.with_suffix(".png"), "--format", "png") == 0


def _link(run, folder):
    labels, boxes = folder / "labels.csv", folder / "boxes.xml"
    rows = [
        [canary(f"exam-{exam}", 0x00100020), canary(f"exam-{exam}", 0x00080050), "1", canary(exam, "remark")]
        for exam in ("sound", "second", "burned_in", "nobody")
    ]
    with labels.open("w", newline="") as file:
        csv.writer(file).writerows([["PatientID", "AccessionNumber", "pain", "remark"], *rows])
    names = [canary_uid(f"exam-{exam}", "object", 3) for exam in ("sound", "nobody")]
    images = "".join(
        f'<image id="{k}" name="{name}.png" width="40" height="32"><box label="L1L2" xtl="1" ytl="1" xbr="9" ybr="9" '
        f'occluded="0"/></image>'
        for k, name in enumerate(names)
    )
    owner = f"<meta><task><name>{canary('task')}</name><owner><email>{canary('owner')}</email></owner></task></meta>"
    boxes.write_text(f"<annotations><version>1.1</version>{owner}<!-- {canary('comment')} -->{images}</annotations>")
    arguments = ("link", run.out, "--out", run.out.with_suffix(".linked"), "--csv", labels, "--cvat", boxes)
    assert run.call(*arguments) == 2
    assert run.call(*arguments, "--allow-unlinked") == 0


def codes(out):
    with (out.with_suffix(".private") / "files.csv").open(newline="") as file:
        return Counter(row["code"].partition(":")[0] for row in csv.DictReader(file))


def test_the_run_met_every_kind_of_file(run):
    assert codes(run.out) == Counter(run.tree.expected.values())
    assert len(SliceStore.open(run.out)) == len(run.tree.volumes) == 4


def test_no_canary_is_in_anything_shareable(run):
    assert canaries_in(run.shareable) == {}


def test_no_plain_hash_of_an_identifier_is_in_anything_shareable(run):
    owners = [f"exam-{exam.__name__}" for exam in EXAMS]
    tags = (0x00100020, 0x00100010, 0x00080050)
    texts = [canary(owner, tag) for owner in owners for tag in tags]
    uids = [canary_uid(owner, tag) for owner in owners for tag in (0x0020000D, 0x0020000E)]
    objects = [canary_uid(owner, "object", number) for owner in owners for number in range(7)]
    files = [path.read_bytes() for path in run.tree.root.rglob("*") if path.is_file()]
    assert hashes_in(run.shareable, [*texts, *uids, *objects, *run.tree.expected, *files]) == set()


def test_the_search_finds_what_is_there(run):
    """Positive control: identifiers are in the private folder, and a word in pixels is seen through compression."""
    private = canaries_in(everything_in(run.out.with_suffix(".private")))
    assert {Path(name).name for name in private} >= {"files.csv"}
    assert any(name.endswith(".parquet") for name in private)
    assert any(PIXEL_WORD in blob for blobs in pixels_in(run.out).values() for blob in blobs)
    assert hashes_in({"report": [hashlib.sha256(canary("x").encode()).hexdigest().encode()]}, [canary("x")])
    sources = b"".join(path.read_bytes() for path in run.tree.root.rglob("*") if path.is_file())
    assert len(set(re.findall(rb"ZQC[0-9a-f]{9}", sources))) > 10_000


def test_private_files_are_for_their_owner_only(run):
    private = run.out.with_suffix(".private")
    assert private.stat().st_mode & 0o077 == 0
    assert not [path for path in private.rglob("*") if path.is_file() and path.stat().st_mode & 0o077]
    assert not list(private.rglob(f"{PARTIAL_PREFIX}*"))


# --- on Ray ----------------------------------------------------------------------------------------------------------


def explode_in_workers():
    """Make the hook by which workers raise what they know of one exam; it travels by value."""

    def patch():
        from preprocess import convert

        original = convert.load_volume

        def load(root, stack, **options):
            if stack.rows[0].columns == 41:
                raise KeyError(f"{root} {stack.rows[0]}")
            return original(root, stack, **options)

        convert.load_volume = load

    return patch


@pytest.fixture
def watched_cluster():
    """A cluster with its own log folder, and the dashboard that knows the names of tasks."""
    import ray

    folder = tempfile.mkdtemp(prefix="ray-")  # a short path: sockets lie below it
    environment = {"worker_process_setup_hook": explode_in_workers()}
    options = {"address": "local", "num_cpus": 2, "include_dashboard": True, "_temp_dir": folder}
    ray.init(**options, runtime_env=environment, log_to_driver=True)
    yield Path(folder)
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_no_canary_is_in_rays_logs_task_names_or_output(run, tmp_path, watched_cluster, capfd):
    import ray
    from ray.util.state import list_tasks

    assert (
        main([str(run.tree.root), "--out", str(tmp_path / "x.zarr"), "--num-cpus", "2", "--max-quarantine", "1"]) == 0
    )
    assert codes(tmp_path / "x.zarr") == Counter(run.tree.expected.values())
    here = ray.get_runtime_context().gcs_address  # else a second cluster on this machine would confuse it
    kinds: set[str] = set()
    end = time.monotonic() + 60
    while kinds != {"index", "convert"} and time.monotonic() < end:  # workers tell their tasks about once a second
        tasks = list_tasks(here, limit=10_000, detail=True, raise_on_missing_output=False)
        kinds = {task.name.partition("-")[0] for task in tasks}
        time.sleep(0.5)
    assert kinds == {"index", "convert"}
    said = capfd.readouterr()
    contents = everything_in(watched_cluster) | {"tasks": [repr(tasks).encode()]}
    contents |= {"printed": [said.out.encode(), said.err.encode()]}
    assert canaries_in(contents) == {}
    assert hashes_in(contents, [canary_uid("exam-sound", 0x0020000D), canary("exam-sound", 0x00100020)]) == set()

    ray.get(ray.remote(print).remote(canary("positive control")))
    ray.shutdown()
    assert canaries_in(everything_in(watched_cluster))

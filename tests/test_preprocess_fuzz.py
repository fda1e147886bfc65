"""Broken on purpose: files mutated by a seeded generator go through indexing and decoding, and each ends in a code.

The work is done in a child process with little memory and an alarm clock, which any native decoder may kill: that is a
counted outcome, as it is in production, where the task that dies costs one file.
"""

from __future__ import annotations

import random
import resource
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pydicom
import pydicom.data
import pytest
from dicom_factory import make_dataset, transcode
from hostile_tree import make_enhanced
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
)

from preprocess.accounting import state_of
from preprocess.headers.index import WalkedFile, index_files
from preprocess.headers.reader import Reader
from preprocess.pixels.volume import VolumeError, decode

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

FILES = Path(pydicom.data.__file__).parent / "test_files"
REAL_SEEDS = (
    "MR_small.dcm",
    "MR_small_implicit.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_RLE.dcm",
    "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "ExplVR_LitEndNoMeta.dcm",
    "nested_priv_SQ.dcm",
)
"""Real files that come with pydicom, one per encoding; enhanced, JPEG lossless and deflated ones are made."""

ENHANCED_SYNTAXES = (ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless)

MEMORY_BYTES = 2**29
"""Address space that a child may take beyond what it has after its imports."""

FILE_LIMIT_S = 10
"""Wall clock that one file may take before it counts as a hang."""

DECODED_FRAMES = 2


@dataclass(frozen=True)
class Seed:
    """A sound file, and where its elements start."""

    head: bytes
    """Preamble and meta header, never mutated in deflated files."""
    body: bytes
    starts: tuple[int, ...]
    """Offsets of the elements within `body`."""
    deflated: bool = False

    def pack(self, body: bytes) -> bytes:
        if not self.deflated:
            return self.head + body
        packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        return self.head + packer.compress(body) + packer.flush()


@cache
def load_seeds() -> tuple[Seed, ...]:
    seeds = [_seed((FILES / name).read_bytes()) for name in REAL_SEEDS]
    pixels = np.random.default_rng(0).integers(0, 4000, (3, 48, 40)).astype(np.uint16)
    made = [transcode(make_enhanced(pixels, [2, 0, 1]), syntax) for syntax in ENHANCED_SYNTAXES]
    made.append(transcode(make_dataset(pixels[0]), JPEGLosslessSV1))
    seeds += [_seed(_to_bytes(dataset)) for dataset in made]
    deflated = make_dataset(pixels[0])
    plain = _seed(_to_bytes(deflated))
    deflated.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    packed = _to_bytes(deflated)
    head = packed[: packed.index(DeflatedExplicitVRLittleEndian.encode()) + len(DeflatedExplicitVRLittleEndian)]
    start = plain.starts[0]
    return (*seeds, Seed(head, plain.body[start:], tuple(at - start for at in plain.starts), deflated=True))


def _to_bytes(dataset: Dataset) -> bytes:
    with BytesIO() as buffer:
        dataset.save_as(buffer, enforce_file_format=True)
        return buffer.getvalue()


def _seed(content: bytes) -> Seed:
    dataset = pydicom.dcmread(BytesIO(content), force=True)
    order = "<" if dataset.original_encoding[1] else ">"
    starts, position = [], 0
    for tag in dataset.keys():  # noqa: SIM118  (a data set yields elements)
        found = content.find(struct.pack(f"{order}HH", tag.group, tag.element), position)
        if found >= 0:
            starts.append(found)
            position = found + 8
    return Seed(b"", content, tuple(starts))


# --- mutations: bytes in, bytes out ----------------------------------------------------------------------------------


def flip(rng, seed):
    body = bytearray(seed.body)
    reach = rng.choice([len(body), 2000])
    for _ in range(rng.randint(1, 8)):
        body[rng.randrange(min(reach, len(body)))] ^= 1 << rng.randrange(8)
    return bytes(body)


def scramble_pixels(rng, seed):
    start = rng.randrange(seed.starts[-1], len(seed.body))
    noise = rng.randbytes(rng.randint(1, 64))
    return seed.body[:start] + noise + seed.body[start + len(noise) :]


def truncate(rng, seed):
    return seed.body[: rng.randrange(len(seed.body))]


def blow_up_length(rng, seed):
    start = rng.choice(seed.starts)
    length = rng.choice([0, 1, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF, rng.getrandbits(32)])
    place, form = rng.choice([(4, "<L"), (6, "<H"), (8, "<L"), (6, ">H"), (8, ">L")])
    raw = struct.pack(form, length & (0xFFFF if form[1] == "H" else 0xFFFFFFFF))
    return seed.body[: start + place] + raw + seed.body[start + place + len(raw) :]


def insert_element(rng, seed):
    start = rng.choice(seed.starts)
    value = rng.randbytes(rng.choice([0, 1, 2, 7, 64, 3000]))
    tag = rng.choice(TAGS)
    element = struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, rng.choice(REPRESENTATIONS), len(value)) + value
    if rng.random() < 0.5:
        element = struct.pack("<HHL", tag >> 16, tag & 0xFFFF, len(value)) + value
    return seed.body[:start] + element + seed.body[start:]


def set_number(rng, seed):
    """Give one of the numbers that decide about memory an extreme value, in whatever layout it is in."""
    tag = rng.choice(SIZE_TAGS)
    raw = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    start = seed.body.find(raw)
    value = rng.choice([0, 1, 2, 7, 8, 32, 64, 255, 32767, 65535])
    if start < 0:
        return insert_element(rng, seed)
    return seed.body[: start + 8] + struct.pack("<H", value) + seed.body[start + 10 :]


def delete_element(rng, seed):
    first = rng.randrange(len(seed.starts) - 1)
    last = min(first + rng.randint(1, 3), len(seed.starts) - 1)
    return seed.body[: seed.starts[first]] + seed.body[seed.starts[last] :]


def repeat_element(rng, seed):
    first = rng.randrange(len(seed.starts) - 1)
    element = seed.body[seed.starts[first] : seed.starts[first + 1]]
    start = rng.choice(seed.starts)
    return seed.body[:start] + element * rng.randint(1, 50) + seed.body[start:]


def swap_representation(rng, seed):
    start = rng.choice(seed.starts) + 4
    return seed.body[:start] + rng.choice(REPRESENTATIONS) + seed.body[start + 2 :]


def nest(rng, seed):
    depth, start = rng.choice([1, 3, 20, 500, 5000]), rng.choice(seed.starts)
    tag = rng.choice([0x00081140, 0x00290010, 0x52009229, 0x52009230])
    opened = struct.pack("<HH2sHL", tag >> 16, tag & 0xFFFF, b"SQ", 0, 0xFFFFFFFF)
    opened += struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    closed = struct.pack("<HHLHHL", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0) * rng.choice([depth, depth, 0, depth // 2])
    return seed.body[:start] + opened * depth + closed + seed.body[start:]


def splice(rng, seed):
    other = rng.choice(load_seeds())
    return seed.body[: rng.choice(seed.starts)] + other.body[rng.choice(other.starts) :]


def noise(rng, seed):
    return bytes(128) + b"DICM" + seed.body[132 : rng.choice([132, 300])] + rng.randbytes(rng.randint(0, 2000))


MUTATIONS = (
    flip,
    scramble_pixels,
    truncate,
    blow_up_length,
    insert_element,
    set_number,
    delete_element,
    repeat_element,
    swap_representation,
    nest,
    splice,
    noise,
)
VR_NAMES = (
    "AE",
    "AS",
    "AT",
    "CS",
    "DA",
    "DS",
    "DT",
    "FD",
    "FL",
    "IS",
    "LO",
    "LT",
    "OB",
    "OW",
    "PN",
    "SH",
    "SQ",
    "UI",
    "UN",
)
REPRESENTATIONS = [name.encode() for name in VR_NAMES]
REPRESENTATIONS += [b"\0\0", b"ZZ", b"ox"]
SIZE_TAGS = [0x00280002, 0x00280008, 0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280102, 0x00280103]
TAGS = [*SIZE_TAGS, 0x00080005, 0x00080018, 0x00100020, 0x00180081, 0x0020000D, 0x00200032, 0x00280030, 0x00291010]
TAGS += [0x00281053, 0x52009229, 0x52009230, 0x7FE00001, 0x7FE00008, 0x7FE00010, 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD]


def mutated(number: int) -> bytes:
    """File of a number: one to three mutations of a seed."""
    rng = random.Random(number)
    seeds = load_seeds()
    seed = seeds[number % len(seeds)]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        body = rng.choice(MUTATIONS)(rng, seed)
        starts = tuple(start for start in seed.starts if start < len(body) - 16)
        if len(starts) < 3:
            return seed.pack(body)
        seed = Seed(seed.head, body, starts, seed.deflated)
    return seed.pack(seed.body)


# --- the child -------------------------------------------------------------------------------------------------------


def outcome(folder: Path, name: str) -> str:
    """Code of a file, as the pipeline would give it; both ways to read its header must agree."""
    rows = index_files(str(folder), [WalkedFile(name)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "read", lambda *_: None)  # the minimal reader leaves every file to pydicom
        assert rows == index_files(str(folder), [WalkedFile(name)])
    for row in [row for row in rows if not row.fault][:DECODED_FRAMES]:
        try:
            decode(folder, row)
        except VolumeError as error:
            return error.code
    return min(row.fault for row in rows) or "converted"


def child(folder: Path, first: int, last: int) -> None:
    """Print ``number code`` of each file; die of an alarm if one takes too long."""
    warnings.simplefilter("ignore")
    for seed in load_seeds():
        (folder / "seed").write_bytes(seed.pack(seed.body))
        outcome(folder, "seed")  # imports decoders
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in range(first, last):
        (folder / "file").write_bytes(mutated(number))
        signal.alarm(FILE_LIMIT_S)
        try:
            code = outcome(folder, "file")
        except BaseException as error:  # decoders written in Rust panic with exceptions that are no Exception
            code = f"raised:{type(error).__name__}"
        signal.alarm(0)
        print(number, code, flush=True)


def fuzz(folder: Path, first: int, last: int) -> dict[int, str]:
    """Run files `first` to `last` through children; a killed one is followed by another."""
    found: dict[int, str] = {}
    while first < last:
        command = [sys.executable, __file__, str(folder), str(first), str(last)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            number, code = line.split()
            found[int(number)] = code
        first = max([first - 1, *found]) + 1
        if done.returncode:
            assert done.returncode < 0, done.stderr[-3000:]
            found[first] = f"killed by {signal.Signals(-done.returncode).name}"
            first += 1
    return found


def assert_all_accounted_for(found: dict[int, str], first: int, last: int) -> None:
    assert sorted(found) == list(range(first, last))
    raised = {number: code for number, code in found.items() if code.startswith("raised")}
    assert not raised, raised
    assert not [number for number, code in found.items() if code.endswith(":MemoryError")], "these allocate too much"
    killed = {number: code for number, code in found.items() if code.startswith("killed")}
    assert not [number for number, code in killed.items() if code == "killed by SIGALRM"], "these files hang"
    assert len(killed) <= max(2, 0.002 * len(found)), killed
    states = Counter(state_of(code) for number, code in found.items() if number not in killed)
    assert min(states["converted"], states["skipped"], states["quarantined"]) > 0.02 * len(found)


def test_every_seed_is_sound(tmp_path):
    for number, seed in enumerate(load_seeds()):
        (tmp_path / str(number)).write_bytes(seed.pack(seed.body))
    codes = [outcome(tmp_path, str(number)) for number in range(len(load_seeds()))]
    assert Counter(codes)["converted"] >= len(codes) - 2, codes


def test_some_mutated_files_are_accounted_for(tmp_path):
    assert_all_accounted_for(fuzz(tmp_path, 0, 400), 0, 400)


@pytest.mark.slow
def test_ten_thousand_mutated_files_are_accounted_for(tmp_path):
    assert_all_accounted_for(fuzz(tmp_path, 400, 10_400), 400, 10_400)


if __name__ == "__main__":
    child(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

"""Every transfer syntax gives the stored values bit for bit, whoever decodes it, or a code that says why not."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dicom_factory import make_dataset, make_series, save, transcode
from hostile_cases import LOSSLESS, LOSSY
from hostile_exam import to_bytes
from hostile_tree import build_hostile_tree
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import (
    HTJ2K,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from preprocess.accounting import QUARANTINED
from preprocess.headers.index import index_files, walk
from preprocess.pipeline import ConvertJob, convert_tree
from preprocess.pixels.volume import VolumeError, decode
from preprocess.store.read import SliceStore

SHAPE = (40, 33)
DEPTHS = {
    "uint8": (np.uint8, 8),
    "uint12": (np.uint16, 12),
    "uint16": (np.uint16, 16),
    "int12": (np.int16, 12),
    "int16": (np.int16, 16),
}
SYNTAXES = {"explicit": ExplicitVRLittleEndian, **LOSSLESS}
COMPRESSED = {name: syntax for name, syntax in LOSSLESS.items() if syntax.is_encapsulated}
TWO_DECODERS = {"rle": RLELossless, "jpeg_ls": JPEGLSLossless, "jpeg_2000": JPEG2000Lossless}
HTJ2K_SYNTAXES = (HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K)


def draw(depth):
    """The whole range of the type, smooth enough to be compressed, both ends included."""
    dtype, bits = DEPTHS[depth]
    low = -(1 << (bits - 1)) if np.dtype(dtype).kind == "i" else 0
    ramp = np.linspace(low, low + (1 << bits) - 1, SHAPE[0] * SHAPE[1]).reshape(SHAPE)
    return ramp.round().astype(dtype)


def image(depth, syntax):
    """A file's worth of one image in a transfer syntax, and its stored values."""
    pixels, bits = draw(depth), DEPTHS[depth][1]
    dataset = make_dataset(pixels, BitsStored=bits, HighBit=bits - 1)
    return transcode(dataset, syntax), pixels


def read_back(folder, dataset):
    folder.joinpath("image").write_bytes(to_bytes(dataset))
    (row,) = index_files(str(folder), list(walk(folder)))
    assert not row.fault
    return decode(folder, row).pixels_HW


@pytest.fixture
def decoders(monkeypatch):
    """Leave only some of a syntax's decoders; the others fail as often as they are asked."""

    def fail(source, runner):
        msg = "this decoder fails"
        raise ValueError(msg)

    def leave(syntax, *names):
        available = get_decoder(syntax)._available
        for name in set(available) - set(names):
            monkeypatch.setitem(available, name, fail)

    return leave


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
def test_lossless_syntaxes_give_the_stored_values(tmp_path, syntax, depth):
    dataset, pixels = image(depth, syntax)
    decoded = read_back(tmp_path, dataset)
    np.testing.assert_array_equal(decoded, pixels)
    assert decoded.dtype == pixels.dtype
    assert decoded.dtype.isnative


@pytest.mark.parametrize("depth", ["uint8", "uint12", "uint16", "int16"])
@pytest.mark.parametrize("syntax", HTJ2K_SYNTAXES, ids=lambda syntax: syntax.rpartition(".")[2])
def test_high_throughput_jpeg_2000_gives_the_stored_values(tmp_path, syntax, depth):
    data = np.load(Path(__file__).parent / "data" / "htj2k.npz")
    bits = DEPTHS[depth][1]
    dataset = make_dataset(data[depth], BitsStored=bits, HighBit=bits - 1)
    dataset.PixelData, dataset.file_meta.TransferSyntaxUID = encapsulate([data[f"{depth}_stream"].tobytes()]), syntax
    np.testing.assert_array_equal(read_back(tmp_path, dataset), data[depth])


@pytest.mark.parametrize("depth", ["uint8", "uint16", "int16"])
@pytest.mark.parametrize("name", TWO_DECODERS)
def test_each_of_several_decoders_takes_over_where_the_others_fail(tmp_path, decoders, monkeypatch, name, depth):
    dataset, pixels = image(depth, TWO_DECODERS[name])
    available = get_decoder(TWO_DECODERS[name]).available_plugins
    assert len(available) >= 2
    for survivor in available:
        decoders(TWO_DECODERS[name], survivor)
        np.testing.assert_array_equal(read_back(tmp_path, dataset), pixels, err_msg=survivor)
        monkeypatch.undo()


@pytest.mark.parametrize("syntax", COMPRESSED.values(), ids=COMPRESSED)
def test_where_all_decoders_fail_the_file_is_at_fault(tmp_path, decoders, syntax):
    dataset, _ = image("uint12", syntax)
    decoders(syntax)
    with pytest.raises(VolumeError, match="decode_error"):
        read_back(tmp_path, dataset)


@pytest.mark.parametrize("syntax", COMPRESSED.values(), ids=COMPRESSED)
def test_a_syntax_without_any_decoder_names_what_to_install(tmp_path, monkeypatch, syntax):
    dataset, _ = image("uint12", syntax)
    for name in get_decoder(syntax).available_plugins:
        monkeypatch.delitem(get_decoder(syntax)._available, name)
    with pytest.raises(VolumeError, match="transfer_syntax"):
        read_back(tmp_path, dataset)
    assert "pip install 'lbp_ray[codecs]'" in QUARANTINED["transfer_syntax"]


WITHOUT_CODECS = """
import sys
sys.modules |= dict.fromkeys(["gdcm", "jpeg_ls", "pylibjpeg", "openjpeg", "rle", "PIL"])
from preprocess.__main__ import main
sys.exit(main([*sys.argv[1:], "--num-cpus", "0", "--max-quarantine", "1"]))
"""


def test_an_installation_without_codecs_converts_the_rest_and_says_so(tmp_path):
    tree = build_hostile_tree(tmp_path / "dicom", cases=["plain", "rle", "jpeg_ls", "jpeg_2000", "jpeg_lossless"])
    out = tmp_path / "x.zarr"
    command = [sys.executable, "-c", WITHOUT_CODECS, str(tree.root), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "transfer_syntax: no decoder for this compression: pip install 'lbp_ray[codecs]'" in done.stdout
    # pydicom itself decodes RLE.
    assert len(SliceStore.open(out)) == 2


@pytest.mark.parametrize("kept", [0.9, 0.97])
@pytest.mark.parametrize("syntax", COMPRESSED.values(), ids=COMPRESSED)
def test_a_cut_codestream_is_an_error_whoever_decodes_it(tmp_path, decoders, monkeypatch, syntax, kept):
    dataset, _ = image("uint12", syntax)
    stream = next(generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = encapsulate([stream[: int(kept * len(stream))]])
    for survivor in get_decoder(syntax).available_plugins:
        decoders(syntax, survivor)
        with pytest.raises(VolumeError, match=r"decode_error|truncated"):
            read_back(tmp_path, dataset)
        monkeypatch.undo()


@pytest.mark.parametrize("shape", [(16, 33), (40, 64), (33, 40), (64, 64)], ids=str)
@pytest.mark.parametrize("name", COMPRESSED)
def test_a_stream_of_another_size_is_an_error_whoever_decodes_it(tmp_path, decoders, monkeypatch, name, shape):
    """Some native decoders end the process on it, others return the pixels of somewhere else."""
    dataset, _ = image("uint12", COMPRESSED[name])
    if name == "jpeg_2000":
        shape = tuple(max(32, size) for size in shape)
    other = transcode(make_dataset(np.resize(draw("uint12"), shape), BitsStored=12, HighBit=11), COMPRESSED[name])
    dataset.PixelData = other.PixelData
    for survivor in get_decoder(COMPRESSED[name]).available_plugins:
        if name == "rle" and np.prod(shape) == np.prod(SHAPE):
            continue  # the format states no size: only the number of pixels tells
        decoders(COMPRESSED[name], survivor)
        with pytest.raises(VolumeError, match="decode_error"):
            read_back(tmp_path, dataset)
        monkeypatch.undo()


def test_a_high_throughput_stream_of_another_size_is_an_error(tmp_path):
    data = np.load(Path(__file__).parent / "data" / "htj2k.npz")
    dataset = make_dataset(data["uint12"].T, BitsStored=12, HighBit=11)
    dataset.PixelData = encapsulate([data["uint12_stream"].tobytes()])
    dataset.file_meta.TransferSyntaxUID = HTJ2KLossless
    with pytest.raises(VolumeError, match="decode_error"):
        read_back(tmp_path, dataset)


@pytest.mark.parametrize("syntax", LOSSY.values(), ids=LOSSY)
def test_lossy_images_are_converted_and_marked(tmp_path, syntax):
    paths, _ = make_series(tmp_path / "dicom", shape=(5, 40, 40))
    for path in paths:
        dataset = transcode(make_dataset(draw("uint12"), number=paths.index(path)), syntax)
        dataset.ImagePositionPatient = [4.0 * paths.index(path), 0, 0]
        save(dataset, path)
    convert_tree(ConvertJob(tmp_path / "dicom", tmp_path / "x.zarr"))
    store = SliceStore.open(tmp_path / "x.zarr")
    (row,) = store.manifest.to_dict("records")
    assert row["lossy"]
    np.testing.assert_array_equal(store.read(row["series_id"])[0], pixel_array(paths[0], raw=True))


def test_lossless_images_are_not_marked(tmp_path):
    tree = build_hostile_tree(tmp_path / "dicom", cases=["jpeg_ls"])
    convert_tree(ConvertJob(tree.root, tmp_path / "x.zarr"))
    assert not SliceStore.open(tmp_path / "x.zarr").manifest["lossy"].any()

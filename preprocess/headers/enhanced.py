"""Enhanced multi-frame images: what the functional groups say of each frame, in the terms of single-frame headers.

Every element is put under the tag that a single-frame image has for the same fact, so that selection, geometry and
stacking need not know where it came from. The groups decide, never the frame number or the SOP class.

References
----------
DICOM PS3.3, C.7.6.16 (multi-frame functional groups) and C.8.13 (enhanced MR image).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pydicom
from pydicom.tag import Tag

from preprocess.headers.reader import element_value

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_FRAMES = 65_535
"""Frames of the longest image that is read at all; a header that promises more is broken or hostile."""

MAX_FRAME_BYTES = 2**18
"""Header bytes per promised frame; those of scanners have some thousand."""

MAX_ITEMS = 500_000
"""Items of all sequences in the functional groups of one file; some 50 per frame are usual."""

CONVERTED_ELEMENTS = {
    name: name
    for name in (
        "EchoTime",
        "RepetitionTime",
        "InversionTime",
        "EchoTrainLength",
        "EchoNumbers",
        "FlipAngle",
        "ScanningSequence",
        "SequenceVariant",
        "ScanOptions",
        "NumberOfAverages",
        "PixelBandwidth",
        "AcquisitionNumber",
        "TemporalPositionIdentifier",
        "DiffusionBValue",
    )
}
"""Single-frame elements that objects converted to multi-frame keep as they were."""

MACROS: dict[str, dict[str, str]] = {
    "MRImageFrameTypeSequence": {"FrameType": "ImageType", "ComplexImageComponent": "ComplexImageComponent"},
    "MRTimingAndRelatedParametersSequence": {
        "RepetitionTime": "RepetitionTime",
        "FlipAngle": "FlipAngle",
        "RFEchoTrainLength": "EchoTrainLength",
        "EchoTrainLength": "EchoTrainLength",
    },
    "MREchoSequence": {"EffectiveEchoTime": "EchoTime"},
    "MRModifierSequence": {
        "InversionTimes": "InversionTime",
        "InversionRecovery": "InversionRecovery",
        "SpectrallySelectedExcitation": "SpectrallySelectedExcitation",
    },
    "MRImagingModifierSequence": {"PixelBandwidth": "PixelBandwidth"},
    "MRAveragesSequence": {"NumberOfAverages": "NumberOfAverages"},
    "MRDiffusionSequence": {"DiffusionBValue": "DiffusionBValue"},
    "ContrastBolusUsageSequence": {"ContrastBolusAgentAdministered": "ContrastBolusAgentAdministered"},
    "FrameContentSequence": {
        "TemporalPositionIndex": "TemporalPositionIdentifier",
        "FrameAcquisitionNumber": "AcquisitionNumber",
        "FrameAcquisitionDateTime": "FrameAcquisitionDateTime",
    },
    "PlanePositionSequence": {"ImagePositionPatient": "ImagePositionPatient"},
    "PlaneOrientationSequence": {"ImageOrientationPatient": "ImageOrientationPatient"},
    "PixelMeasuresSequence": {"PixelSpacing": "PixelSpacing", "SliceThickness": "SliceThickness"},
    "PixelValueTransformationSequence": {
        "RescaleSlope": "RescaleSlope",
        "RescaleIntercept": "RescaleIntercept",
    },
    "UnassignedSharedConvertedAttributesSequence": CONVERTED_ELEMENTS,
    "UnassignedPerFrameConvertedAttributesSequence": CONVERTED_ELEMENTS,
}
"""Functional group → its element → the element of single-frame images that says the same. Later entries win."""

SEQUENCE_CODES = (
    ("EchoPulseSequence", {"SPIN", "BOTH"}, "SE"),
    ("MultipleSpinEcho", {"YES"}, "SE"),
    ("EchoPulseSequence", {"GRADIENT", "BOTH"}, "GR"),
    ("InversionRecovery", {"YES"}, "IR"),
    ("EchoPlanarPulseSequence", {"YES"}, "EP"),
)
"""Element, its values, and the ScanningSequence code that says the same."""

SUPPRESSION_CODES = (
    ("SpectrallySelectedSuppression", {"FAT", "FAT_AND_WATER"}, "FS"),
    ("SpectrallySelectedExcitation", {"WATER"}, "FS"),
)
"""Element, its values, and the ScanOptions code that says the same; exciting water alone leaves fat dark."""

SHARED, PER_FRAME = Tag("SharedFunctionalGroupsSequence"), Tag("PerFrameFunctionalGroupsSequence")
_MACROS = {Tag(name): {Tag(a): Tag(b) for a, b in elements.items()} for name, elements in MACROS.items()}
_TOP = (
    "EchoPulseSequence",
    "MultipleSpinEcho",
    "EchoPlanarPulseSequence",
    "SpectrallySelectedSuppression",
    "ComplexImageComponent",
    "AcquisitionDateTime",
    "ContrastBolusAgentSequence",
)
TOP_TAGS = (SHARED, PER_FRAME, *(Tag(name) for name in _TOP))
"""Elements of the top level that are read for enhanced images only."""

_ANATOMY = Tag("AnatomicRegionSequence")
_ITEM = b"\xfe\xff\x00\xe0"
_ZONE = re.compile(r"[+-]")


class FrameError(ValueError):
    """The promised number of frames and the functional groups do not fit together."""


def is_enhanced(header: pydicom.Dataset) -> bool:
    """Whether a header describes its frames in functional groups."""
    return SHARED in header or PER_FRAME in header


def frame_values(header: pydicom.Dataset, values: Mapping[int, Any]) -> list[dict[int, Any]]:
    """Give every frame the values that a single-frame image would have.

    Parameters
    ----------
    header
        Header with functional groups.
    values
        Tag → value of the top level, as `preprocess.headers.reader.element_value` gives it.

    Returns
    -------
    list of dict
        One per frame in stored order: top level, overridden by shared groups, overridden by the frame's own.

    Raises
    ------
    FrameError
        If the frames promised are more than `MAX_FRAMES`, or not those that are described.
    """
    frames = _described_frames(header, values.get(Tag("NumberOfFrames")))
    top = dict(values) | {tag: element_value(header, tag) for tag in TOP_TAGS[2:]} | _contrast_agent(header)
    for shared in _items(header, SHARED)[:1]:
        top |= _flatten(shared)
    return [_as_single(top | _flatten(frame)) for frame in frames]


def _described_frames(header: pydicom.Dataset, promised: Any) -> list[pydicom.Dataset]:  # noqa: ANN401
    """Return the groups of every frame; a single frame may have none of its own."""
    try:
        number = 1 if promised is None else int(str(promised))
    except ValueError:
        number = 0
    raw = _raw(header, PER_FRAME)
    if not 1 <= number <= MAX_FRAMES or len(raw) > number * MAX_FRAME_BYTES:
        msg = f"1 to {MAX_FRAMES} frames of at most {MAX_FRAME_BYTES} bytes are read, found {number} in {len(raw)}"
        raise FrameError(msg)
    if max(raw.count(_ITEM), _raw(header, SHARED).count(_ITEM)) > MAX_ITEMS:
        msg = f"functional groups of more than {MAX_ITEMS} items"
        raise FrameError(msg)
    frames = _items(header, PER_FRAME) or [pydicom.Dataset()]
    if len(frames) != number:
        msg = f"{number} frames are promised, {len(frames)} are described"
        raise FrameError(msg)
    return frames


def _raw(header: pydicom.Dataset, tag: int) -> bytes:
    """Bytes of a sequence that is not parsed yet; empty if it is, or is absent."""
    value = getattr(header.get_item(tag), "value", None)
    return value if isinstance(value, bytes) else b""


def _items(dataset: pydicom.Dataset, tag: int) -> list[pydicom.Dataset]:
    items = element_value(dataset, tag)
    return list(items) if isinstance(items, pydicom.Sequence) else []


def _flatten(groups: pydicom.Dataset) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for macro, elements in _MACROS.items():
        for item in _items(groups, macro)[:1]:
            read = {classic: element_value(item, tag) for tag, classic in elements.items() if tag in item}
            found |= {tag: value for tag, value in read.items() if value not in (None, "")}
    region = _code_meaning(_items(groups, Tag("FrameAnatomySequence"))[:1], _ANATOMY)
    return found | ({_ANATOMY: region} if region else {})


def _code_meaning(datasets: list[pydicom.Dataset], tag: int) -> str:
    """Return the meaning of the first coded concept, or an empty text."""
    concepts = [concept for dataset in datasets for concept in _items(dataset, tag)]
    return str(element_value(concepts[0], Tag("CodeMeaning")) or "") if concepts else ""


def _contrast_agent(header: pydicom.Dataset) -> dict[int, Any]:
    agent = _code_meaning([header], Tag("ContrastBolusAgentSequence"))
    return {Tag("ContrastBolusAgent"): agent} if agent else {}


def _as_single(values: dict[int, Any]) -> dict[int, Any]:
    """Say in single-frame elements what enhanced images say in elements of their own."""
    component = _text(values, "ComplexImageComponent")
    if component not in {"", "MAGNITUDE", "MIXED"}:
        values[Tag("ImageType")] = "\\".join([*_texts(values, "ImageType"), component])
    for name, rules in (("ScanningSequence", SEQUENCE_CODES), ("ScanOptions", SUPPRESSION_CODES)):
        codes = [code for element, said, code in rules if _text(values, element) in said]
        values[Tag(name)] = "\\".join(dict.fromkeys([*_texts(values, name), *codes]))
    if not _text(values, "AcquisitionDate"):
        moment = _text(values, "AcquisitionDateTime") or _text(values, "FrameAcquisitionDateTime")
        values |= {Tag("AcquisitionDate"): moment[:8], Tag("AcquisitionTime"): _ZONE.split(moment[8:])[0]}
    if _text(values, "ContrastBolusAgentAdministered") == "NO":
        values[Tag("ContrastBolusAgent")] = ""
    if not _text(values, "BodyPartExamined"):
        values[Tag("BodyPartExamined")] = values.get(_ANATOMY, "")
    return values


def _text(values: dict[int, Any], name: str) -> str:
    value = values.get(Tag(name))
    return "" if value is None else str(value).strip(" \0")


def _texts(values: dict[int, Any], name: str) -> list[str]:
    value = values.get(Tag(name)) or ()
    return value.split("\\") if isinstance(value, str) else [str(part) for part in value]

"""A DICOM tree with every breakage of `hostile_cases`, laid out in any number of ways.

Content comes first, names, folders and order of creation afterwards.
"""

from __future__ import annotations

import os
import random
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hostile_cases import CASES
from hostile_exam import Entry, Exam, make_enhanced
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np

__all__ = ["HostileTree", "build_hostile_tree", "make_enhanced"]


@dataclass(frozen=True)
class HostileTree:
    """A tree on disk, and what must become of it."""

    root: Path
    expected: dict[str, str]
    """Path relative to the root (surrogate-escaped) → code."""
    volumes: dict[tuple[str, str], np.ndarray]
    """(study UID, series UID) → (S, H, W) canonical stored values; nothing else may be in the store."""
    case_of: dict[str, str]
    """Path → name of the case."""


def build_hostile_tree(root: Path, *, shuffle_seed: int | None = None, cases: list[str] | None = None) -> HostileTree:
    """Write the tree.

    Parameters
    ----------
    root
        Made here; must not exist.
    shuffle_seed
        None: a folder per case and files in order. Else: names, folders, instance numbers and the order of creation
        are drawn from this seed, the contents that matter are the same.
    cases
        Names of `CASES`; None writes all.
    """
    with disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of much that is done here on purpose
        return _build(root, random.Random(shuffle_seed) if shuffle_seed is not None else None, cases or list(CASES))


def _build(root: Path, shuffle: random.Random | None, cases: list[str]) -> HostileTree:
    expected, volumes, case_of = {}, {}, {}
    placed: list[tuple[str, Entry]] = []
    for name in cases:
        exam = Exam(name)
        CASES[name](exam)
        volumes |= exam.volumes
        paths = list(_paths(exam, shuffle))
        placed += zip(paths, exam.entries, strict=True)
        case_of |= dict.fromkeys(paths, name)
        expected |= _codes(paths, exam.entries)
    if shuffle:
        shuffle.shuffle(placed)
    for path, entry in placed:
        if shuffle and isinstance(entry.content, Dataset) and "InstanceNumber" in entry.content:
            entry.content.InstanceNumber = shuffle.randrange(10_000)
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        entry.write(target)
    return HostileTree(root, expected, volumes, case_of)


def _paths(exam: Exam, shuffle: random.Random | None) -> Iterator[str]:
    for number, entry in enumerate(exam.entries):
        name = os.fsdecode(entry.name) or f"IM{number:04d}"
        if shuffle is None:
            yield f"{exam.patient}/{name}"
            continue
        folders = [f"d{shuffle.randrange(6)}" for _ in range(shuffle.randrange(4))]
        yield "/".join([*folders, f"{shuffle.getrandbits(64):016x}{shuffle.choice(['', '.dcm', '.IMA', '.zip'])}"])


def _codes(paths: list[str], entries: list[Entry]) -> dict[str, str]:
    codes = {path: entry.code for path, entry in zip(paths, entries, strict=True)}
    groups: dict[str, list[str]] = {}
    for path, entry in zip(paths, entries, strict=True):
        if entry.twins:
            groups.setdefault(entry.twins, []).append(path)
    for twins in groups.values():
        codes |= {path: "duplicate" if number else "converted" for number, path in enumerate(sorted(twins))}
    return codes

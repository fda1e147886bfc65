"""Header rows of one study → stacks: parallel slices that agree in everything a volume may not mix.

A series is no stack: scanners and archives put localizer planes, echoes, phases and repeats under one series id.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from preprocess.commit import canonical_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from preprocess.headers.index import FileRow

PARALLEL_DEG = 0.5
"""Slices whose row and column directions differ by less belong to one orientation."""


@dataclass(frozen=True)
class Stack:
    """Parallel slices of one series that agree in everything a stack may not mix."""

    study_uid: str
    series_uid: str
    key: str
    """Canonical JSON of what distinguishes the stack within its series."""
    rows: tuple[FileRow, ...]
    """One per image (object, or frame of a multi-frame object), sorted by object id and frame."""
    duplicates: tuple[FileRow, ...] = ()
    """Further files that claim one of the objects; the pixels decide whether they are equal."""
    num_echoes: int = 1
    """Echo times among the otherwise equal stacks of the series."""
    incomplete: bool = False
    """A quarantined image of the series may be one of its slices."""


def make_stacks(rows: Sequence[FileRow], settled: list[tuple[FileRow, str]]) -> list[Stack]:
    """Split the rows of one study into stacks.

    Parameters
    ----------
    rows
        Rows with valid geometry.
    settled
        Gets the rows of objects claimed by files that contradict each other, with their code.

    Returns
    -------
    list of Stack
        Sorted by series and key.
    """
    objects: dict[str, list[FileRow]] = defaultdict(list)
    for row in rows:
        objects[_image_name(row)].append(row)
    unique: dict[str, list[FileRow]] = defaultdict(list)
    copies: dict[str, list[FileRow]] = {}
    for name, members in objects.items():
        if len({_identity(row) for row in members}) > 1:
            settled += [(row, "conflicting_duplicate") for row in members]
            continue
        unique[members[0].series_uid].append(members[0])
        copies[name] = members[1:]
    stacks = [stack for members in unique.values() for stack in _split_series(members, copies)]
    return sorted(stacks, key=lambda stack: (stack.series_uid, stack.key))


def _image_name(row: FileRow) -> str:
    return f"{row.sop_uid or 'path:' + row.path}#{row.frame}"


def _identity(row: FileRow) -> tuple[object, ...]:
    return (row.series_uid, row.position_mm, row.orientation, _facets(row))


def _facets(row: FileRow) -> tuple[object, ...]:
    """Gather what slices of one stack must share, besides orientation and echo time."""
    spacing = tuple(round(value, 4) for value in row.spacing_mm)
    return (row.rows, row.columns, spacing, row.image_type, row.temporal_position, row.b_value)


def _echo(row: FileRow) -> tuple[float | None, float | None]:
    return (None if row.echo_time_ms is None else round(row.echo_time_ms, 1), row.echo_number)


def _split_series(rows: list[FileRow], copies: dict[str, list[FileRow]]) -> list[Stack]:
    orientation_of = _orientation_clusters({row.orientation for row in rows})
    groups: dict[tuple[object, ...], list[FileRow]] = defaultdict(list)
    for row in rows:
        groups[orientation_of[row.orientation], _facets(row), _echo(row)].append(row)
    echoes: dict[tuple[object, ...], set[object]] = defaultdict(set)
    for orientation, facets, echo in groups:
        echoes[orientation, facets].add(echo)
    stacks = []
    for (orientation, facets, echo), members in groups.items():
        for acquisition, part in _split_repeats(members).items():
            key = canonical_json([orientation, facets, echo, acquisition])
            twins = [twin for row in part for twin in copies.get(_image_name(row), [])]
            stacks.append(
                Stack(
                    part[0].study_uid,
                    part[0].series_uid,
                    key,
                    tuple(part),
                    duplicates=tuple(twins),
                    num_echoes=len(echoes[orientation, facets]),
                )
            )
    return stacks


def _split_repeats(rows: list[FileRow]) -> dict[float | None, list[FileRow]]:
    """Split by acquisition number, but only where positions repeat: some scanners number every slice.

    Where the number does not tell the passes apart, the stack stays whole for its error.
    """
    passes = max(Counter(row.position_mm for row in rows).values())
    if passes == 1:
        return {None: rows}
    parts: dict[float | None, list[FileRow]] = defaultdict(list)
    for row in rows:
        parts[row.acquisition_number].append(row)
    apart = all(len({row.position_mm for row in part}) == len(part) for part in parts.values())
    return dict(parts) if apart and len(parts) == passes else {None: rows}


def _orientation_clusters(orientations: set[tuple[float, ...]]) -> dict[tuple[float, ...], int]:
    """Give each direction the number of its cluster, by the order of the cosines (not of the files)."""
    centres: list[tuple[float, ...]] = []
    cluster_of = {}
    smallest_cosine = np.cos(np.radians(PARALLEL_DEG))
    for orientation in sorted(orientations):
        for number, centre in enumerate(centres):
            cosines = np.sum(np.reshape(centre, (2, 3)) * np.reshape(orientation, (2, 3)), axis=1)
            # Cosines as written may be a little short of unit length.
            if np.all(cosines / _lengths(centre) / _lengths(orientation) >= smallest_cosine):
                cluster_of[orientation] = number
                break
        else:
            cluster_of[orientation] = len(centres)
            centres.append(orientation)
    return cluster_of


def _lengths(orientation: tuple[float, ...]) -> np.ndarray:
    return np.asarray(np.linalg.norm(np.reshape(orientation, (2, 3)), axis=1))

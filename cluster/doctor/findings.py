"""What a judge says, and the words that judges share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

SHOWN_NODES = 4
"""Nodes that a finding names before it counts the rest."""


class Finding(NamedTuple):
    """One thing that is wrong."""

    level: Literal["blocker", "warning"]
    """A blocker makes a study fail or its result invalid."""
    check: str
    nodes: tuple[str, ...]
    """Empty where it is not about single nodes."""
    found: str
    cause: str
    fix: str


def named(nodes: Iterable[str]) -> str:
    """Name some nodes and count the rest."""
    names = list(nodes)
    rest = len(names) - SHOWN_NODES
    return ", ".join(names[:SHOWN_NODES]) + (f" and {rest} more" if rest > 0 else "")


def camps(values: Mapping[str, Hashable]) -> list[tuple[Hashable, tuple[str, ...]]]:
    """Group nodes by what they say, the largest group first.

    Parameters
    ----------
    values
        Node → value.
    """
    groups: dict[Hashable, list[str]] = {}
    for node, value in values.items():
        groups.setdefault(value, []).append(node)
    return sorted(((value, tuple(nodes)) for value, nodes in groups.items()), key=lambda item: -len(item[1]))


def gigabytes(amount: float) -> str:
    """Write bytes in GB with one digit after the point."""
    return f"{amount / 1e9:.1f} GB"

"""What every file to link has in common: keys that are looked up, and rows that are written again without them."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np

    from preprocess.link.resolve import Book

Item = TypeVar("Item")

CHUNK_ROWS = 65_536
"""Rows of a file in memory at a time."""


class LinkError(ValueError):
    """A file that cannot be linked at all."""


class Source(Protocol):
    """A file, or a folder of files, that was read once."""

    @property
    def name(self) -> str:
        """As reported."""

    @property
    def out_name(self) -> str:
        """Of the linked file."""

    @property
    def keys(self) -> Any:  # noqa: ANN401  (Arrow table)
        """Table of `preprocess.link.resolve.KEYS`."""

    @property
    def lines(self) -> Iterable[int]:
        """Line, image or file number of every row."""

    def translate(self, book: Book, out: TextIO) -> np.ndarray:
        """Write what links; return the number in `preprocess.link.resolve.CODES` of every row."""


def in_chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield lists of `CHUNK_ROWS` items; the last may have fewer."""
    remaining = iter(items)
    while chunk := list(islice(remaining, CHUNK_ROWS)):
        yield chunk

"""Where many calls of one function run: here, or wherever another mapper takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Item = TypeVar("Item")
Result = TypeVar("Result")


class TaskFailure:
    """Stands for the result of a task whose process died on every attempt."""


class Mapper(Protocol):
    """Runs one function over many items."""

    def __call__(
        self, function: Callable[[Item], Result], items: Sequence[Item], *, names: Sequence[str], title: str
    ) -> Iterator[tuple[int, Result | TaskFailure]]:
        """Yield (index of the item, result) in any order.

        Parameters
        ----------
        function
            Importable function of one item.
        items
            What it is called with.
        names
            One task name per item, free of identifiers.
        title
            Heads the progress bar.
        """


def map_here(
    function: Callable[[Item], Result], items: Sequence[Item], *, names: Sequence[str], title: str
) -> Iterator[tuple[int, Result | TaskFailure]]:
    """Run every item in this process, in order: the mapper without Ray."""
    del names, title
    for index, item in enumerate(items):
        yield index, function(item)

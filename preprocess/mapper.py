"""Where many calls of one function run: here, or wherever another mapper takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Item = TypeVar("Item")
Result = TypeVar("Result")


class TaskFailure:
    """Stands for the result of a task whose process died on every attempt."""


class Mapper(Protocol):
    """Runs one function over many items, of which only those in flight are held."""

    def __call__(
        self,
        function: Callable[[Item], Result],
        items: Iterable[tuple[str, Item]],
        *,
        title: str,
        total: int,
        unit: str = "task",
        size: Callable[[Item], int] | None = None,
    ) -> Iterator[tuple[Item, Result | TaskFailure]]:
        """Yield (item, result) in any order.

        Parameters
        ----------
        function
            Importable function of one item.
        items
            Task name, free of identifiers, and what the function is called with; drawn as tasks can be taken on.
        title
            Heads the progress bar.
        total
            Length of the progress bar, in units; it may turn out wrong without harm.
        unit
            What the bar counts, e.g. ``file``.
        size
            Units of one item; None counts items.
        """


def map_here(
    function: Callable[[Item], Result],
    items: Iterable[tuple[str, Item]],
    *,
    title: str,
    total: int,
    unit: str = "task",
    size: Callable[[Item], int] | None = None,
) -> Iterator[tuple[Item, Result | TaskFailure]]:
    """Run every item in this process, in order: the mapper without Ray."""
    with tqdm(total=total, desc=title, unit=unit, smoothing=0.1, disable=None) as bar:
        for _, item in items:
            yield item, function(item)
            bar.update(1 if size is None else size(item))

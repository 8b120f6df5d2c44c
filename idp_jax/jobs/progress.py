"""Progress of anything slow: libraries say how far they are, commands decide whether it is shown.

A library function takes a `Progress` and knows no terminal; the default says nothing. Commands pass
`Bars`, which process 0 alone draws.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

T = TypeVar("T")
console = Console(stderr=True)


class Progress:
    """Says nothing; the base of those that do."""

    def bar(self, description: str, unit: str = "") -> AbstractContextManager[Callable[..., None]]:
        """A context whose `update(done, total, note="")` says how far the work is."""
        del description, unit
        return _silent()

    def track(self, items: Iterable[T], description: str) -> Iterator[T]:
        """Iterates over a sized iterable, with a bar."""
        total = len(items)  # type: ignore[arg-type]
        with self.bar(description) as update:
            update(0, total)
            for number, item in enumerate(items, 1):
                yield item
                update(number, total)

    def tracker(self, description: str) -> Callable[[Any], Iterator]:
        """`track` with its description filled in, for functions that wrap an iteration."""
        return lambda items: self.track(items, description)


SILENT = Progress()


@contextmanager
def _silent() -> Iterator[Callable[..., None]]:
    yield lambda done, total, note="": None


class Bars(Progress):
    """Bars with the remaining time, on standard error, drawn by process 0."""

    @contextmanager
    def bar(self, description: str, unit: str = "") -> Iterator[Callable[..., None]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with RichProgress(*columns, console=console, disable=not _is_first_process()) as progress:
            task = progress.add_task(description, total=None, note="")

            def update(done: int, total: int, note: str = "") -> None:
                progress.update(task, completed=done, total=total, note=note)

            yield update


def _is_first_process() -> bool:
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0

"""Progress bars with the remaining time, on process 0 only, and silent where nobody looks."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
console = Console(stderr=True)


def _is_first_process() -> bool:
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0


@contextmanager
def bar(description: str, unit: str = "") -> Iterator[Callable[..., None]]:
    """A bar that is moved by `update(done, total, note="")`."""
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
    with Progress(*columns, console=console, disable=not _is_first_process()) as progress:
        task = progress.add_task(description, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            progress.update(task, completed=done, total=total, note=note)

        yield update


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterates with a bar."""
    total = len(items) if total is None else total  # type: ignore[arg-type]
    with bar(description) as update:
        update(0, total)
        for number, item in enumerate(items, 1):
            yield item
            update(number, total)


def tracker(description: str) -> Callable[[Any], Iterator]:
    """`track` with its description filled in, for functions that take a `progress` wrapper."""
    return lambda items: track(items, description)

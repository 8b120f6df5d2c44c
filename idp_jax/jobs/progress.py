"""Progress of anything slow: libraries say how far they are, commands decide whether it is shown.

A library function takes a `Progress` and knows no terminal; the default says nothing. Commands pass
`Bars`, which process 0 alone draws. Whoever says how far the work is may be interrupted there.
"""

import datetime
import sys
import time
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

from idp_jax.jobs import signals

T = TypeVar("T")
WIDTH = 100  # columns of what is printed at most, and where nothing says how wide a terminal is
# Names of files and models are no markup.
console = Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH, markup=False)
_LINE_EVERY = 30.0  # seconds, where there is no terminal


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
    """Bars with the remaining time, on standard error; without a terminal a line now and then.

    Process 0 alone draws. Every update is a check point, see `signals.check`.
    """

    @contextmanager
    def bar(self, description: str, unit: str = "") -> Iterator[Callable[..., None]]:
        signals.check()
        with _drawn(description, unit) as draw:

            def update(done: int, total: int, note: str = "") -> None:
                draw(done, total, note)
                signals.check()

            yield update


@contextmanager
def _drawn(description: str, unit: str) -> Iterator[Callable[..., None]]:
    if not is_first_process():
        yield lambda done, total, note: None
        return
    if not console.is_terminal:
        yield _Lines(description)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=console) as progress:
        task = progress.add_task(description, total=None, note="")
        yield lambda done, total, note: progress.update(
            task, completed=done, total=total, note=note
        )


class _Lines:
    """What a log shall hold of a bar: a plain line every half minute."""

    def __init__(self, description: str):
        self.description = description
        self.started = self.written = time.monotonic()
        self.first: int | None = None  # what was done before

    def __call__(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = done
        if now - self.written < _LINE_EVERY:
            return
        self.written, elapsed = now, now - self.started
        left = "?"
        if done > self.first:
            left = clock(elapsed / (done - self.first) * (total - done))
        print(
            f"{self.description}: {done}/{total}, {clock(elapsed)} elapsed, {left} left"
            f"{', ' + note if note else ''}",
            file=sys.stderr,
            flush=True,
        )


def expecting(
    update: Callable[..., None], doing: str, unit: str, say: Callable[[str], None]
) -> Callable[..., None]:
    """`update`, which once says how long all will take, as soon as that can be known.

    The first call is the start, the second ends what compiles, the two behind it are measured.
    """
    seen: list[tuple[int, float]] = []

    def timed(done: int, total: int, note: str = "") -> None:
        if len(seen) < 4 and (not seen or done > seen[-1][0]):
            seen.append((done, time.monotonic()))
            if len(seen) == 4:
                (first, began), (last, now) = seen[1], seen[3]
                left = (now - began) / (last - first) * (total - done)
                say(f"{doing}: about {clock(left)} left for {total - done:,} {unit}")
        update(done, total, note)

    return timed


def clock(seconds: float) -> str:
    """A time as hours, minutes and seconds."""
    return str(datetime.timedelta(seconds=round(seconds)))


def counted(number: int, what: str) -> str:
    """A number of things in words: 1 seed, 2 seeds."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def is_first_process() -> bool:
    """Whether this process speaks for its job; asked when the job is joined."""
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0

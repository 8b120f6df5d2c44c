"""Where a run's numbers go, step by step."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TextIO

from idp_jax.jobs.files import write_text

TIMINGS = ("tokens_per_second", "mfu")
"""What depends on the clock: two equal runs differ in it."""


class Sink(Protocol):
    """Takes the numbers of every step, in order; used by process 0 alone."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes what was measured at a step; a step may be written in several parts."""
        ...

    def drop_after(self, step: int) -> None:
        """Forgets later steps: a run that goes on from its checkpoint writes them again."""
        ...

    def close(self) -> None:
        """Lets go of what is held open."""
        ...


class JsonLines:
    """A file with one JSON object a line: the step and its values; null where one is not finite.

    A line is in the file when `write` returns, so that a run that is killed loses none. What the
    clock says is left to a file of its own, so that equal runs write equal metrics.

    Args:
        timings: take what the clock says, and nothing else.
    """

    def __init__(self, path: str | Path, *, timings: bool = False):
        self.path, self._timings = Path(path), timings
        self._file: TextIO | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one line, where something is to be written."""
        values = {name: x for name, x in values.items() if (name in TIMINGS) == self._timings}
        if not values:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", buffering=1, encoding="utf-8")
        plain = {name: x if math.isfinite(x) else None for name, x in values.items()}
        self._file.write(json.dumps({"step": step, **plain}, allow_nan=False) + "\n")

    def drop_after(self, step: int) -> None:
        """Takes the lines of later steps out, and one that was cut off when a run was killed.

        Raises:
            ValueError: another line is no such row.
        """
        self.close()
        if not self.path.is_file():
            return
        # What is behind the last end of a line was cut off.
        lines = self.path.read_bytes().decode(errors="replace").split("\n")[:-1]
        kept = [line for row, line in enumerate(lines, 1) if self._step(line, row) <= step]
        write_text(self.path, "".join(line + "\n" for line in kept))

    def _step(self, line: str, row: int) -> int:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{self.path}:{row} is no row of metrics; remove that line") from None

    def close(self) -> None:
        """Closes the file; another `write` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

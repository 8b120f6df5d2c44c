"""Where a run's numbers go, step by step."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TextIO


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
    """A file with one JSON object a line: the step and its values.

    A line is in the file when `write` returns, so that a run that is killed loses none.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: TextIO | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one line."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", buffering=1)
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def drop_after(self, step: int) -> None:
        """Takes the lines of later steps out, and one that was cut off when a run was killed."""
        self.close()
        if not self.path.is_file():
            return
        rows = [
            json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")
        ]
        kept = [row for row in rows if row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def close(self) -> None:
        """Closes the file; another `write` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

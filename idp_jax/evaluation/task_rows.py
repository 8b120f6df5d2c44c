"""Rows of local task data, read line by line, so that whatever is wrong is told by file and row.

The invariant: a row never changes how another is read. All rows of a file have the types of its
first one, because a table of several types would be cast to one, and a template would then write
the other rows in another way (1 as 1.0).
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset
from datasets.table import InMemoryTable

_DEEPEST = 32  # levels of lists and objects in each other
_LONGEST = 2**26  # bytes of a row
_NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number"}
_NAMES[bool] = "true or false"


class DataError(ValueError):
    """Data of a task that cannot be used; the message names the file and row."""


@dataclass(frozen=True)
class Rows:
    """The rows of a file, and where in it they stand."""

    path: Path
    rows: list[dict[str, Any]]
    lines: list[int]

    def where(self, index: int) -> str:
        """File and line of a row."""
        return f"{self.path}:{self.lines[index]}"

    def dataset(self, stop: int | None = None) -> Dataset:
        """The first rows as a table; what a row lacks is None."""
        rows = self.rows[:stop]
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: pyarrow.array([row.get(name) for row in rows]) for name in names}
        return Dataset(InMemoryTable(pyarrow.table(columns)))


def read_rows(path: Path) -> Rows:
    """Reads a .jsonl or .jsonl.gz file.

    Raises:
        ValueError: naming file and row: it cannot be read, a line is no JSON object, or a value is
            of another type than in the first row.
    """
    rows, lines, types = [], [], {}
    for number, line in _lines(path):
        try:
            row = _row(line)
            _same_types(row, types, "", number)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{number}: {one_line(error)}; mend or remove the row"
            ) from error
        rows.append(row)
        lines.append(number)
    if not rows:
        raise DataError(f"{path} holds no rows; give another file, or remove it")
    found = Rows(path, rows, lines)
    _check_table(found)
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that hold something, with their numbers from 1 on."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(_LONGEST + 1):
                number += 1
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        message = f"{path}:{number + 1} cannot be read ({reason}); copy the file again"
        raise DataError(message) from error


def _row(line: bytes) -> dict[str, Any]:
    if len(line) > _LONGEST:
        raise ValueError(f"the row is longer than {_LONGEST} bytes")
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"the row is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"the row is not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError(f"the row is nested deeper than {_DEEPEST} levels") from error
    if not isinstance(row, dict) or not row:
        raise ValueError("the row is not a JSON object with fields")
    return row


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _same_types(value: Any, types: dict, place: str, number: int, depth: int = 0) -> None:
    """Holds a row's values against the types of those before, which it adds to.

    Args:
        types: by place in a row, the type found there and the first row that has it.
    """
    if depth > _DEEPEST:
        raise ValueError(f"the row is nested deeper than {_DEEPEST} levels")
    if value is None:
        return
    kind, first = types.setdefault(place, (type(value), number))
    if kind is not type(value) and not (kind is float and type(value) is int):
        raise ValueError(
            f"{place or 'the row'} is {_NAMES[type(value)]}, in row {first} it is {_NAMES[kind]}"
        )
    if isinstance(value, dict):
        for name, entry in value.items():
            _check_text(name, place)
            inner = f"{place}.{name}" if place else name
            _same_types(entry, types, inner, number, depth + 1)
    elif isinstance(value, list):
        for entry in value:
            _same_types(entry, types, f"{place}[]", number, depth + 1)
    elif isinstance(value, str):
        _check_text(value, place)


def _check_text(text: str, place: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{place} holds {found}, half of a character") from error


def _check_table(found: Rows) -> None:
    """Names the row that does not fit where all of them make no table (a number too large, say)."""
    bad = first_failing(found.dataset, len(found.rows))
    if bad is not None:
        raise DataError(f"{found.where(bad)}: a number is too large; mend or remove the row")


def first_failing(build: Callable[[int], Any], count: int) -> int | None:
    """The first row, from 0 on, with which `build(number of rows)` fails; None where it works."""
    works = lambda number: not _fails(build, number)
    if works(count):
        return None
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if works(middle + 1) else (low, middle)
    return low


def _fails(build: Callable[[int], Any], number: int) -> bool:
    try:
        build(number)
    except Exception:
        return True
    return False


def one_line(error: Exception) -> str:
    """What an error says, with its kind where it would say too little."""
    said = " ".join(str(error).split())
    return said if said and isinstance(error, ValueError) else f"{type(error).__name__}: {said}"

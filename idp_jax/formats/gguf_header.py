"""The head of a GGUF file: its metadata, and where each tensor lies.

The `gguf` package's own reader believes every count and length, so that a damaged file can keep it
busy for hours or fill the memory. The invariant: nothing is read or allocated that the file's own
bytes do not hold, and whatever does not fit is a one-line `ValueError`.

Source: the GGUF specification (ggml/docs/gguf.md); llama.cpp's gguf.cpp for what is refused.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# The struct letter of every metadata type of a fixed size.
_LETTERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_ALIGNMENT = 32


class TensorInfo(NamedTuple):
    """How one tensor is stored; `shape` has the outermost axis first, [out, in]."""

    kind: int
    shape: tuple[int, ...]
    start: int
    size: int


class Header(NamedTuple):
    """The metadata by key, the tensors by name, and the bytes of the whole file."""

    fields: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: np.ndarray


def shown(value: Any) -> str:
    """A value for a message: on one line, and not long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_header(path: Path) -> Header:
    """Reads metadata and tensor table; the tensors themselves stay in the file.

    Raises:
        ValueError: not a GGUF file of a version that is read here, damaged, or cut short.
    """
    try:
        data = np.memmap(path, np.uint8, mode="r")
        fields, tensors = _parse(_Cursor(data.data))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a readable GGUF file ({error}); fetch it again") from None
    return Header(fields, tensors, data)


class _Cursor:
    """Reads from front to back, never beyond the end."""

    def __init__(self, data: memoryview):
        self.data = data
        self.at = 0

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise ValueError(f"it ends within {count} bytes from byte {self.at} on")
        self.at += count
        return self.data[self.at - count : self.at]

    def numbers(self, letter: str, count: int = 1) -> tuple:
        size = struct.calcsize(f"<{letter}")
        # The size is tested before a format is made of the count.
        return struct.unpack(f"<{count}{letter}", self.take(count * size))

    def number(self, letter: str) -> Any:
        return self.numbers(letter)[0]

    def string(self) -> str:
        start, raw = self.at, bytes(self.take(self.number("Q")))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ValueError(f"the text at byte {start} is no UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in _LETTERS:
            return self.number(_LETTERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a value of the unknown type {kind} at byte {self.at}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _LETTERS:
            return list(self.numbers(_LETTERS[inner], count))
        if inner != _STRING:
            raise ValueError(f"an array of the unknown type {inner} at byte {self.at}")
        return [self.string() for _ in range(count)]


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    if bytes(cursor.take(4)) != b"GGUF":
        raise ValueError("it does not start with GGUF")
    version = cursor.number("I")
    if version & 0xFFFF == 0:
        raise ValueError("its byte order is big-endian, which is not supported")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, supported are 2 and 3")
    tensor_count, field_count = cursor.numbers("Q", 2)
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.string()
        if key in fields:
            raise ValueError(f"it has the key {shown(key)} twice")
        fields[key] = cursor.value(cursor.number("I"))
    table: dict[str, tuple] = {}
    for _ in range(tensor_count):
        name = cursor.string()
        if name in table:
            raise ValueError(f"it has the tensor {shown(name)} twice")
        dimensions = cursor.numbers("Q", cursor.number("I"))
        table[name] = (*cursor.numbers("I"), dimensions[::-1], *cursor.numbers("Q"))
    return fields, _placed(fields, table, cursor)


def _placed(
    fields: dict[str, Any], table: dict[str, tuple], cursor: _Cursor
) -> dict[str, TensorInfo]:
    """The tensors of the table, each within the file and clear of the others."""
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {shown(alignment)}, which is no power of two")
    first = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, (kind, shape, offset) in table.items():
        size = _byte_count(name, kind, shape)
        if offset % alignment or first + offset + size > len(cursor.data):
            raise ValueError(f"the tensor {shown(name)} does not lie within it")
        tensors[name] = TensorInfo(kind, shape, first + offset, size)
    end = first
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start < end:
            raise ValueError(f"the tensor {shown(name)} lies over another one")
        end = info.start + info.size
    return tensors


def _byte_count(name: str, kind: int, shape: tuple[int, ...]) -> int:
    import gguf

    sizes = {int(known): size for known, size in gguf.GGML_QUANT_SIZES.items()}
    if kind not in sizes:
        raise ValueError(f"the tensor {shown(name)} is of the unknown type {kind}")
    block, size = sizes[kind]
    if not 1 <= len(shape) <= 4 or min(shape) < 1 or shape[-1] % block:
        raise ValueError(f"the tensor {shown(name)} has the impossible shape {shown(shape)}")
    return math.prod(shape) // block * size

"""Reading text files, for perplexity, calibration and training alike: all see the same documents.

The same text is the same characters whatever its packaging: in UTF-8, or in UTF-16 and UTF-32, with
or without a byte order mark, compressed, with the line ends of any system. Line ends in a file are
packaging, and become "\\n", as in every program that reads text; an escaped "\\r" in a JSON string
is a character that its writer chose, and stays. No more is read than is asked for, and nothing is
held but one piece of a plain text or one row of a .jsonl file.

The invariant: documents are joined by one blank line, as the published perplexity protocol joins
them.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Document = str | Iterable[str]  # the text, or its pieces in order

TEXT_FIELDS = ("text", "page")  # C4's name for a document, and the harness's WikiText
_BLOCK = 2**16  # bytes read at a time
_LONGEST_ROW = 2**28  # characters; a small .gz can unpack to anything
_HELD = 2**24  # characters of rows that are held to be given out in another order
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_documents(path: str | Path, seed: int | None = None) -> Iterator[Document]:
    """One pass over the documents of a file.

    Args:
        path: `.txt` or `.raw` (the whole file is one document), or `.jsonl` (one document a line,
            in the field `text` or `page`); each may end in `.gz`.
        seed: of a random order; None keeps the file's own.

    Raises:
        ValueError: the file is missing, empty or of another kind, is not text, or a line is not
            such a document; the message names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no text file {path}; check the path")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:]
    if kind in ([".txt"], [".raw"]):
        yield _some_text(path, _characters(path))
    elif kind != [".jsonl"]:
        raise ValueError(
            f"cannot read text from {path}; give a .txt, .raw or .jsonl file (or its .gz)"
        )
    else:
        rows = read_lines(path) if seed is None else _shuffled(path, seed)
        yield from _some_text(path, (_text(path, number, row) for number, row in rows))


def join_documents(documents: Iterable[Document]) -> Iterator[str]:
    """One text in pieces, with a blank line between documents."""
    for number, document in enumerate(documents):
        if number:
            yield "\n\n"
        yield from [document] if isinstance(document, str) else document


def read_text(path: str | Path) -> Iterator[str]:
    """The documents of a file as one text in pieces, see `read_documents`."""
    return join_documents(read_documents(path))


def _some_text(path: Path, texts: Iterable[str]) -> Iterator[str]:
    """The texts, of which one at least must not be empty."""
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise ValueError(f"{path} holds no text; give another file")


def _characters(path: Path) -> Iterator[str]:
    """A file's text in pieces."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rb") as file:
            yield from _decoded(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}; give a text file, or its .gz") from error


def _decoded(path: Path, file: io.BufferedIOBase) -> Iterator[str]:
    block = file.read(_BLOCK)
    encoding = json.detect_encoding(block)  # by the byte order mark, else by where zeros are
    plain = codecs.getincrementaldecoder(encoding)()
    decoder = io.IncrementalNewlineDecoder(plain, translate=True)
    place, line = 0, 1
    while True:
        try:
            piece = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            wrong = error.start - len(error.object) + len(block)
            line += decoder.decode(block[: max(wrong, 0)]).count("\n")
            raise ValueError(
                f"{path}:{line} is not {encoding.upper()} text: byte {place + wrong} of the file "
                f"is {error.object[error.start]:#04x}; save it as UTF-8"
            ) from error
        yield piece
        if not block:
            return
        place, line = place + len(block), line + piece.count("\n")
        block = file.read(_BLOCK)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers."""
    number, parts, length = 1, [], 0
    for piece in _characters(path):
        first, *others = piece.split("\n")
        parts.append(first)
        length += len(first)
        if length > _LONGEST_ROW:
            raise ValueError(
                f"{path}:{number} is longer than {_LONGEST_ROW} characters; give one document a "
                "line, or a .txt file"
            )
        for other in others:
            line, parts, length = "".join(parts), [other], len(other)
            if line and not line.isspace():
                yield number, line
            number += 1
    line, parts = "".join(parts), []
    if line and not line.isspace():
        yield number, line


def _shuffled(path: Path, seed: int) -> Iterator[tuple[int, str]]:
    """The rows in a random order: the file is read once for every `_HELD` characters."""
    lengths = [len(row) for _, row in read_lines(path)]
    order = np.random.default_rng(seed).permutation(len(lengths))
    size = max(1, _HELD * len(lengths) // max(sum(lengths), 1))
    for start in range(0, len(order), size):
        chosen = order[start : start + size].tolist()
        wanted = set(chosen)
        rows = {index: row for index, row in enumerate(read_lines(path)) if index in wanted}
        yield from (rows.pop(index) for index in chosen)


def _text(path: Path, number: int, row: str) -> str:
    """The document of a row."""
    where = f"{path}:{number}"
    fields = fields_of(where, row)
    texts = [fields.get(name) for name in TEXT_FIELDS]
    text = next((text for text in texts if isinstance(text, str)), None)
    if text is None:
        raise ValueError(f"{where} has no text field; expected one of {', '.join(TEXT_FIELDS)}")
    if found := _SURROGATE.search(text):
        raise ValueError(
            f"{where} holds half a character, \\u{ord(found[0]):04x}, at {found.start()} of its "
            "text; write whole characters"
        )
    return text


def fields_of(where: str, row: str) -> dict[str, Any]:
    """The JSON object in a line; of other JSON no fields.

    Args:
        where: file and line, for the error.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        # Files with a byte order mark that are put behind one another have marks inside.
        fields = json.loads(row.lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where} is not JSON: {reason}; mend or remove the line") from error
    return fields if isinstance(fields, dict) else {}

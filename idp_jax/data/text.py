"""Reading text files, for perplexity and for training alike, so that both see the same documents.

The invariant: documents are joined by one blank line, as the published perplexity protocol joins
them.
"""

import gzip
import json
from pathlib import Path

TEXT_FIELDS = ("text", "page")  # C4's name for a document, and the harness's WikiText


def read_documents(path: str | Path) -> list[str]:
    """The documents of a file.

    Args:
        path: `.txt` or `.raw` (the whole file is one document), or `.jsonl` (one document a line,
            in the field `text` or `page`); each may end in `.gz`.

    Raises:
        ValueError: the file is missing, empty or of another kind, or a line is not such a document.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no text file {path}; check the path")
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    text = _read(path)
    if kind in (".txt", ".raw"):
        documents = [text]
    elif kind == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        documents = [_document(line, f"{path}:{number}") for number, line in lines if line.strip()]
    else:
        raise ValueError(
            f"cannot read text from {path}; give a .txt, .raw or .jsonl file (or its .gz)"
        )
    if not any(documents):
        raise ValueError(f"{path} holds no text; give another file")
    return documents


def join_documents(documents: list[str]) -> str:
    """One text, with a blank line between documents."""
    return "\n\n".join(documents)


def read_text(path: str | Path) -> str:
    """The documents of a file as one text, see `read_documents`."""
    return join_documents(read_documents(path))


def _read(path: Path) -> str:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            return file.read()
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}; give a UTF-8 text file") from error


def _document(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    for field in TEXT_FIELDS:
        if isinstance(row, dict) and isinstance(row.get(field), str):
            return row[field]
    raise ValueError(f"{where} has no text field; expected one of {', '.join(TEXT_FIELDS)}")

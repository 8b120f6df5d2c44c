"""Writing files that are either complete or absent."""

import os
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

"""Writing files that are either complete or absent, and telling files apart."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SAMPLE = 2**20  # bytes
_MODEL_FILES = (".safetensors", ".bin", ".gguf", ".json")


def write_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Has `write` write a file under a temporary name, and renames it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it."""
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON that every reader takes: a number that is not finite becomes null."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fingerprint(path: str | Path) -> str:
    """Tells models apart without reading them whole.

    Returns:
        SHA-256 over the name, size, beginning, middle and end (1 MiB each) of the file, or of
        every such file of a model's folder.
    """
    path, digest = Path(path), hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.suffix not in _MODEL_FILES or not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as handle:
            for place in sorted({0, max(size // 2, 0), max(size - _SAMPLE, 0)}):
                handle.seek(place)
                digest.update(handle.read(_SAMPLE))
    return digest.hexdigest()

"""Writing files that are either complete or absent, and telling files apart."""

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from idp_jax.config import ConfigError, refuse_url

_WEIGHTS = (".safetensors", ".bin", ".gguf")
_MODEL_FILES = (*_WEIGHTS, ".json", ".model", ".jinja")
_TOKENIZER_FILES = ("merges.txt", "vocab.txt")
_WHOLE = 2**28  # bytes of a weights file that is read whole; of a larger one, samples
_BLOCK, _STEP = 2**14, 2**20
# What a disk says that takes no more; libraries hand it on in words.
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def write_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Has `write` write a file under a temporary name, and renames it.

    Raises:
        ConfigError: the path is a URL.
        OSError: there is no room, or nothing may be written; it names `path`.
    """
    refuse_url("the file", path)
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():  # a rename would name the temporary file
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
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


def read_json(path: str | Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file that this software wrote.

    Args:
        remedy: what to do about a damaged one.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged (it holds no JSON object); {remedy}")
    return content


def seal(value: Any) -> str:
    """The digest of what `write_json` makes of a value, by which it is known when read again."""
    return hashlib.sha256(json.dumps(_finite(value), sort_keys=True).encode()).hexdigest()


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Has a disk that takes no more name what was to be written, whichever library met it."""
    try:
        yield
    except Exception as error:
        code = refusal(error)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def refusal(error: BaseException | None) -> int | None:
    """The system's code where an error, or one behind it, is of a disk that takes no more."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _REFUSALS:
            return error.errno
        found = (code for code in _REFUSALS if os.strerror(code) in str(error))
        if code := next(found, None):
            return code
        error = error.__cause__ or error.__context__
    return None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fingerprint(path: str | Path) -> dict[str, str]:
    """What tells the contents of a model or a text apart from others under the same path.

    Returns:
        The digest of a file by its name, or of every file that a model's folder is read from,
        tokenizer included. Of nothing where nothing is there, as of a dataset of the hub.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return {path.name: digest(path)}
    files = sorted(path.iterdir()) if path.is_dir() else []
    return {file.name: digest(file) for file in files if _is_of_model(file)}


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder by its place there; a link or a pipe has none."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if not file.is_dir() or file.is_symlink():
            plain = file.is_file() and not file.is_symlink()
            found[file.relative_to(folder).as_posix()] = digest(file) if plain else ""
    return found


def digest(file: Path) -> str:
    """SHA-256 of a file, whole; of weights beyond 256 MiB 16 KiB of every MiB, and both ends."""
    size, found = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as handle:
        if file.suffix not in _WEIGHTS or size <= _WHOLE:
            return hashlib.file_digest(handle, "sha256").hexdigest()
        found.update(f"{size} ".encode() + handle.read(_STEP))
        for place in range(_STEP, size, _STEP):
            handle.seek(place)
            found.update(handle.read(_BLOCK))
        handle.seek(-_STEP, os.SEEK_END)
        found.update(handle.read(_STEP))
    return found.hexdigest()


def _is_of_model(file: Path) -> bool:
    named = file.suffix in _MODEL_FILES or file.name in _TOKENIZER_FILES
    return named and file.is_file() and not file.name.startswith(".")

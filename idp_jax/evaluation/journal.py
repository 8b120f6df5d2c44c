"""What an evaluation has scored so far, in a file, so that the next same call goes on from there.

A line for every batch: a digest of all that went into it, and what came out. The invariant: batches
are planned as if nothing were known, and one that the file holds is not computed, so that the
numbers of an interrupted evaluation are those of a whole one, bit for bit.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np


class Journal:
    """Batches by the digest of what went into them; without a file nothing is remembered.

    A call of several processes remembers nothing either: each would have to find the same lines.
    """

    def __init__(self, path: Path | None = None, identity: str = ""):
        """Reads what an earlier call left.

        Args:
            path: the file, made with the first batch.
            identity: of the model and of all else that scores depend on; part of every digest.
        """
        self.path = path if jax.process_count() == 1 else None
        self.identity = identity
        self._known: dict[str, Any] = {}
        if self.path is not None and self.path.is_file():
            self._read(self.path)

    def within(self, *facts: Any) -> "Journal":
        """The same file for batches that depend on `facts` too."""
        inner = Journal()
        inner.path, inner._known = self.path, self._known
        inner.identity = _digest(self.identity, facts)
        return inner

    def __call__(self, compute: Callable[[], Any], *parts: Any) -> Any:
        """`compute()`, plain JSON values, or what an earlier call found for the same parts.

        Args:
            parts: arrays and JSON values that the result depends on, beside the identity.
        """
        if self.path is None:
            return compute()
        key = _digest(self.identity, parts)
        if key not in self._known:
            self._known[key] = compute()
            line = json.dumps([key, self._known[key]])
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError:  # nothing to go on from is nothing to keep
                if self.path.is_file() and not self.path.stat().st_size:
                    self.path.unlink()
                raise
        return self._known[key]

    def remove(self) -> None:
        """Deletes the file, once its numbers are where they belong."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        """Keeps the lines that are whole; a call that was killed may have left half a line."""
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                key, value = json.loads(line)
                self._known[key] = value
            except (ValueError, TypeError, RecursionError):
                break
            if not line.endswith(b"\n"):
                break
            whole += len(line)
        with path.open("r+b") as file:
            file.truncate(whole)


def _digest(identity: str, parts: Any) -> str:
    digest = hashlib.sha256(identity.encode())
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\0")
    return digest.hexdigest()

"""A teacher's word on disk: asked once, read by every training on the same text.

A folder holds the word of one teacher in one form, named in cache.json, and a file of records for
each length of window. A record is known by the hash of its window's tokens, so that the order of
the text, epochs, seeds and methods may share it. Records are appended under a lock and read through
a memory map; several jobs may use a folder at once. The last record of a job that was killed may be
torn, and is dropped by the next that writes; every record carries a checksum. Of a job of several
processes the first writes, and all ask where one of them finds a record missing.
"""

import fcntl
import hashlib
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from idp_jax.config import ConfigError
from idp_jax.jobs.files import naming, read_json, write_json
from idp_jax.processes import everywhere, first_process

_log = logging.getLogger(__name__)
_KEY = 32  # bytes of a window's hash
_SETTINGS = "cache.json"
Rows = dict[str, np.ndarray]


class Cache:
    """The records of windows of one length."""

    def __init__(
        self, folder: Path, identity: dict[str, Any], time: int, shapes: dict[str, tuple[type, int]]
    ):
        """Opens a folder, or makes it.

        Args:
            identity: plain JSON, whatever the records depend on but the window.
            time: tokens of a window.
            shapes: by field, its dtype and numbers for each token (0 for one number without an
                axis of its own).

        Raises:
            ConfigError: the folder holds the word of another teacher, or of the same in another
                form.
        """
        self._folder, self._file = folder, folder / f"windows-{time}.bin"
        fields = [
            (name, np.dtype(dtype).newbyteorder("<"), (time, count) if count else (time,))
            for name, (dtype, count) in shapes.items()
        ]
        self._dtype = np.dtype([("key", f"V{_KEY}"), *fields, ("checksum", "<u4")])
        self._names = tuple(shapes)
        self._records = np.empty(0, self._dtype)
        self._places: dict[bytes, int] = {}
        with naming(folder / _SETTINGS):
            folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._claim(identity)

    def rows(self, keys: list[bytes], ask: Callable[[], Rows]) -> Rows:
        """The fields of some windows, [B, ...] each.

        Args:
            keys: see `window_keys`.
            ask: the fields of all of them; called where one is missing, in every process.

        Raises:
            ConfigError: a record is damaged.
            OSError: the disk is full.
        """
        self._look()
        if not everywhere(all(key in self._places for key in keys)):
            return self._asked(keys, ask())
        found = self._records[[self._places[key] for key in keys]]
        for record in found:
            if _checksum(record) != record["checksum"]:
                raise ConfigError(
                    f"{self._file} is damaged; remove it, and the teacher is asked again"
                )
        return {name: found[name] for name in self._names}

    def _asked(self, keys: list[bytes], rows: Rows) -> Rows:
        """Fields that were asked for, as the file has them, where process 0 puts them."""
        rows = {name: rows[name].astype(self._dtype[name].base) for name in self._names}
        first_process(lambda: self._append(keys, rows), "the teacher's word")
        return rows

    def _claim(self, identity: dict[str, Any]) -> None:
        file = self._folder / _SETTINGS
        if not file.is_file():
            if any(self._folder.glob("windows-*.bin")):
                raise ConfigError(f"{self._folder} has lost its {_SETTINGS}; remove the folder")
            write_json(file, identity)
            return
        found = read_json(file, f"remove {self._folder}, and the teacher is asked again")
        wrong = [name for name in identity if found.get(name) != identity[name]]
        if wrong:
            before, now = found.get(wrong[0]), identity[wrong[0]]
            said = "" if isinstance(now, dict) else f" ({before}, not {now})"
            raise ConfigError(
                f"--teacher.cache {self._folder} was written with another {wrong[0]}{said}; give "
                "another folder, or remove it"
            )

    def _look(self) -> None:
        """Takes notice of records that were written since, by this job or another."""
        size = self._file.stat().st_size if self._file.is_file() else 0
        count, known = size // self._dtype.itemsize, len(self._records)
        if count > known:
            self._records = np.memmap(self._file, self._dtype, "r", shape=(count,))
            for place in range(known, count):
                self._places.setdefault(self._records["key"][place].tobytes(), place)

    def _append(self, keys: list[bytes], rows: Rows) -> None:
        with naming(self._file), self._alone(), self._file.open("ab") as file:
            self._look()
            whole = len(self._records) * self._dtype.itemsize
            file.truncate(whole)  # what is behind was torn
            try:
                for number, key in enumerate(keys):
                    if key not in self._places and key not in keys[:number]:
                        file.write(self._record(key, {n: rows[n][number] for n in rows}))
                file.flush()
            except OSError:
                os.truncate(self._file, whole)
                raise
        self._look()

    def _record(self, key: bytes, fields: Rows) -> bytes:
        record = np.zeros((), self._dtype)
        record["key"] = np.void(key)
        for name in self._names:
            record[name] = fields[name]
        record["checksum"] = _checksum(record)
        return record.tobytes()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits for other jobs that write here; reading needs no lock."""
        with (self._folder / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:  # a network disk without locks
                _log.warning("%s cannot be locked (%s)", self._folder, error.strerror)
            yield


def window_keys(tokens: np.ndarray, segments: np.ndarray | None = None) -> list[bytes]:
    """The hash of every row of int [B, T]: of its tokens, and of where its documents end."""
    keys = []
    for row, ids in enumerate(np.asarray(tokens, "<i4")):
        found = hashlib.sha256(ids.tobytes())
        if segments is not None:
            found.update((np.diff(segments[row]) != 0).tobytes())
        keys.append(found.digest())
    return keys


def _checksum(record: np.void | np.ndarray) -> int:
    return zlib.crc32(record.tobytes()[:-4])

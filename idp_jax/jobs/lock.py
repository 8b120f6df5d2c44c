"""One job at a time in a place.

The system holds the lock and lets go of it when the process ends, however it ends. The file says
who holds it, and is removed by whoever let go of it in good order.
"""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from idp_jax.config import ConfigError, refuse_url

_log = logging.getLogger(__name__)


class Busy(ConfigError):
    """Another job writes there."""


@contextmanager
def locked(out: str | Path, *, inside: bool = False) -> Iterator[None]:
    """Keeps other jobs, of this machine and of those that share the disk, away from `out`.

    Args:
        out: a file or folder that is to be written.
        inside: the job works in the folder `out` itself, so that is where the lock lies; it lies
            beside what appears when it is complete.

    Raises:
        Busy: another job writes there (it says which).
        ConfigError: it is a URL.
    """
    refuse_url("the place", out)
    out = Path(out)
    file = lock_file(out, inside=inside)
    made = [folder for folder in file.parents if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = _hold(file, out)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            os.close(handle)
    finally:
        # Folders that were made for nothing: those that are still empty.
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def lock_file(out: Path, *, inside: bool = False) -> Path:
    """Where the lock of a place lies."""
    return out / ".lock" if inside else out.parent / f".{out.name}.lock"


def _hold(file: Path, out: Path) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 1000).decode(errors="replace") or "another process"
            os.close(handle)
            raise Busy(
                f"{out} is being written by {holder}; wait for it, or give another --out"
            ) from None
        except OSError as error:  # a network disk without locks
            _log.warning("%s cannot be locked (%s): start no second job there", out, error.strerror)
        # The last holder may have removed the file between our opening and our locking it.
        if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
            break
        os.close(handle)
    os.ftruncate(handle, 0)
    with suppress(OSError):  # a full disk: the lock holds without its holder's name
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return handle

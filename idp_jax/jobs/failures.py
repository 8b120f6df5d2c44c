"""What ends a command, in one line: what was wrong and what to do about it.

Errors of our own say so themselves. Of any other the whole story is kept in a file, for a report.
"""

import contextlib
import ctypes
import errno
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from idp_jax import __version__
from idp_jax.jobs import signals
from idp_jax.jobs.files import refusal

_LONGEST = 400  # characters of what a library says
_REMEDIES = {
    errno.ENOSPC: "make room, and give the same command again",
    errno.EDQUOT: "make room, and give the same command again",
    errno.EFBIG: "the disk, or this process' limits, allow no larger file; give another --out",
    errno.EROFS: "give another --out",
    errno.EISDIR: "a file belongs there; move the folder away",
    errno.EACCES: "allow it, or give another path",
}
# What JAX's collectives, and what the processes of a job meet by, say of one that is gone.
_GONE = re.compile(
    "gloo|nccl|heartbeat|coordination service|barrier|connection (closed|reset)", re.I
)
_TOGETHER = "see what it said, and give the same command again in all of them"
_PACKAGE = __name__.partition(".")[0]


def is_failure(error: BaseException) -> bool:
    """Whether a command failed by it: not an interruption, nor an exit that was asked for."""
    panic = type(error).__name__ == "PanicException"  # of a library in Rust; no Exception
    return isinstance(error, Exception) or panic


def explained(error: BaseException, out: Any = None) -> tuple[str, int]:
    """One line about an error, and the exit status.

    Args:
        out: what the command was to write.

    Returns:
        With status 2 what was asked of a command that is impossible, with 1 how it failed.
    """
    said = _one_line(error)
    if isinstance(error, ValueError) and _is_ours(error):
        return said, 2
    if isinstance(error, RuntimeError) and said.startswith("Symlink loop"):  # pathlib's resolve
        return f"{said}: the link leads back to itself; give another path", 2
    if isinstance(error, ValueError) and said.startswith("embedded null"):  # of any path
        return "a path holds the character NUL, which no file has in its name; give another", 2
    code = refusal(error)
    if code is not None:
        return f"{_refused(error) or out}: {os.strerror(code)}; {_REMEDIES[code]}", 1
    if isinstance(error, OSError) and error.filename is not None:
        remedy = f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
        return f"{error.filename}: {error.strerror or said}{remedy}", 1
    if lost_a_process(error):
        why = f"another process of this job has ended or cannot be reached ({said[:_LONGEST]})"
        return f"{why}; {_TOGETHER}", 1
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said:
        said = f"out of memory ({said[:_LONGEST]}); take smaller batches, or a larger machine"
    elif isinstance(error, RecursionError):
        said = f"a file that was read nests too deeply ({said})"
    else:
        said = f"{type(error).__name__}: {said[:_LONGEST]}"
    file = _kept(error)
    where = "" if file is None else f"; the traceback is in {file}"
    return said + where, 1


def lost_a_process(error: BaseException) -> bool:
    """Whether it comes of another process of the job that is gone, so that none waits for this."""
    jax = sys.modules.get("jax")
    together = jax is not None and jax.distributed.is_initialized()
    return together and isinstance(error, RuntimeError) and bool(_GONE.search(str(error)))


_LOST = "another process of this job has ended, as JAX most likely says above"
_end = f"{_LOST}; {_TOGETHER}", 1  # what an abort says, and its status


def failed_here(message: str, status: int) -> None:
    """Notes why this process ends, for its last line where JAX aborts it on its way out.

    One that fails alone meets none of the others there, and JAX gives it up.
    """
    global _end
    _end = message, status


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
    signals.leave(*_end)


def explain_abort() -> None:
    """Has a process of several say in its last line why JAX ends it, when another one is gone.

    JAX's own thread aborts then, whatever Python waits for; no handler of Python's would be called.
    """
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)


@contextlib.contextmanager
def calm_streams() -> Iterator[None]:
    """While a command runs, what it says is its own, and whoever reads that may leave.

    The work goes on without a word then. Threads of libraries print no traceback of what they meet
    when a save failed; that is raised in the main thread, too.
    """
    own, hook = (sys.stdout, sys.stderr), sys.unraisablehook
    sys.stdout, sys.stderr = (_Lasting(stream) for stream in own)  # type: ignore[assignment]
    # Of an object in Python something is known; of a thread in C++ nothing.
    sys.unraisablehook = lambda met: hook(met) if met.object or met.err_msg else None
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        (sys.stdout, sys.stderr), sys.unraisablehook = own, hook


class _Lasting:
    """A text stream that goes on into nothing when its reader has left."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_ours(error: BaseException) -> bool:
    """Whether our code raised it, so that it says what to do."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    raised_in = "" if last is None else last.tb_frame.f_globals.get("__name__", "")
    places = type(error).__module__, raised_in
    return any(place.partition(".")[0] == _PACKAGE for place in places)


def _refused(error: BaseException | None) -> str | None:
    """The file that could not be written: the error's own, or one that a library names in words."""
    while error is not None:
        if isinstance(error, OSError) and error.filename is not None:
            return str(error.filename)
        named = re.search(r"[\"'](/[^\"']+)[\"']", str(error))
        if named:
            return named[1]
        error = error.__cause__ or error.__context__
    return None


def _kept(error: BaseException) -> Path | None:
    """Writes the traceback to a file of the system's folder for such; None if it takes none."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="idp-jax-", suffix=".traceback", delete=False, encoding="utf-8"
        ) as file:
            file.write(f"idp-jax {__version__}: {' '.join(sys.argv)}\n\n")
            file.writelines(traceback.format_exception(error))
    except OSError:
        return None
    return Path(file.name)

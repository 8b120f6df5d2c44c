"""SIGINT and SIGTERM: the first asks the work to stop, a second ends the process.

A thread reads the signals from the interpreter's wake-up pipe, so that they count while the main
thread compiles or imports, too. The invariant: a signal raises nothing but at a check point, so
that none is lost in a callback or breaks a save; and some seconds after the first one the process
has ended, whatever it was doing.
"""

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 8.0  # seconds from a signal to the end, where no check point is passed
_PATIENCE_TOGETHER = 20.0  # of a job of several processes, whose steps take longer
_ECHO = 0.1  # seconds: who signals a process and then its group means one signal
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


class Interrupted(BaseException):
    """A signal has asked the work to stop; not an Exception, so that nobody takes it for an error.

    Attributes:
        number: the signal's.
        place: how far the work is, once that is saved.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number
        self.place: str | None = None


class _Watch:
    """The signals of one command."""

    def __init__(self):
        self.asked = 0  # the first signal's number
        self.begun = self.resumes = self.together = False
        self.holds = 0
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.thread = threading.Thread(target=self._run, daemon=True, name="signals")

    def message(self, place: str | None = None) -> str:
        """What a user should know."""
        if place is not None:
            return f"interrupted at {place}; the same command goes on from there"
        if not self.begun:
            return "interrupted before the work began"
        if self.resumes:
            return "interrupted; the same command goes on from what is finished"
        return "interrupted; run the command again"

    def _run(self) -> None:
        asked = self._next(None)
        if asked:
            self.asked = asked
            second = self._wait() if self.begun else None
            if second != 0:  # 0: the command came to its end
                leave(self.message(), 128 + (second or asked))
        os.close(self.reader)

    def _wait(self) -> int | None:
        """Waits after the first signal: for a second one, the end, or too long."""
        heard, patience = time.monotonic(), _PATIENCE_TOGETHER if self.together else _PATIENCE
        while True:
            second = self._next(patience)
            if second is None and self.holds:
                patience = 1.0
            elif not second or time.monotonic() > heard + _ECHO:
                return second

    def _next(self, seconds: float | None) -> int | None:
        """A signal's number, 0 when the command is over, None when nothing comes in time."""
        while select.select([self.reader], [], [], seconds)[0]:
            read = os.read(self.reader, 1)
            if not read or read[0] in SIGNALS:
                return read[0] if read else 0
        return None


_watch: _Watch | None = None


@contextmanager
def handled() -> Iterator[None]:
    """While a command runs in the main thread, its signals are ours; an interrupted one ends here.

    The process ends without the interpreter's own way out, where threads of libraries crash that
    were stopped in the middle of their work.
    """
    global _watch
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, watch = _watch, _Watch()
    _watch = watch
    # The pipe is filled before any handler is called, and must be there before these handlers are:
    # they do nothing themselves.
    wakeup = signal.set_wakeup_fd(watch.writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    watch.thread.start()
    try:
        yield
    except Interrupted as stop:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        leave(watch.message(stop.place), 128 + stop.number)
    finally:
        _watch = outer
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(watch.writer)
        watch.thread.join()
        # The last that is registered is the first that is called: before what libraries have
        # registered since, where a signal would print a traceback.
        atexit.unregister(_leave)
        atexit.register(_leave)


def begin(*, resumes: bool) -> None:
    """Says that the work begins: until now a signal has ended the process at once.

    Args:
        resumes: whether the same command, called again, goes on from what this one finishes.
    """
    if _watch is not None:
        _watch.resumes, _watch.begun = resumes, True


def check() -> None:
    """A check point: raises Interrupted if a signal has come. Long loops pass one at every turn."""
    if _watch is not None and _watch.asked and not _watch.together:
        raise Interrupted(_watch.asked)


def asked() -> int:
    """The first signal that has come, 0 for none."""
    return 0 if _watch is None else _watch.asked


@contextmanager
def together() -> Iterator[None]:
    """Where several processes may stop only at the same place: check points raise nothing here.

    What works here looks at `asked` in each of them, and raises Interrupted in all.
    """
    watch = _watch
    if watch is not None:
        watch.together = True
    try:
        yield
    finally:
        if watch is not None:
            watch.together = False


@contextmanager
def hold() -> Iterator[None]:
    """What is to be finished although a signal has come, however long it takes; not a second."""
    watch = _watch
    if watch is not None:
        watch.holds += 1
    try:
        yield
    finally:
        if watch is not None:
            watch.holds -= 1


def leave(message: str, status: int) -> NoReturn:
    """Ends the process with a last line, whatever its threads and the interpreter are doing."""
    shown = _SHOW_CURSOR if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{shown}idp-jax: {message}\n".encode())
    os._exit(status)


def _leave() -> None:
    """While the interpreter goes down a signal ends it at once: everything is done."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _forget() -> None:
    """A forked child is not the command: what stops it must not reach the parent's pipe."""
    if _watch is not None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)

"""Signals end a command soon, with the right code, one line, and nothing broken."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from idp_jax.jobs import progress, signals
from idp_jax.jobs.progress import Bars

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}

WORK = """
import os, sys, time
from idp_jax.jobs import signals

def say(word):
    print(word, flush=True)

with signals.handled():
    {work}
say("behind")
"""


def ended(work: str, *sent: signal.Signals, pause: float = 0.3, patience: float = 8.0):
    """Exit code, output, error output and seconds after the first signal, sent at "ready"."""
    script = WORK.format(work="\n    ".join(work.strip().splitlines()))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    started = time.monotonic()
    for number in sent:
        process.send_signal(number)
        time.sleep(pause)
    out, err = process.communicate(timeout=patience)
    return process.returncode, out, err, time.monotonic() - started


LOOP = """
signals.begin(resumes={resumes})
say("ready")
while True:
    time.sleep(0.01)
    try:
        signals.check()
    except Exception:
        say("swallowed")
"""


@pytest.mark.parametrize("number", signals.SIGNALS)
@pytest.mark.parametrize(
    ("resumes", "said"),
    [(True, "the same command goes on from what is finished"), (False, "run the command again")],
)
def test_the_first_signal_ends_the_work_at_a_check_point(number, resumes, said):
    code, out, err, _ = ended(LOOP.format(resumes=resumes), number)
    assert (code, out, err) == (CODES[number], "", f"idp-jax: interrupted; {said}\n")


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_before_the_work_a_signal_ends_at_once(number):
    code, out, err, seconds = ended('say("ready")\ntime.sleep(60)', number)
    assert (code, out) == (CODES[number], "") and seconds < 2
    assert err == "idp-jax: interrupted before the work began\n"


BUSY = """
signals.begin(resumes=True)
say("ready")
time.sleep(60)
"""


def test_a_second_signal_ends_at_once():
    code, _, err, seconds = ended(BUSY, signal.SIGTERM, signal.SIGINT)
    assert code == 130 and seconds < 2 and err.count("\n") == 1


def test_two_copies_of_one_signal_are_one():
    """As `timeout` sends them: to its child, and to the group."""
    loop = LOOP.format(resumes=True).replace("0.01", "0.5")
    code, _, err, seconds = ended(loop, signal.SIGTERM, signal.SIGTERM, pause=0.01)
    assert code == 143 and err.count("\n") == 1
    assert seconds > 0.1


def test_work_without_a_check_point_is_ended():
    code, _, err, seconds = ended(f"signals._PATIENCE = 0.5\n{BUSY}", signal.SIGINT)
    assert code == 130 and 0.4 < seconds < 4 and "Traceback" not in err


SAVE = """
signals._PATIENCE = 0.2
signals.begin(resumes=True)
say("ready")
with signals.hold():
    time.sleep(1.5)
    say("saved")
signals.check()
"""


def test_a_save_is_finished():
    code, out, _, seconds = ended(SAVE, signal.SIGINT)
    assert (code, out) == (130, "saved\n") and seconds > 1


TOGETHER = """
signals.begin(resumes=True)
say("ready")
with signals.together():
    while not signals.asked():
        time.sleep(0.01)
    signals.check()
    say(signals.asked())
signals.check()
say("never")
"""


def test_among_several_processes_a_check_point_stops_none_alone():
    code, out, _, _ = ended(TOGETHER, signal.SIGTERM)
    assert (code, out) == (143, "15\n")


def test_a_command_that_is_done_before_it_looks_is_no_failure():
    work = 'signals.begin(resumes=True)\nsay("ready")\ntime.sleep(0.5)'
    code, out, err, _ = ended(work, signal.SIGTERM)
    assert (code, out, err) == (0, "behind\n", "")


CHILD = """
signals.begin(resumes=True)
child = os.fork()
if not child:
    time.sleep(60)
say("ready")
time.sleep(0.3)
os.kill(child, 15)
assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 15
signals.check()
"""


def test_the_end_of_a_child_is_not_the_commands():
    code, out, err, _ = ended(CHILD)
    assert (code, out, err) == (0, "behind\n", "")


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    threads = threading.active_count()
    for _ in range(2):
        with signals.handled():
            assert signal.getsignal(signal.SIGINT) is not before[0]
            signals.begin(resumes=False)
            signals.check()
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    assert threading.active_count() == threads


def test_in_another_thread_nothing_is_touched():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with signals.handled():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("place", ["track", "bar"])
def test_progress_is_a_check_point(monkeypatch, place):
    def use():
        if place == "track":
            list(Bars().track([1, 2, 3], "work"))
        else:
            with Bars().bar("work") as update:
                update(1, 2)

    use()  # nothing was asked
    with signals.handled():
        watch = signals._watch
        assert watch is not None
        monkeypatch.setattr(watch, "asked", int(signal.SIGINT))
        with pytest.raises(signals.Interrupted):
            use()


def test_without_a_terminal_there_is_a_line_every_half_minute(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 20.0, 31.0, 45.0, 62.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Bars().bar("training", "steps") as update:
        for done in (10, 12, 13, 14, 18):
            update(done, 26, "loss 1.0")
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "training: 13/26, 0:00:31 elapsed, 0:02:14 left, loss 1.0",
        "training: 18/26, 0:01:02 elapsed, 0:01:02 left, loss 1.0",
    ]


AT_EXIT = """
import atexit, time
from idp_jax.jobs import signals

def leave():  # a library that was imported while the command ran
    print("ready", flush=True)
    time.sleep(60)

with signals.handled():
    atexit.register(leave)
"""


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_while_the_interpreter_goes_down_a_signal_ends_it_without_a_word(number):
    process = subprocess.Popen(
        [sys.executable, "-c", AT_EXIT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=8)
    assert (process.returncode, err) == (-number, "")

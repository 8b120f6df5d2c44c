"""Jobs of two processes that are stopped, and go on with as many processes or others."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import tiny_folder
from tests.sharding.processes import finish, start, start_together

STEPS, ROWS, LENGTH = 24, 8, 16
TOGETHER = {"together": True}
ALONE = {"together": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model and a text."""
    folder = tmp_path_factory.mktemp("files")
    tiny_folder(folder / "model", "llama", num_layers=1)
    lines = (f"line {n} of {n * n % 17} words" for n in range(200))
    (folder / "text.txt").write_text(" ".join(lines))
    return folder


def begin(files: Path, out: Path, *, together: bool, **how: str) -> list:
    """A training of eight devices: of two processes with four each, or of one."""
    call = ["train", "--model", files / "model", "--data.train", files / "text.txt"]
    call += ["--out", out, "--method", "lora", "--tokens", STEPS * ROWS * LENGTH]
    call += ["--batch-size", ROWS, "--data.sequence-length", LENGTH, "--evaluate-every", STEPS]
    call += ["--data.validation-windows", 4, "--optimizer.learning-rate", 1e-3]
    call += ["--checkpoint-every", 5]
    call += ["--mesh.data", 4, "--mesh.fsdp", 2]
    return start_together(*call, **how) if together else [start(*call, devices=8)]


def lines(out: Path) -> list[dict]:
    """The numbers that a training has written so far."""
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def wait_for(out: Path, processes: list, steps: int) -> None:
    """Until a training has done so many steps."""
    while not any(row["step"] >= steps for row in lines(out)):
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.05)


def stop(files: Path, out: Path, *, together: bool, number: signal.Signals, steps: int = 3) -> int:
    """Signals the last process of a training once so many steps are done; where it stopped."""
    processes = begin(files, out, together=together)
    wait_for(out, processes, steps)
    done = lines(out)[-1]["step"]
    processes[-1].send_signal(number)
    said = finish(processes, status=128 + number)
    (step,) = [int(path.name) for path in (out / "checkpoints").iterdir()]
    line = f"idp-jax: interrupted at step {step}; the same command goes on from there\n"
    assert all(errors.endswith(line) for errors in said)
    assert done <= step < STEPS and lines(out)[-1]["step"] == step
    return step


def adapter(out: Path) -> dict[str, np.ndarray]:
    """What a training ended with."""
    return load_file(out / "last/adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """A training of two processes that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(begin(files, out, **TOGETHER))
    return out


def test_a_signal_to_one_process_stops_both_behind_the_same_step(files, whole, tmp_path):
    """No step is lost, and the end is the same to the bit."""
    stop(files, tmp_path / "run", **TOGETHER, number=signal.SIGTERM)
    check_ends_like(files, tmp_path / "run", whole)


def check_ends_like(files: Path, out: Path, whole: Path) -> None:
    """Goes on with two processes, to the same bits."""
    finish(begin(files, out, **TOGETHER))
    assert lines(out) == lines(whole)
    here, there = adapter(out), adapter(whole)
    assert all(here[name].tobytes() == value.tobytes() for name, value in there.items())


@pytest.mark.slow  # process 0 waits a minute for the heartbeat of another one
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_left_alone_ends_with_one_line(files, whole, tmp_path, killed):
    processes = begin(files, tmp_path / "run", **TOGETHER)
    wait_for(tmp_path / "run", processes, 7)
    processes[killed].kill()
    finish([processes[killed]], status=-signal.SIGKILL)
    (said,) = finish([processes[1 - killed]], status=1)
    line = said.splitlines()[-1]
    assert line.startswith("idp-jax: another process of this job has ended")
    assert "Traceback" not in said
    check_ends_like(files, tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(TOGETHER, ALONE), (ALONE, TOGETHER)])
def test_a_run_goes_on_with_another_number_of_processes(files, whole, tmp_path, first, second):
    """Behind the same windows in the same order."""
    stop(files, tmp_path / "run", **first, number=signal.SIGINT)
    finish(begin(files, tmp_path / "run", **second))
    for row, wanted in zip(lines(tmp_path / "run"), lines(whole), strict=True):
        assert row == pytest.approx(wanted, abs=1e-5)
    here, there = adapter(tmp_path / "run"), adapter(whole)
    for name, value in there.items():
        np.testing.assert_allclose(here[name], value, atol=1e-5)


FAILS_ALONE = """
import os
from idp_jax.cli import main
from idp_jax.config import ConfigError
from idp_jax.training.feed import Feed

take = Feed.take

def failing(feed):
    if os.environ["JAX_PROCESS_ID"] == "1" and feed.state()["windows"] >= 24:
        raise ConfigError("row 7 is none; remove it")
    return take(feed)

Feed.take = failing
main()
"""


@pytest.mark.slow  # JAX waits a minute for the one that does not come to the next meeting point
def test_a_process_that_fails_alone_says_why_in_its_last_line(files, tmp_path):
    """Its own line, with its own status; the other one's says that it was left alone."""
    first, second = begin(files, tmp_path / "run", **TOGETHER, code=FAILS_ALONE)
    (said,) = finish([second], status=2)
    assert said.splitlines()[-1] == "idp-jax: row 7 is none; remove it"
    (said,) = finish([first], status=1)
    assert said.splitlines()[-1].startswith("idp-jax: another process of this job has ended")

"""Commands interrupted at random moments and called again: they must end soon, cleanly, and alike.

Training of all four methods, a compression, an evaluation and a small demo get SIGINT and SIGTERM
in turn, at moments drawn between the start of a process and its end, and are called again until
they finish. A call must end within ten seconds of its signal, with 130 or 143 (or 0, if it had
finished), and print no traceback; the files at the end must be those of an undisturbed job.

    python benchmarks/signals.py --signals 200

With --together the job is one training of two processes with four CPU devices each, and one of
them, or both, get SIGKILL once they have met. The other must end by itself with one line.

    python benchmarks/signals.py --together --signals 20
"""

import argparse
import hashlib
import json
import signal
import socket
import tempfile
import time
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from subprocess import TimeoutExpired

import numpy as np
from random_model import opt_config, start, write_model, write_text
from rich.console import Console
from rich.table import Table

from idp_jax.jobs.marker import MARKER

_LIMIT = 10.0  # seconds from a signal to the end
_PATIENCE = 80.0  # seconds until a process has noticed that another one is gone
_TOGETHER = "train together"
_NOTICED = "idp-jax: another process of this job has ended"
_LENGTH, _WORDS = 32, 512
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What differs between two calls that do the same in two folders; the last three are digests of what
# is compared itself, and of which some names the folder or a time.
_MEASURED = {
    "environment",
    "seconds",
    "time",
    "peak_memory",
    "latency",
    "config",
    "adapter",
    "last",
    "digest",
}
# Between the interpreter's start and our first module Python answers SIGINT itself.
_BEFORE_US = (
    "Traceback (most recent call last):\n"
    '  File "<string>", line 1, in <module>\n'
    "KeyboardInterrupt\n"
)
_BROKEN = ("Traceback", "Segmentation fault", "Fatal Python error", "core dumped")


@dataclass
class Tally:
    """What became of a command's signals."""

    signals: int = 0
    finished: int = 0
    jobs: int = 0
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def commands(files: Path) -> dict[str, tuple]:
    """Every command's options; its folder comes behind them."""
    model, text = files / "model", files / "text.txt"
    training = ("train", "--model", model, "--data.train", text, "--data.validation-windows", 4)
    training += ("--data.sequence-length", _LENGTH, "--batch-size", 2, "--evaluate-every", 16)
    training += ("--checkpoint-every", 12, "--tokens", 96 * 2 * _LENGTH)
    compressing = ("compress", model, "--calibration", text, "--samples", 8)
    compressing += ("--sequence-length", _LENGTH, "--allow-worse", ".*")
    scoring = ("eval", "--model", model, "--perplexity", text, "--sequence-length", _LENGTH)
    return {
        **{f"train {name}": (*training, "--method", name) for name in ("prefix", "lora")},
        "train prompt": (*training, "--method", "prompt", "--prompt-length", 5),
        "train idp": (*training, "--method", "idp", "--pool-lengths", 3, 6),
        "compress": compressing,
        "eval": (*scoring, "--batch-size", 1, "--tasks", "knowledge", "--limit", 2),
        "demo": ("demo", "--config_path", files / "demo.yaml"),
    }


def together(files: Path) -> tuple:
    """Options of the training of two processes."""
    training = ("train", "--model", files / "model", "--data.train", files / "text.txt")
    training += ("--data.sequence-length", _LENGTH, "--batch-size", 8, "--tokens", 24 * 8 * _LENGTH)
    training += ("--data.validation-windows", 8, "--evaluate-every", 8, "--checkpoint-every", 3)
    return (*training, "--method", "lora", "--mesh.data", 4, "--mesh.fsdp", 2)


class Pair:
    """Two processes of one job, used like one; a signal goes to one of them, or to both."""

    def __init__(self, arguments: tuple, log: Path, rng: np.random.Generator, **variables: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        variables |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        variables |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        variables |= {"JAX_PLATFORMS": "cpu"}
        self.log, self.rng = log, rng
        self.processes = [
            start(*arguments, log=log, JAX_PROCESS_ID=str(number), **variables)
            for number in range(2)
        ]

    def meet(self) -> None:
        """Waits until both have joined the job: before, one waits five minutes for another."""
        met = lambda: "peer ranks" in self.log.read_text(errors="replace")
        while not met() and all(process.poll() is None for process in self.processes):
            time.sleep(0.05)

    def wait(self, timeout: float | None = None) -> int:
        """Their status: one that nobody sent or chose, before that of the signal, before 0."""
        ends = None if timeout is None else time.monotonic() + timeout
        left = lambda: None if ends is None else max(0.0, ends - time.monotonic())
        codes = {process.wait(left()) for process in self.processes} - {0}
        return min(codes - {1, -signal.SIGKILL} or codes, default=0)

    def send_signal(self, number: int) -> None:
        """To the first, to the second, or to both of them."""
        chosen = self.rng.integers(1, 4)
        for place, process in enumerate(self.processes):
            if chosen & (1 << place):
                process.send_signal(number)

    def kill(self) -> None:
        """Ends what still runs."""
        for process in self.processes:
            process.kill()

    def faults(self) -> list[str]:
        """What a process that was left alone did not say."""
        alone = 1 in {process.returncode for process in self.processes}
        said = self.log.read_text(errors="replace")
        return ["says nothing"] if alone and _NOTICED not in said else []


def write_files(files: Path) -> None:
    """The model, the text and the demo's settings."""
    write_model(files / "model", opt_config(6, 64, _WORDS, 4 * _LENGTH))
    write_text(files / "text.txt", _WORDS, 120 * _LENGTH)
    tokenizer = files / "model" / "tokenizer_config.json"
    ends = {"bos_token": "w1", "eos_token": "w1"}  # which the harness asks for
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | ends))
    settings = {
        "model": str(files / "model"),
        "sequence_length": _LENGTH,
        "calibration_windows": 8,
        "validation_windows": 4,
        "train_tokens": 24 * 4 * _LENGTH,
        "items": 2,
        "compression": {"group_size": 32, "allow_worse": [".*"]},
        "adapters": {"idp": {"method": "idp", "pool_lengths": [2, 4]}},
        "variants": [
            {"name": "dense", "role": "dense"},
            {"name": "compressed", "role": "compressed", "compression": "compressed"},
            {"name": "IDP", "role": "repaired", "compression": "compressed", "adapter": "idp"},
        ],
        "timing": {"prompt_length": 8, "new_tokens": 4, "repeats": 1},
    }
    (files / "demo.yaml").write_text(json.dumps(settings))


def placed(name: str, out: Path) -> tuple:
    """The option that names a job's result."""
    return ("--out", out / "results.json" if name == "eval" else out)


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file that a user is given, without times and the folder's own name."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        # A folder's list of its files holds the digests of those that say how long a job took.
        timed = file.suffix in (".png", ".yaml") or file.name in (MARKER, "timing.jsonl")
        if "checkpoints" in file.parts or timed:
            continue
        data = file.read_bytes()
        if file.suffix == ".json":
            data = json.dumps(_without(json.loads(data))).encode()
        found[name] = hashlib.sha256(data.replace(str(folder).encode(), b"")).hexdigest()
    return found


def _without(value):
    if isinstance(value, list):
        return [_without(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _without(entry) for key, entry in value.items() if key not in _MEASURED}
    return value


class Bench:
    """Jobs of one model, with what has been compiled once kept between them."""

    def __init__(self, files: Path, rng: np.random.Generator, is_pair: bool):
        self.files, self.log, self.rng = files, files / "log", rng
        self.commands = {_TOGETHER: together(files)} if is_pair else commands(files)
        self.limit = _PATIENCE if is_pair else _LIMIT
        self.cache = {
            "JAX_COMPILATION_CACHE_DIR": str(files / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def call(self, name: str, out: Path):
        """A process of a command that works in `out`, or two that have met."""
        self.log.write_text("")
        arguments = (*self.commands[name], *placed(name, out))
        if name != _TOGETHER:
            return start(*arguments, log=self.log, **self.cache)
        pair = Pair(arguments, self.log, self.rng, **self.cache)
        pair.meet()
        return pair

    def whole(self, name: str, out: Path) -> float:
        """Runs a job to its end; returns its seconds."""
        out.parent.mkdir(parents=True, exist_ok=True)
        process = self.call(name, out)
        started = time.perf_counter()
        code = process.wait()
        if code:
            raise SystemExit(f"{name} failed with {code}:\n{self.log.read_text()[-2000:]}")
        return time.perf_counter() - started

    def interrupt(self, name: str, out: Path, moment: float, number: int, tally: Tally) -> bool:
        """Sends a signal `moment` seconds after the start; False where the job comes to its end."""
        process = self.call(name, out)
        try:
            process.wait(moment)
        except TimeoutExpired:
            process.send_signal(number)
        else:
            return False
        sent = time.perf_counter()
        tally.signals += 1
        where = f"{name}, {signal.Signals(number).name} after {moment:.2f} s"
        try:
            code = process.wait(2 * self.limit)
        except TimeoutExpired:
            process.kill()
            code = process.wait()
        seconds = time.perf_counter() - sent
        tally.seconds.append(seconds)
        tally.finished += code == 0
        said = self.log.read_text(errors="replace")
        if isinstance(process, Pair):
            tally.wrong += [f"{where}: {fault}" for fault in process.faults()]
        if seconds > self.limit:
            tally.wrong.append(f"{where}: {seconds:.1f} s to end")
        # A signal before the interpreter is there ends it the system's way: -2 and -15.
        if code not in (0, 128 + number, -number):
            tally.wrong.append(f"{where}: exit code {code}: {said[-300:]}")
        if said != _BEFORE_US and any(word in said for word in _BROKEN):
            tally.wrong.append(f"{where}: {said[-1500:]}")
        return code != 0


def main() -> None:
    """Prints a table; fails if a call did not end as it should, or with another result."""
    # In the background SIGINT may be ignored, and processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--signals", type=int, default=28)
    parser.add_argument("--only", help="commands whose name holds this word")
    parser.add_argument(
        "--together", action="store_true", help="kill one training of two processes"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    numbers = cycle((signal.SIGKILL,) if options.together else _SIGNALS)
    with tempfile.TemporaryDirectory() as temporary:
        files = Path(temporary)
        write_files(files)
        bench = Bench(files, rng, options.together)
        names = [name for name in bench.commands if options.only in (None, *name.split())]
        tallies = {name: Tally() for name in names}
        times, expected = {}, {}
        for name in names:
            bench.whole(name, files / "compiled" / name)
            times[name] = bench.whole(name, files / "whole" / name)
            expected[name] = contents(files / "whole" / name)
            print(f"{name}: {times[name]:.1f} s undisturbed", flush=True)
        turn = cycle(names)
        while (left := options.signals - sum(t.signals for t in tallies.values())) > 0:
            name = next(turn)
            tally = tallies[name]
            tally.jobs += 1
            out = files / "interrupted" / f"{name} {tally.jobs}"
            out.parent.mkdir(exist_ok=True)
            for moment in rng.uniform(0, times[name], min(int(rng.integers(1, 9)), left)):
                if not bench.interrupt(name, out, float(moment), next(numbers), tally):
                    times[name] = min(times[name], float(moment) + 1.0)  # it is faster than it was
                    break
            # What is written as a whole is refused another time.
            written = {"compress": out, "eval": out / "results.json"}.get(name)
            complete = written is not None and written.exists()
            if not complete:
                bench.whole(name, out)
            found = contents(out)
            other = [n for n in found | expected[name] if found.get(n) != expected[name].get(n)]
            if other:
                tally.wrong.append(f"{name}, job {tally.jobs}: differs in {', '.join(other)}")
            last = f"; {tally.wrong[-1]}" if tally.wrong else ""
            print(
                f"{name} {tally.jobs}: {tally.signals} signals, {len(tally.wrong)} wrong{last}",
                flush=True,
            )
    report(tallies)


def report(tallies: dict[str, Tally]) -> None:
    """The table, and what went wrong."""
    table = Table("command", "jobs", "signals", "finished", "mean s", "longest s", "wrong")
    for name, tally in tallies.items():
        seconds = tally.seconds or [0.0]
        table.add_row(
            name,
            str(tally.jobs),
            str(tally.signals),
            str(tally.finished),
            f"{np.mean(seconds):.2f}",
            f"{max(seconds):.2f}",
            str(len(tally.wrong)),
        )
    Console(width=100).print(table)
    wrong = [line for tally in tallies.values() for line in tally.wrong]
    total = sum(tally.signals for tally in tallies.values())
    print(f"{total} signals, {len(wrong)} ends that are not as they should be")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()

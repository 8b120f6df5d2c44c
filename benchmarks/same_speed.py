"""Whether a change of the code changes how fast it is: this checkout beside an earlier revision.

    python benchmarks/same_speed.py --before REVISION

Times SmolLM2-135M's forward, a prompt step and greedy decoding in a process for either side, which
take turns step by step, and whole `compress` and `eval` commands, which take turns too. Prints the
medians and their ratio, of commands that of the processor's time, too, which other work on the
machine changes less; above the bar the exit is 1. Nothing compiled is kept between processes.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
BAR = 1.03  # times the seconds before
JOBS = ("forward", "prompt step", "greedy decode")
CALL = [sys.executable, "-c", "from idp_jax.cli import main; main()"]
REST = [r"layers\.[2-9]\. skip", r"layers\.[12]\d\. skip"]

# Reads the name of a job from every line, does it, and prints its seconds.
_WORKER = """
import sys, time
import jax, numpy as np, optax
from idp_jax import load_model
from idp_jax.data.batch import Batch
from idp_jax.inference.generation import generate
from idp_jax.recover import SoftPrompt
from idp_jax.training.objectives import next_token
from idp_jax.training.step import TrainState, make_train_step

ids = np.random.default_rng(0).integers(100, 40_000, (4, 256)).astype(np.int32)
model, optimizer = load_model("smollm2-135m"), optax.adamw(1e-3)
step = make_train_step(optimizer, next_token)
box = [TrainState.start(SoftPrompt.init(model, 50, jax.random.key(0)), optimizer)]

def train():
    box[0], metrics = step(box[0], model, Batch(ids))
    return box[0], metrics

jobs = {
    "forward": lambda: model(ids),
    "prompt step": train,
    "greedy decode": lambda: generate(model, ids[:, :64], max_new_tokens=64),
}
for line in sys.stdin:
    began = time.perf_counter()
    jax.block_until_ready(jobs[line.strip()]())
    print(time.perf_counter() - began, flush=True)
"""


def main() -> None:
    """Prints a line for every job; fails above the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="a git revision")
    parser.add_argument("--repeats", type=int, default=15, help="of every step")
    parser.add_argument("--commands", type=int, default=3, help="repeats of every command")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="same-speed-") as scratch:
        tree = Path(scratch) / "before"
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), options.before], check=True)
        try:
            sides = {"before": tree, "here": HERE}
            slower = steps(sides, options.repeats)
            slower += commands(sides, options.commands, Path(scratch))
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    raise SystemExit("\n".join(f"{name} is slower than before" for name in slower))


def steps(sides: dict[str, Path], repeats: int) -> list[str]:
    """Times every step on both sides by turns; returns those above the bar."""
    slower = []
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", _WORKER],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    bufsize=1,
                    cwd=checkout,  # which Python searches first
                    env=_environment(checkout),
                )
            )
            for name, checkout in sides.items()
        }
        for job in JOBS:
            seconds = {name: [] for name in sides}
            for turn in range(repeats + 1):
                for name in sorted(sides, reverse=bool(turn % 2)):
                    print(job, file=workers[name].stdin)
                    found = float(workers[name].stdout.readline())
                    if turn:  # the first compiles
                        seconds[name].append(found)
            slower += _compared(job, seconds)
        for worker in workers.values():
            worker.stdin.close()
    return slower


def commands(sides: dict[str, Path], repeats: int, scratch: Path) -> list[str]:
    """Times whole commands on both sides by turns; returns those above the bar."""
    text = scratch / "text.txt"
    text.write_text(
        " ".join(f"Line {n} has {n * n % 17} words of {n % 5} kinds." for n in range(5000))
    )
    sizes = ["--samples", "8", "--sequence-length", "256", "--calibration", text]
    asked = {
        "compress": ["compress", "smollm2-135m", *sizes, "--rules", *REST],
        "eval": ["eval", "--model", "smollm2-135m", "--tasks", "knowledge", "--limit", "30",
                 "--perplexity", text, "--windows", "8", "--sequence-length", "256"],
    }  # fmt: skip
    slower = []
    for job, arguments in asked.items():
        seconds, worked = ({name: [] for name in sides} for _ in range(2))
        for turn in range(repeats):
            for name in sorted(sides, reverse=bool(turn % 2)):
                out = scratch / f"{job}-{name}-{turn}"
                call = [*CALL, *map(str, arguments), "--out", str(out)]
                began, used = time.perf_counter(), _worked()
                subprocess.run(
                    call,
                    check=True,
                    capture_output=True,
                    cwd=sides[name],
                    env=_environment(sides[name]),
                )
                seconds[name].append(time.perf_counter() - began)
                worked[name].append(_worked() - used)
        slower += _compared(job, seconds)
        _compared(f"{job}, CPU", worked)
    return slower


def _worked() -> float:
    """Seconds of processors that ended children have taken."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def _environment(checkout: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(checkout), "JAX_COMPILATION_CACHE_DIR": ""}


def _compared(job: str, seconds: dict[str, list[float]]) -> list[str]:
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    turns = [here / before for before, here in zip(seconds["before"], seconds["here"], strict=True)]
    ratio = statistics.median(turns)  # of neighbours in time, which share the machine's mood
    print(
        f"{job:14} before {middle['before']:6.2f} s, here {middle['here']:6.2f} s: "
        f"{ratio:.3f} times (turns {min(turns):.2f} to {max(turns):.2f}), bar {BAR}",
        flush=True,
    )
    return [job] if ratio > BAR else []


if __name__ == "__main__":
    main()

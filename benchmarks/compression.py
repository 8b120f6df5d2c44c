"""GPTQ of SmolLM2 by this library and by GPTQModel: time, memory and perplexity, in one run.

Both read the same folder in float32, calibrate on the same tokens (the first windows of C4's
documents joined by blank lines, no special tokens) and write the same form: 3 bits, groups of 64,
asymmetric, everything else by each program's own defaults. Each run is a process of its own, the
two sides in turn; time is from the start of the process to its end, memory the largest resident set
that the system counted for it. Our evaluator then reads both folders. Runs in the environment of
`make interop`.
"""

if __name__ != "__main__":
    # JAX asks for Python 3.14's package of this name, and finds this script beside other scripts.
    raise ModuleNotFoundError("benchmarks/compression.py is a script")

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from idp_jax import commands, config
from idp_jax.jobs.machine import describe

MODEL = "smollm2-135m"
SAMPLES, LENGTH, BITS, GROUP_SIZE = 32, 512, 3, 64
WINDOWS = 40
# What ours may cost or lose at most, as a fraction of theirs.
BARS = {"seconds": 0.45, "peak_mib": 0.6, "perplexity": 1.0}
PUBLISHED = {"seconds": 163.0, "perplexity": 67.26}  # GPTQModel 7.7.0 on two cores
_HERE = Path(__file__).resolve().parent
_OURS = "from idp_jax.cli import main; main()"


def _command(side: str, folder: Path, out: Path, text: Path, options: list[str]) -> list[str]:
    numbers = map(str, (SAMPLES, LENGTH, BITS, GROUP_SIZE))
    if side == "GPTQModel":
        job = str(_HERE / "gptqmodel_job.py")
        return [sys.executable, job, str(folder), str(out), str(text), *numbers]
    names = ("--samples", "--sequence-length", "--bits", "--group-size")
    pairs = [part for pair in zip(names, numbers, strict=True) for part in pair]
    places = [str(folder), "--out", str(out), "--calibration", str(text)]
    return [sys.executable, "-c", _OURS, "compress", *places, *pairs, *options]


def _measure(command: list[str], log: Path) -> tuple[float, float]:
    """Seconds of a process and the MiB that it held at most; it runs where its log is."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(_HERE.parent),
        # GPTQModel's pools ask for more workers than it finds by itself on two cores.
        "GPTQMODEL_CPU_WORKERS": os.environ.get("GPTQMODEL_CPU_WORKERS", "4"),
    }
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=log.parent
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[:3]} failed:\n{log.read_text(errors='replace')[-3000:]}")
    return seconds, usage.ru_maxrss / 1024


def _perplexity(folder: Path, data: Path, scratch: Path) -> float:
    results = commands.evaluate(
        config.Evaluate(
            model=str(folder),
            out=scratch / "results.json",
            perplexity=data / "wikitext2/test.jsonl",
            sequence_length=LENGTH,
            windows=WINDOWS,
        )
    )
    return results["perplexity"]["perplexity"]


def _run(data: Path, repeats: int, options: list[str], scratch: Path) -> dict:
    """By side, the figures of `BARS`, and every run's own."""
    # In a process of its own: what this one holds when it starts another counts for that one too.
    source = scratch / "model"
    convert = ["convert", MODEL, "--to", "dense", "--dtype", "float32", "--out", str(source)]
    subprocess.run([sys.executable, "-c", _OURS, *convert], check=True)
    runs: dict[str, list[tuple[float, float]]] = {"GPTQModel": [], "idp-jax": []}
    for repeat in range(repeats):
        for side, measured in runs.items():
            out, log = scratch / f"{side}-{repeat}", scratch / f"{side}.log"
            command = _command(side, source, out, data / "c4/train.jsonl", options)
            measured.append(_measure(command, log))
            print(f"{side}: {measured[-1][0]:.1f} s, {measured[-1][1]:.0f} MiB", flush=True)
    settings = (scratch / "GPTQModel.log").read_text(errors="replace").strip().splitlines()[-1]
    return {
        side: {
            "seconds": statistics.median(seconds for seconds, _ in measured),
            "peak_mib": max(mib for _, mib in measured),
            "perplexity": _perplexity(scratch / f"{side}-0", data, scratch),
            "runs": measured,
            "settings": settings if side == "GPTQModel" else options,
        }
        for side, measured in runs.items()
    }


def _show(figures: dict) -> dict[str, float]:
    """Prints the table and returns the ratios."""
    theirs, ours = figures["GPTQModel"], figures["idp-jax"]
    ratios = {key: ours[key] / theirs[key] for key in BARS}
    table = Table(title=f"{MODEL}: GPTQ to {BITS} bits, groups of {GROUP_SIZE}")
    for column in ("", "GPTQModel", "published", "idp-jax", "ratio", "bar"):
        table.add_column(column, justify="right" if column else "left")
    for key, bar in BARS.items():
        published = f"{PUBLISHED[key]:.2f}" if key in PUBLISHED else ""
        numbers = (f"{theirs[key]:.2f}", published, f"{ours[key]:.2f}", f"{ratios[key]:.3f}")
        table.add_row(key.replace("_", " "), *numbers, f"{bar}")
    Console(width=90).print(table)
    return ratios


def main() -> None:
    """Measures both sides and fails where ours is worse than its bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with c4/ and wikitext2/")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments, options = parser.parse_known_args()  # the rest goes to `idp-jax compress`
    with tempfile.TemporaryDirectory() as scratch:
        figures = _run(arguments.data.resolve(), arguments.repeats, options, Path(scratch))
    ratios = _show(figures)
    packages = ("gptqmodel", "torch", "safetensors", "tokenizers")
    figures |= {
        "ratios": ratios,
        "bars": BARS,
        "published": PUBLISHED,
        "environment": {**describe(), **{package: version(package) for package in packages}},
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2))
    worse = [key for key, bar in BARS.items() if ratios[key] > bar]
    raise SystemExit(f"worse than the bar: {', '.join(worse)}" if worse else 0)


if __name__ == "__main__":
    main()

"""Compression jobs killed at random moments and started again: results must not differ by a bit.

One job runs undisturbed. Others are killed (SIGKILL) at moments spread over the time that the first
one took, some of them more than once, and started again until they finish.

    python benchmarks/kill_compression.py --kills 20
"""

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from subprocess import Popen, TimeoutExpired

import numpy as np
from random_model import opt_config, start, write_model, write_text

_TIMES = ("seconds", "peak_memory")
_SAMPLES, _LENGTH = 8, 64


def run(arguments: tuple, log: Path, patience: float | None = None) -> bool:
    """Runs a job to its end, or kills it after `patience` seconds; True if it was killed."""
    # What was compiled once is read back, so that most of a job's time is its own work.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(log.with_name("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    process: Popen = start("compress", *arguments, log=log, **cache)
    try:
        code = process.wait(patience)
    except TimeoutExpired:
        process.kill()
        process.wait()
        return True
    if code:
        raise SystemExit(f"a job failed with {code}:\n{log.read_text()[-2000:]}")
    return False


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file; of the report without its times, its memory and its folder."""
    found = {}
    for file in sorted(folder.rglob("*")):
        data = file.read_bytes() if file.is_file() else b"folder"
        if file.name == "compression.json":
            report = json.loads(data)
            report = {key: value for key, value in report.items() if key not in _TIMES}
            report["config"].pop("out")
            data = json.dumps(report).encode()
        found[str(file.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def disturbed(arguments: tuple, out: Path, log: Path, moments: list[float]) -> int:
    """Kills a job after each of `moments` seconds in turn; returns how many of them hit it."""
    asked = (*arguments, "--out", out)
    hits = 0
    for moment in moments:
        if not run(asked, log, moment):
            return hits
        hits += 1
        if out.exists():  # killed on its way out, with everything done
            return hits
    run(asked, log)
    return hits


def differences(folder: Path, reference: dict[str, str]) -> list[str]:
    """Files that differ from the reference, or that only one side has."""
    found = contents(folder)
    names = sorted(found.keys() | reference.keys())
    return [name for name in names if found.get(name) != reference.get(name)]


def main() -> None:
    """Prints a line for every job; fails if one ends otherwise than the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--model", help="another model than a random one; needs --calibration")
    parser.add_argument("--calibration")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        model, text, log = options.model, options.calibration, scratch / "log"
        if model is None:
            config = opt_config(options.layers, options.width, 512, 2 * _LENGTH)
            write_model(scratch / "model", config)
            write_text(scratch / "text.txt", 512, _SAMPLES * _LENGTH)
            model, text = scratch / "model", scratch / "text.txt"
        arguments = (model, "--calibration", text, "--samples", _SAMPLES)
        arguments += ("--sequence-length", _LENGTH, "--allow-worse", ".*")
        results = scratch / "results"
        results.mkdir()
        run((*arguments, "--out", scratch / "compiled"), log)
        started = time.perf_counter()
        run((*arguments, "--out", results / "whole"), log)
        whole = time.perf_counter() - started
        print(f"undisturbed: {whole:.1f} s", flush=True)
        reference = contents(results / "whole")
        kills, wrong, job = 0, [], 0
        while kills < options.kills:
            job += 1
            count = min(int(rng.integers(1, 5)), options.kills - kills)
            moments = [round(float(moment), 2) for moment in rng.uniform(0, whole, count)]
            out = results / f"killed-{job}"
            hits = disturbed(arguments, out, log, moments)
            kills += hits
            other = differences(out, reference)
            wrong += other
            print(
                f"job {job}: killed {hits} times of {moments} s; "
                f"{', '.join(other) if other else 'bit-identical'}",
                flush=True,
            )
        expected = {"whole", *(f"killed-{number}" for number in range(1, job + 1))}
        stray = sorted(path.name for path in results.iterdir() if path.name not in expected)
    print(f"{kills} kills of {job} jobs; differing files {len(wrong)}, stray files {len(stray)}")
    if wrong or stray:
        raise SystemExit(f"not as the undisturbed job left it: {', '.join([*wrong, *stray])}")


if __name__ == "__main__":
    main()

"""Two processes begin the same job in one place: one does it, the other ends with one line.

The result must be that of a job that ran alone.

    python benchmarks/two_processes.py --pairs 3
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import Popen

from random_model import command
from small_jobs import SAVE, jobs, result, write_inputs

_SAID = ("is being written by", "exists; give another")


def begin(arguments: list[str]) -> Popen:
    """Starts a process of this checkout."""
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables
    )


def faults(name: str, pair: list[Popen], alone: dict[str, bytes], out: Path) -> list[str]:
    """What is not as it should be after both have ended."""
    said = [process.communicate()[0] for process in pair]
    codes = [process.returncode for process in pair]
    # A run that is found complete is reported: a second one that comes late ends well, too.
    late = name == "train" and codes == [0, 0]
    wrong = [] if sorted(map(bool, codes)) == [False, True] or late else [f"ended with {codes}"]
    for code, text in zip(codes, said, strict=True):
        line = next((line for line in text.splitlines() if line.startswith("idp-jax: ")), "")
        if code and not any(words in text for words in _SAID):
            wrong.append(f"says {line or text[-500:]!r}")
        if "Traceback" in text:
            wrong.append("a traceback")
    if result(out) != alone:
        wrong.append("another result than alone")
    stray = [path.name for path in out.parent.iterdir() if path != out]
    return wrong + [f"left {name}" for name in stray]


def main() -> None:
    """Prints a line for every kind of job; fails if a pair of one ended otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch, bad = Path(temporary), 0
        write_inputs(scratch)
        kinds = {
            name: lambda out, make=make: command(*make(out)) for name, make in jobs(scratch).items()
        }
        kinds["save"] = lambda out: [sys.executable, "-c", SAVE, str(scratch / "model"), str(out)]
        for name, make in kinds.items():
            place = "out.json" if name == "eval" else "out"
            (scratch / f"{name}-alone").mkdir()
            first = begin(make(scratch / f"{name}-alone" / place))
            text = first.communicate()[0]
            if first.returncode:
                raise SystemExit(f"{name} alone failed:\n{text[-2000:]}")
            alone, wrong = result(scratch / f"{name}-alone" / place), []
            for number in range(options.pairs):
                folder = scratch / f"{name}-{number}"
                folder.mkdir()
                out = folder / place
                wrong += faults(name, [begin(make(out)) for _ in range(2)], alone, out)
            bad += len(wrong)
            print(f"{name}: {options.pairs} pairs, {', '.join(wrong) or 'one does it'}", flush=True)
    if bad:
        raise SystemExit(f"{bad} faults")


if __name__ == "__main__":
    main()

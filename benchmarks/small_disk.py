"""Every command on a disk of 3 MB that is nearly full: one line that names what, and nothing half.

After room is made the same command succeeds. A disk of memory is mounted, which root may do.

    python benchmarks/small_disk.py
"""

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from random_model import command
from small_jobs import jobs, result, write_inputs
from two_processes import begin

_SIZE = 3_000_000  # bytes


@contextmanager
def disk(place: Path, size: int) -> Iterator[None]:
    """A disk of so many bytes at a place."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def finished(name: str, out: Path) -> bool:
    """Whether something stands under the final name that passes for a result."""
    return (out / "result.json" if name == "train" else out).exists()


def faults(name: str, make, place: Path, room: int) -> list[str]:
    """What is not as it should be when a command finds `room` bytes, and then more of them."""
    out, wrong = place / ("out.json" if name == "eval" else "out"), []
    ballast = place / "ballast"
    ballast.write_bytes(bytes(_SIZE - room))
    process = begin(command(*make(out)))
    text = process.communicate()[0]
    lines = [line for line in text.splitlines() if line.startswith("idp-jax: ")]
    if process.returncode == 0:
        return [f"needs no more than {room} bytes: give less"]
    if "Traceback" in text or len(lines) != 1 or str(place) not in lines[0]:
        wrong.append(f"says {text[-1500:]!r}")
    if finished(name, out):
        wrong.append("half a result under the final name")
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=1g", place], check=True)
    process = begin(command(*make(out)))
    text = process.communicate()[0]
    if process.returncode or not result(out):
        wrong.append(f"does not go on when there is room: {text[-1500:]!r}")
    return wrong


def main() -> None:
    """Prints a line for every command and room; fails if one ended otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rooms", type=int, nargs="+", default=[0, 4096, 20_000, 200_000])
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        write_inputs(scratch, layers=8, width=128)
        for name, make in jobs(scratch).items():
            for room in options.rooms if name != "eval" else options.rooms[:1]:
                with disk(scratch / f"{name}-{room}", _SIZE):
                    wrong = faults(name, make, scratch / f"{name}-{room}", room)
                bad += len(wrong)
                print(f"{name}, {room} bytes free: {', '.join(wrong) or 'one line'}", flush=True)
    if bad:
        raise SystemExit(f"{bad} faults")


if __name__ == "__main__":
    main()

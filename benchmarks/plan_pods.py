"""Plans every command line of configs/pods with the compilers of their targets; prints a table.

    make plan-pods                                             # installs the compilers, runs this
    python benchmarks/plan_pods.py --programs step --only llama-7b,h100:8

The first lines of a file of configs/pods are the commands, one for each target, and what to plan
them with. Every target is planned in a process of its own (a compiler may abort), which takes
minutes; what is planned lies in the folder and is not planned again with the same versions and
commit. The exit status is 1 where something does not compile or does not fit.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "pods"
_COMMAND = re.compile(r"# python train\.py --config_path (\S+)(.*?)\s{2,}\((\S+)\)")
_MODEL = re.compile(r"Planned with (--model .*)")
_COLUMNS = ("target", "program", "GiB held", "at most", "of", "ms at least", "MFU at most")


class Target(NamedTuple):
    """One command line of configs/pods.

    Attributes:
        file: of the settings, from the checkout on.
        topology: of its devices.
        options: of the training, those for this target.
        model: options of `idp-jax plan` that stand for the model.
    """

    file: str
    topology: str
    options: tuple[str, ...]
    model: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{Path(self.file).stem}, {self.topology}"


def every_target() -> list[Target]:
    """All command lines, in the order of the files."""
    found = []
    for path in sorted(FOLDER.glob("*.yaml")):
        text = path.read_text()
        model = _MODEL.search(text)
        assert model is not None, f"{path} does not say with which model it is planned"
        for file, options, topology in _COMMAND.findall(text):
            found.append(
                Target(file, topology, tuple(shlex.split(options)), tuple(model[1].split()))
            )
    return found


def plan_here(target: Target, programs: str) -> list[dict[str, Any]]:
    """What `idp-jax plan` finds of each program."""
    from idp_jax.cli import parse
    from idp_jax.config import Plan
    from idp_jax.pods.plan import plan

    options = (*target.options, *target.model, "--topology", target.topology)
    words = [target.file, *options, "--programs", programs]
    planned = plan(parse(Plan, words, "plan"), lambda line: print(line, file=sys.stderr))
    topology, rows = planned.topology, []
    for report in planned.reports:
        compiled = report.counts is not None
        rows.append(
            {
                "program": report.name,
                "held": report.held,
                "peak": report.peak,
                "memory": topology.chip.memory,
                "fits": report.fits(topology),
                "seconds": report.bound(topology) if compiled else None,
                "mfu": report.utilization(topology) if compiled and report.useful else None,
            }
        )
    return rows


def versions() -> dict[str, str]:
    """Of what compiles, and of this code."""
    found = {}
    for name in ("jax", "libtpu", "jax-cuda13-pjrt"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    commit = ("git", "rev-parse", "--short", "HEAD")
    said = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True, check=False)
    return {**found, "commit": said.stdout.strip()}


def planned(target: Target, programs: str, out: Path) -> dict[str, Any]:
    """What the folder knows of a target, or what another process finds."""
    name = re.sub(r"\W+", "-", f"{target.name} {programs}").strip("-")
    file, made = out / f"{name}.json", versions()
    known = json.loads(file.read_text()) if file.exists() else {}
    if known.get("versions") == made and known.get("rows"):
        return known
    command = [sys.executable, __file__, "--here", target.name, "--programs", programs]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    known = {"target": target.name, "versions": made, "rows": None, "error": ""}
    if found.returncode:
        lines = found.stderr.strip().splitlines() or ["nothing"]
        known["error"] = f"the compiler ends with {found.returncode}: {lines[-1][:200]}"
    else:
        known["rows"] = json.loads(found.stdout.splitlines()[-1])
    file.write_text(json.dumps(known, indent=1) + "\n")
    return known


def table_rows(known: dict[str, Any]) -> list[str]:
    """Rows of the table for one target."""
    if not known["rows"]:
        return [f"| {known['target']} | {known['error']} | | | | | |"]
    lines = []
    for row in known["rows"]:
        size = lambda key, row=row: f"{row[key] / 2**30:.2f}" if row[key] else ""
        peak = size("peak") if row["fits"] else f"**{size('peak')}, does not fit**"
        least = "" if row["seconds"] is None else f"{1e3 * row['seconds']:,.3g}"
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.0%}"
        cells = (known["target"], row["program"], size("held"), peak, size("memory"), least, mfu)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    """Prints a row for each program of each target."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/plan-pods"))
    parser.add_argument("--only", help="words that a target's name holds, all of them, with commas")
    parser.add_argument("--programs", default="", help="as of idp-jax plan")
    parser.add_argument("--here", help="plan this target in this process, and print JSON")
    arguments = parser.parse_args()
    targets = every_target()
    if arguments.here:
        target = next(t for t in targets if t.name == arguments.here)
        print(json.dumps(plan_here(target, arguments.programs)))
        return 0
    for word in filter(None, (arguments.only or "").split(",")):
        targets = [t for t in targets if word in t.name]
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{name} {number}" for name, number in versions().items()) + "\n")
    print("| " + " | ".join(_COLUMNS) + " |\n" + "|---" * len(_COLUMNS) + "|", flush=True)
    bad = not targets
    for target in targets:
        known = planned(target, arguments.programs, arguments.out)
        print("\n".join(table_rows(known)), flush=True)
        bad = bad or not all(row["fits"] for row in known["rows"] or [{"fits": False}])
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())

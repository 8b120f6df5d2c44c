"""Whether a change of the code changes what the commands write.

    python benchmarks/same_behaviour.py --before REVISION

Compresses two layers of SmolLM2 in five ways, trains every method for 20 steps on the result and
scores each adapter on 54 questions and a text, once with the code of REVISION (in a git worktree)
and once with this checkout's. Equal means: the same bytes of every weight and adapter, the same
metrics of every step, the same score of every item. What differs is printed, and the exit is 1.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
CALL = [sys.executable, "-c", "from idp_jax.cli import main; main()"]
REST = [r"layers\.[2-9]\. skip", r"layers\.[12]\d\. skip"]
COMPRESSIONS = {
    "gptq": [],
    "gptq-plain": ["--act-order", "none", "--grid", "minmax", "--bits", "4"],
    "rtn": ["--method", "rtn", "--bits", "8", "--format", "pack-quantized"],
    "sparsegpt": ["--method", "sparsegpt", "--sparsity", "2:4"],
    "wanda": ["--method", "wanda", "--format", "sparse-bitmask"],
}
METHODS = ("prompt", "prefix", "lora", "idp")
VOLATILE = {"seconds", "wall", "time", "environment", "config", "peak_memory"}


def main() -> None:
    """Runs both and compares them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", required=True, help="a git revision")
    parser.add_argument("--work", type=Path, help="where to write; results there are used again")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="same-behaviour-"))
    commit = _git("rev-parse", "--short", options.before)
    before, tree = work / f"before-{commit}", work / f"tree-{commit}"
    if not tree.is_dir():
        _git("worktree", "add", "--detach", str(tree), commit)
    try:
        run_all(tree, before)
    finally:
        _git("worktree", "remove", "--force", str(tree))
    after = work / "after"
    run_all(HERE, after)
    differing = compare(before, after)
    for line in differing:
        print("differs:", line)
    print(f"{len(facts(before))} facts compared, {len(differing)} differ")
    raise SystemExit(bool(differing))


def run_all(checkout: Path, out: Path) -> None:
    """Every command, with the code of `checkout`; what is there already is not run again."""
    out.mkdir(parents=True, exist_ok=True)
    text = out / "text.txt"
    if not text.is_file():
        text.write_text(_text())
    for name, options in COMPRESSIONS.items():
        sizes = ["--samples", "4", "--sequence-length", "128", "--calibration", text]
        target = ["--out", out / name, "--rules", *REST]
        _call(checkout, out / name, "compress", "smollm2-135m", *sizes, *target, *options)
    model = out / "gptq"
    for method in METHODS:
        _call(
            checkout, out / method / "adapter", "train", "--model", model, "--method", method,
            "--out", out / method, "--tokens", "2560", "--data.sequence-length", "64",
            "--data.train", text, "--data.validation-windows", "4", "--evaluate-every", "10",
            "--pool-lengths", "4", "8", "--prompt-length", "8",
        )  # fmt: skip
    for method in (None, *METHODS):
        file = out / f"eval-{method or 'compressed'}.json"
        adapter = [] if method is None else ["--adapter", out / method / "adapter"]
        _call(
            checkout, file, "eval", "--model", model, "--out", file, *adapter, "--tasks",
            "knowledge", "--limit", "6", "--perplexity", text, "--sequence-length", "64",
            "--windows", "8",
        )  # fmt: skip
    _call(
        checkout, out / "converted", "convert", model, "--to", "dense", "--out", out / "converted"
    )


def compare(before: Path, after: Path) -> list[str]:
    """What one of two runs has that the other has not, or has otherwise."""
    first, second = facts(before), facts(after)
    names = sorted(first.keys() | second.keys())
    return [
        f"{name}: {first.get(name, 'nothing')} and {second.get(name, 'nothing')}"
        for name in names
        if first.get(name) != second.get(name)
    ]


def facts(out: Path) -> dict[str, str]:
    """What a run came to, by name: hashes of weights, numbers of metrics and scores."""
    found = {}
    for file in sorted(out.rglob("*.safetensors")):
        found[str(file.relative_to(out))] = hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(out.rglob("metrics.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            for key in ("loss", "gradient_norm", "validation_loss"):
                if key in row:
                    found[f"{file.relative_to(out)} step {row['step']} {key}"] = repr(row[key])
    for file in sorted(out.rglob("compression.json")):
        rows = json.loads(file.read_text())["matrices"]
        found[str(file.relative_to(out))] = json.dumps(rows, sort_keys=True)
    for file in sorted(out.glob("eval-*.json")):
        tree = json.loads(file.read_text())
        found |= {f"{file.name} {name}": repr(value) for name, value in _scores(tree).items()}
    return found


def _scores(results: dict) -> dict[str, object]:
    """Scores by name of an evaluation's results, of this schema or of that before version 1."""
    if "schema" not in results:
        tasks, text = results["tasks"], results["perplexity"]
        return {
            "per_window_nll": text["per_window_nll"],
            "samples": tasks["samples"],
            "choices": tasks["prompt_choices"],
        }
    variant = results["variants"][0]
    return {
        "per_window_nll": variant["perplexity"]["per_window_nll"],
        "samples": {name: row["samples"] for name, row in variant["tasks"].items()},
        "choices": {n: row["choices"] for n, row in variant["tasks"].items() if row["choices"]},
    }


def _text() -> str:
    """The questions of the built-in probe as prose."""
    rows = []
    for file in sorted((HERE / "idp_jax/evaluation/tasks/knowledge").glob("*.jsonl")):
        rows += [json.loads(line) for line in file.read_text().splitlines()]
    words = (f"{row['context']} {row['choices'][row['answer']]}." for row in rows)
    return "\n".join(words)


def _call(checkout: Path, result: Path, *arguments: object) -> None:
    if result.exists():
        return
    print(checkout.name, *map(str, arguments[:4]), flush=True)
    environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*CALL, *map(str, arguments)], env=environment, cwd=checkout,
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{arguments[0]} failed: {done.stderr[-2000:]}")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=HERE, check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()

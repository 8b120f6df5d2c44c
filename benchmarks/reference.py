"""Compresses SmolLM2 by the reference protocol and prints each row beside the published one.

The reference rows were measured with the algorithms' own public implementations. Protocol:
calibration on the first 32
windows of 512 tokens of C4 (documents joined by blank lines), perplexity on the first 40 windows of
512
tokens of WikiText-2's test pages joined by blank lines, no special tokens.
"""

import argparse
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from idp_jax import commands, config
from idp_jax.compress.run import compress

# name: (options of compress, reference perplexity, allowed excess)
ROWS = {
    "dense": (None, 28.712, 0.003),
    "rtn 3 bit": ({"method": "rtn", "bits": 3, "group_size": -1}, 562.165, 0.05),
    "gptq 3 bit": ({"method": "gptq", "bits": 3, "group_size": -1}, 187.094, 0.12),
    "gptq 3 bit group 64": ({"method": "gptq", "bits": 3, "group_size": 64}, 86.802, 0.05),
    "gptq 4 bit group 64": ({"method": "gptq", "bits": 4, "group_size": 64}, 37.162, 0.05),
    "sparsegpt 50 %": ({"method": "sparsegpt", "sparsity": "0.5"}, 57.502, 0.05),
    "sparsegpt 2:4": ({"method": "sparsegpt", "sparsity": "2:4"}, 121.940, 0.05),
}
MODEL = "smollm2-135m"


def _row(name: str, data: Path, scratch: Path) -> tuple[float, float]:
    """Perplexity, and seconds of compression."""
    options, _, _ = ROWS[name]
    model, seconds = MODEL, 0.0
    if options is not None:
        out = scratch / name.replace(" ", "_").replace("%", "").replace(":", "-")
        report = compress(
            config.Compress(
                model=MODEL,
                out=out,
                calibration=str(data / "c4/train.jsonl"),
                samples=32,
                sequence_length=512,
                **options,
            )
        )
        model, seconds = str(out), sum(report["seconds"].values())
    results = commands.evaluate(
        config.Evaluate(
            model=model,
            out=scratch / "results.json",
            perplexity=data / "wikitext2/test.jsonl",
            sequence_length=512,
            windows=40,
        )
    )
    return results["perplexity"]["perplexity"], seconds


def main() -> None:
    """Runs the rows that are asked for and fails if one is worse than its bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with c4/ and wikitext2/")
    parser.add_argument("--rows", default=",".join(ROWS), help="rows to run, separated by commas")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    table = Table(title=f"{MODEL}, WikiText-2 perplexity", show_lines=False)
    for column in ("row", "perplexity", "reference", "ratio", "bar", "compression s", ""):
        table.add_column(column, justify="left" if column in ("row", "") else "right")
    figures, failed = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        for name in [name.strip() for name in arguments.rows.split(",")]:
            _, reference, excess = ROWS[name]
            perplexity, seconds = _row(name, arguments.data, Path(scratch))
            ratio = perplexity / reference
            good = ratio <= 1 + excess and (name != "dense" or ratio >= 1 - excess)
            failed += [] if good else [name]
            figures[name] = {"perplexity": perplexity, "ratio": ratio, "seconds": seconds}
            cells = (
                f"{perplexity:.3f}",
                f"{reference:.3f}",
                f"{ratio:.3f}",
                f"{1 + excess:.3f}",
                f"{seconds:.1f}",
            )
            table.add_row(name, *cells, "ok" if good else "WORSE")
    Console(width=110).print(table)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2))
    raise SystemExit(f"worse than the bar: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()

"""Compresses SmolLM2 by the reference protocol and prints each row beside the published one.

The reference rows were measured with the algorithms' own public implementations; rows without a
published one are there to be compared with each other. Protocol: calibration on the first 32
windows of 512 tokens of C4 (documents joined by blank lines), perplexity on the first 40 windows of
512 tokens of WikiText-2's test pages joined by blank lines, no special tokens.

Where compression leaves little of the model, rounding alone moves the perplexity: `--batch-sizes`
runs a row with calibration windows summed 1, 2, 4 at a time, say, which changes nothing else, and
holds the mean against the published figure.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from idp_jax import commands, config
from idp_jax.compression.job import compress
from idp_jax.jobs.progress import console

# What the public implementations do.
_PLAIN = {"method": "gptq", "act_order": "none", "grid": "minmax"}
# GPTQModel 7.7.0 with its defaults (group-aware reordering on).
_GPTQMODEL = 67.3
_SPARSE = {"method": "sparsegpt"}

# name: (options of compress, the perplexity to hold against, allowed excess)
ROWS = {
    "dense": (None, 28.712, 0.003),
    "rtn 3 bit": ({"method": "rtn", "grid": "minmax", "bits": 3, "group_size": -1}, 562.165, 0.03),
    "gptq 3 bit": ({**_PLAIN, "bits": 3, "group_size": -1}, 187.094, 0.08),
    "gptq 3 bit group 64": ({**_PLAIN, "bits": 3, "group_size": 64}, 86.802, 0.03),
    "gptq 4 bit group 64": ({**_PLAIN, "bits": 4, "group_size": 64}, 37.162, 0.03),
    "sparsegpt 50 %": ({**_SPARSE, "sparsity": "0.5"}, 57.502, 0.03),
    "sparsegpt 2:4": ({**_SPARSE, "sparsity": "2:4"}, 121.940, 0.03),
    "wanda 50 %": ({"method": "wanda", "sparsity": "0.5"}, None, 0),
    "3 bit group 64 (defaults)": ({}, _GPTQMODEL, 0),
    "3 bit group 64 (order alone)": ({"grid": "minmax"}, None, 0),
    "3 bit group 64 (static order)": ({"act_order": "static"}, _GPTQMODEL, 0),
    "3 bit group 64 (mse alone)": ({"act_order": "none"}, None, 0),
    "3 bit (defaults)": ({"group_size": -1}, 187.094, 0),
    "4 bit group 64 (defaults)": ({"bits": 4}, 37.162, 0),
    "4 bit group 64 and 50 % zeros": ({"bits": 4, "sparsity": "0.5"}, None, 0),
    "4 bit group 64 and 2:4 zeros": ({"bits": 4, "sparsity": "2:4"}, None, 0),
}
MODEL = "smollm2-135m"


def _row(name: str, data: Path, batch_size: int, scratch: Path) -> tuple[float, float]:
    """Perplexity, and seconds of compression."""
    options, _, _ = ROWS[name]
    model, seconds = MODEL, 0.0
    if options is not None:
        out = scratch / name.replace(" ", "_").replace("%", "").replace(":", "-")
        out = out.with_name(f"{out.name}_{batch_size}")
        report = compress(
            config.Compress(
                model=MODEL,
                out=out,
                calibration=str(data / "c4/train.jsonl"),
                samples=32,
                sequence_length=512,
                batch_size=batch_size,
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
    parser.add_argument("--batch-sizes", default="2", help="of calibration, separated by commas")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    table = Table(
        title=f"{MODEL}, WikiText-2 perplexity, batch sizes {arguments.batch_sizes}",
        show_lines=False,
    )
    for column in ("row", "perplexity", "reference", "ratio", "bar", "compression s", ""):
        table.add_column(column, justify="left" if column in ("row", "") else "right")
    figures, failed = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        for name in [name.strip() for name in arguments.rows.split(",")]:
            _, reference, excess = ROWS[name]
            sizes = ["1"] if name == "dense" else arguments.batch_sizes.split(",")
            drawn = [_row(name, arguments.data, int(size), Path(scratch)) for size in sizes]
            perplexity, seconds = (statistics.mean(figures) for figures in zip(*drawn, strict=True))
            ratio = None if reference is None else perplexity / reference
            good = ratio is None or ratio <= 1 + excess
            if name == "dense" and ratio is not None:
                good = abs(ratio - 1) <= excess
            failed += [] if good else [name]
            figures[name] = {
                "perplexity": perplexity,
                "of batch sizes": dict(zip(sizes, (figure for figure, _ in drawn), strict=True)),
                "ratio": ratio,
                "seconds": seconds,
            }
            cells = (
                f"{perplexity:.3f}",
                "" if reference is None else f"{reference:.3f}",
                "" if ratio is None else f"{ratio:.3f}",
                "" if reference is None else f"{1 + excess:.3f}",
                f"{seconds:.1f}",
            )
            console.print(name, *(f"{perplexity:.3f}" for perplexity, _ in drawn), highlight=False)
            table.add_row(name, *cells, "ok" if good else "WORSE")
    Console(width=110).print(table)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2))
    raise SystemExit(f"worse than the bar: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()

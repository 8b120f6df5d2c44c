"""The most memory that compressing a large model takes: a bar of 2.5 GB for a model of that size.

Writes a randomly initialised OPT (by default of OPT-1.3B's shape, 2.6 GB in bfloat16), compresses
it in another process and reads that process' peak resident memory from the system.

    python benchmarks/large_model.py                 # 24 layers: minutes
    python benchmarks/large_model.py --layers 2      # the short form, with the same peak
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from random_model import opt_config, start, write_model, write_text
from rich.console import Console
from rich.table import Table

from idp_jax.jobs.machine import describe

BAR = 2.5e9


def compress(model: Path, text: Path, out: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds and peak resident bytes of `idp-jax compress`."""
    # Random weights gain nothing from second-order information that must hold in every matrix.
    asked = ("--method", options.method, "--allow-worse", ".*")
    windows = ("--samples", options.samples, "--sequence-length", options.sequence_length)
    windows += ("--batch-size", options.batch_size)
    log, started = out.with_suffix(".log"), time.perf_counter()
    arguments = ("compress", model, "--out", out, "--calibration", text, *windows, *asked)
    code = start(*arguments, log=log).wait()
    seconds = time.perf_counter() - started
    sys.stderr.write(log.read_text())
    if code:
        raise SystemExit(f"idp-jax compress failed with {code}")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    return {"seconds": seconds, "peak_bytes": peak}


def main() -> None:
    """Prints sizes, peak and seconds; fails above the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--scratch", type=Path, help="where to write the models, and keep them")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        model, text, out = scratch / "model", scratch / "text.txt", scratch / "out"
        config = opt_config(options.layers, options.width)
        size = write_model(model, config)
        tokens = options.samples * options.sequence_length
        write_text(text, config["vocab_size"], tokens)
        found = compress(model, text, out, options)
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    found = {"bytes": size, "compressed_bytes": written, **found, "bar": BAR}
    shape = f"OPT, {options.layers} layers of width {options.width}, {options.method}"
    table = Table(title=f"{shape}, {options.samples} x {options.sequence_length} tokens")
    for column in ("GB on disk", "GB compressed", "peak GB", "bar GB", "seconds"):
        table.add_column(column, justify="right")
    sizes = (size, written, found["peak_bytes"], BAR)
    table.add_row(*(f"{value / 1e9:.2f}" for value in sizes), f"{found['seconds']:.0f}")
    Console(width=110).print(table)
    if options.out:
        options.out.write_text(json.dumps(found | {"environment": describe()}, indent=2))
    if found["peak_bytes"] > BAR:
        raise SystemExit(f"{found['peak_bytes'] / 1e9:.2f} GB is more than {BAR / 1e9:.1f} GB")


if __name__ == "__main__":
    main()

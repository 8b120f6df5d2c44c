"""How the time of compression grows with width, depth and text, on random LLaMAs.

Each point is the best of some runs after one that compiles; the exponent is the slope of the
logarithms. Text and depth should cost in proportion (0.8 to 1.1). What the cores do does not
depend on the text, so its exponent is that of the forward passes and Hessians.

    python benchmarks/compression_scaling.py --figure docs/compression_scaling.png
"""

import argparse
import json
import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from compile_time import model_of
from rich.console import Console
from rich.table import Table

from idp_jax.compression.driver import StageTimes, compress
from idp_jax.config import Compression
from idp_jax.jobs.machine import describe

AXES = {
    "width": (64, 128, 256, 512),
    "layers": (2, 4, 8, 16),
    "samples": (256, 512, 1024, 2048),  # 1024 are the papers' 262,144 tokens
}
START = {"width": 128, "layers": 2, "samples": 16}
# Growth below proportion is no fault; far below, the measure would be wrong.
BARS = {"layers": ("all", 0.8, 1.1), "samples": ("text", 0.8, 1.1)}
LENGTH, BATCH = 256, 8
KINDS = {"all": "all", "text": "forward, Hessians", "core": "cores"}


def measure(width: int, layers: int, samples: int, repeats: int) -> dict[str, float]:
    """Seconds in all, of what the text costs (forward passes and Hessians), and of the cores."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(0, 0.05, leaf.shape).astype(leaf.dtype)
    model = jax.tree.map(draw, model_of(layers, width))
    vocabulary = model.config.vocab_size
    tokens = rng.integers(0, vocabulary, (samples, LENGTH)).astype(np.int32)
    settings = Compression(allow_worse=(".*",))
    runs = []
    for _ in range(repeats + 1):
        times, started = StageTimes(), time.perf_counter()
        compress(model, settings, tokens, batch_size=BATCH, times=times)
        seconds = time.perf_counter() - started
        text = times.seconds["forward"] + times.seconds["hessian"]
        runs.append({"all": seconds, "text": text, "core": times.seconds["core"]})
    return {kind: min(run[kind] for run in runs[1:]) for kind in KINDS}


def exponent(values: tuple, seconds: list[float]) -> float:
    """Slope of log(seconds) over log(values)."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def draw(points: dict, exponents: dict, path: Path) -> None:
    """One panel an axis, both scales logarithmic."""
    figure, panels = plt.subplots(1, len(AXES), figsize=(11, 3.6), layout="constrained")
    for panel, (axis, values) in zip(panels, AXES.items(), strict=True):
        for kind, name in KINDS.items():
            seconds = [point[kind] for point in points[axis]]
            label = f"{name}: exponent {exponents[axis][kind]:.2f}"
            panel.loglog(values, seconds, marker="o", label=label)
        fixed = ", ".join(f"{START[other]} {other}" for other in START if other != axis)
        panel.set_title(fixed.replace(f"{START['width']} width", f"width {START['width']}"))
        panel.set_xlabel(f"{axis} of {LENGTH} tokens" if axis == "samples" else axis)
        panel.set_xticks(values, map(str, values))
        panel.minorticks_off()
        panel.legend(fontsize=8)
    panels[0].set_ylabel("seconds")
    figure.suptitle("Compression to 3 bits (gptq, group 64), random LLaMA")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints all points and the exponents; fails if depth or text costs more than in proportion."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2, help="the fastest of this many counts")
    parser.add_argument("--figure", type=Path, help="write the figure to this PNG file")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    points, exponents, failed = {}, {}, []
    table = Table(title="seconds of compression")
    for column in ("", "", *KINDS.values()):
        table.add_column(column, justify="right")
    for axis, values in AXES.items():
        points[axis] = [measure(**{**START, axis: n}, repeats=options.repeats) for n in values]
        for value, point in zip(values, points[axis], strict=True):
            table.add_row(axis, str(value), *(f"{point[kind]:.2f}" for kind in KINDS))
        exponents[axis] = {
            kind: exponent(values, [point[kind] for point in points[axis]]) for kind in KINDS
        }
        slopes = (f"{exponents[axis][kind]:.2f}" for kind in KINDS)
        table.add_row(axis, "exponent", *slopes, end_section=True)
    Console(width=100).print(table)
    for axis, (kind, low, high) in BARS.items():
        if not low <= exponents[axis][kind] <= high:
            failed.append(f"{axis} {exponents[axis][kind]:.2f}, not {low} to {high}")
    if options.figure:
        draw(points, exponents, options.figure)
    if options.out:
        found = {"axes": AXES, "points": points, "exponents": exponents}
        options.out.write_text(json.dumps(found | {"environment": describe()}, indent=2))
    if failed:
        raise SystemExit(f"exponents out of bounds: {'; '.join(failed)}")


if __name__ == "__main__":
    main()

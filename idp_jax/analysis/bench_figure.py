"""The figure of a bench: every round of every variant, its median, and the roofline's bound."""

from pathlib import Path

import numpy as np

from idp_jax.config.choices import Repair
from idp_jax.evaluation.bench_results import BenchResults

_QUANTITIES = {"ttft": "time to first token", "tpot": "time per output token"}
_COLOURS: dict[Repair | None, str] = {
    None: "#4c4c4c",
    "prompt": "#a9c9d9",
    "prefix": "#5f9ea0",
    "idp": "#2a6f97",
    "lora": "#b23a48",
    "norms": "#8a8a8a",
}


def draw_bench(results: BenchResults, path: Path) -> None:
    """Draws a row for each batch size, time to first token on the left, per output token beside.

    Args:
        results: of something that was timed.
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, sizes = results.variants, list(results.variants[0].runs)
    figure, axes = pyplot.subplots(
        len(sizes),
        len(_QUANTITIES),
        figsize=(12, (0.9 + 0.28 * len(rows)) * len(sizes)),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    config = results.config
    figure.suptitle(
        f"{config['prompt_length']} + {config['new_tokens']} tokens: rounds, median (stroke) and "
        "least time by the roofline (triangle)"
    )
    for line, size in zip(axes, sizes, strict=True):
        for axis, (quantity, title) in zip(line, _QUANTITIES.items(), strict=True):
            for place, row in enumerate(rows):
                values, colour = row.runs[size].values(quantity), _COLOURS[row.repair]
                axis.plot(values, [place] * len(values), "o", color=colour, alpha=0.35, ms=4)
                style = {"color": colour, "markersize": 14, "markeredgewidth": 2}
                axis.plot([np.median(values)], [place], "|", **style)
                least = getattr(row.bounds[size], f"{quantity}_ms")
                axis.plot([least], [place], ">", color=colour, ms=5, markerfacecolor="white")
            axis.set(title=f"{title}, batch {size}", xlabel="ms", xlim=(0, None))
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_yticks(range(len(rows)), [row.name for row in rows])
        line[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)

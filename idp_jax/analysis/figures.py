"""Figures for people who would rather look than read tables."""

from pathlib import Path
from typing import Any

_COLOURS = {"dense": "#4c4c4c", "compressed": "#b23a48"}
_REPAIRED = "#2a6f97"
_CONTROL = "#a9c9d9"


def comparison(variants: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draws perplexity, knowledge accuracy and the pool's choices side by side.

    Args:
        variants: rows of the demo's results: name, perplexity, accuracy {value, low, high}, and
            where there is a pool
            `choices` {prompt: count}.
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [row["name"] for row in variants]
    colours = [_colour(name) for name in names]
    pool = next(
        (row for row in variants if row.get("choices") and "random" not in row["name"]), None
    )
    figure, axes = pyplot.subplots(
        1,
        3 if pool else 2,
        figsize=(13 if pool else 9, 4.2),
        layout="constrained",
        width_ratios=[3, 3, 1.6] if pool else [1, 1],
    )
    figure.suptitle(title)
    values = [row["perplexity"] for row in variants]
    bars = axes[0].bar(names, values, color=colours)
    axes[0].bar_label(bars, fmt="%.1f", padding=2)
    axes[0].set(
        ylabel="perplexity (lower is better)", title="held-out text", ylim=(0, max(values) * 1.12)
    )
    for name, colour, row in zip(names, colours, variants, strict=True):
        value, low, high = (100 * row["accuracy"][key] for key in ("value", "low", "high"))
        reach = [[value - low], [high - value]]
        axes[1].errorbar([name], [value], yerr=reach, fmt="o", color=colour, capsize=5)
    axes[1].set(ylabel="accuracy, % (bars: 95 %)", title="knowledge probe", ylim=(0, 100))
    axes[1].axhline(25, linestyle=":", color="grey")
    axes[1].annotate("chance", (0, 26), color="grey", fontsize="small")
    for axis in axes[:2]:
        axis.tick_params(axis="x", rotation=25)
        axis.spines[["top", "right"]].set_visible(False)
    if pool:
        bars = axes[2].bar(list(pool["choices"]), list(pool["choices"].values()), color=_REPAIRED)
        axes[2].bar_label(bars, padding=2)
        axes[2].set(title="choices of the pool", ylabel="questions")
        axes[2].spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _colour(name: str) -> str:
    return _CONTROL if "random" in name else _COLOURS.get(name, _REPAIRED)

"""The figure of a sweep: what each recipe gave back, and how its learning rate was chosen."""

import math
from pathlib import Path

from idp_jax.evaluation.sweep_results import RecipeResult, SweepResults


def draw_sweep(results: SweepResults, path: Path) -> None:
    """Draws a row for each compressed model: shares by recipe, and loss over learning rate.

    Args:
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.compression for row in results.recipes))
    recipes = list(dict.fromkeys(row.recipe for row in results.recipes))
    colours = {name: f"C{number % 10}" for number, name in enumerate(recipes)}
    height = 1.6 + max(2.2, 0.42 * len(recipes))
    figure, axes = pyplot.subplots(
        len(names), 2, figsize=(12, height * len(names)), layout="constrained", squeeze=False
    )
    for (left, right), name in zip(axes, names, strict=True):
        rows = [row for row in results.recipes if row.compression == name]
        _draw_shares(left, rows, colours, name)
        _draw_rates(right, rows, colours)
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)


def _draw_shares(axis, rows: list[RecipeResult], colours: dict, title: str) -> None:
    """Seeds as points, their mean with the interval over windows as a bar."""
    for place, row in enumerate(rows):
        axis.plot(row.shares, [place] * len(row.shares), "o", color=colours[row.recipe], alpha=0.45)
        found = row.share_windows
        if found is not None:
            reach = [[found.value - found.low], [found.high - found.value]]
            style = {"fmt": "|", "markersize": 14, "capsize": 4, "color": colours[row.recipe]}
            axis.errorbar([found.value], [place], xerr=reach, **style)
        elif row.chosen is None:
            axis.annotate("all trials diverged", (0, place), va="center", fontsize="small")
    axis.set_yticks(range(len(rows)), [row.recipe for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.axvline(0, linestyle=":", color="grey")
    axis.axvline(1, linestyle=":", color="grey")
    axis.set(
        title=title,
        xlabel="share of the lost log-perplexity that came back (bars: 95 % of windows)",
    )


def _draw_rates(axis, rows: list[RecipeResult], colours: dict) -> None:
    """Loss of every trial; the chosen one is filled, those that diverged are crosses above."""
    known = [t.loss for row in rows for t in row.trials if math.isfinite(t.loss)]
    for row in rows:
        good = [trial for trial in row.trials if math.isfinite(trial.loss)]
        rates, losses = [t.learning_rate for t in good], [t.loss for t in good]
        colour = colours[row.recipe]
        axis.plot(rates, losses, "o-", color=colour, label=row.recipe, markerfacecolor="white")
        chosen = [(t.learning_rate, t.loss) for t in good if t.learning_rate == row.chosen]
        axis.plot(*zip(*chosen, strict=True) if chosen else ([], []), "o", color=colour)
        failed = [t.learning_rate for t in row.trials if not math.isfinite(t.loss)]
        axis.plot(failed, [max(known, default=1.0)] * len(failed), "x", color=colour)
    axis.set_xscale("log")
    axis.set(
        title="trials (filled: chosen, crosses: diverged)",
        xlabel="learning rate",
        ylabel="validation loss, nats a token",
    )
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)

"""Figures of a grid: what repairs cost and give, where, and what pools choose."""

import math
from pathlib import Path

from idp_jax.config.experiment import ORACLE
from idp_jax.evaluation.grid_results import Grid, Row
from idp_jax.evaluation.statistics import Estimate

_ROLES = {"dense": "#4c4c4c", "compressed": "#b23a48"}


def draw_grid(grid: Grid, folder: Path) -> None:
    """Writes grid.png, recovery.png and, where there are pools, choices.png.

    A panel of each is a compressed model.

    Args:
        folder: where they go.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(grid.contrasts)
    if not panels:
        return
    colours = _colours(grid)
    for name, draw, columns, height in (
        ("grid", _draw_overview, 2, 4.0),
        ("recovery", _draw_recovery, 1, _recovery_height(grid)),
        ("choices", _draw_choices, 1, _choices_height(grid)),
    ):
        if name == "choices" and not _pools(grid.rows):
            continue
        figure, axes = pyplot.subplots(
            len(panels),
            columns,
            figsize=(11, height * len(panels)),
            layout="constrained",
            squeeze=False,
        )
        for line, (model, compression) in zip(axes, panels, strict=True):
            rows = [
                row
                for row in grid.rows
                if row.model == model and row.compression in (None, compression)
            ]
            draw(line, rows, colours, f"{model}, {compression}")
            for axis in line:
                axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / f"{name}.png", dpi=120, format="png")
        pyplot.close(figure)


def _label(row: Row) -> str:
    """What a row is, without its model."""
    if row.role in ("dense", "compressed"):
        return row.role
    return row.name if row.compression is None else row.name.partition(" + ")[2]


def _colours(grid: Grid) -> dict[str, str]:
    labels = dict.fromkeys(_label(row) for row in grid.rows if row.role not in _ROLES)
    return _ROLES | {label: f"C{number % 10}" for number, label in enumerate(labels)}


def _reach(found: Estimate, scale: float = 100) -> list[list[float]] | None:
    """Error bars, where there are bounds."""
    if not math.isfinite(found.low) or not math.isfinite(found.high):
        return None
    return [[scale * (found.value - found.low)], [scale * (found.high - found.value)]]


def _draw_overview(axes, rows: list[Row], colours: dict[str, str], title: str) -> None:
    """Accuracy against parameters, and against perplexity."""
    shown = [row for row in rows if row.mean is not None and not row.name.endswith(ORACLE)]
    for row in shown:
        label, mean = _label(row), row.mean
        assert mean is not None
        style = {"color": colours[label], "capsize": 3, "label": label}
        style["fmt"] = "o" if row.role != "control" else "x"
        axes[0].errorbar([row.parameters], [100 * mean.value], yerr=_reach(mean), **style)
        if row.perplexity is not None and math.isfinite(row.perplexity):
            axes[1].errorbar([row.perplexity], [100 * mean.value], yerr=_reach(mean), **style)
    axes[0].set_xscale("symlog", linthresh=1000)
    axes[1].set_xscale("log")
    axes[0].set(title=title, xlabel="extra parameters", ylabel="accuracy, % (bars: 95 % of items)")
    axes[1].set(title="crosses: controls", xlabel="perplexity of the reported text")
    _name(axes[1])


def _name(axis) -> None:
    """A legend beside the axis; where nothing was drawn there is nothing to name."""
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _repairs(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.role == "repaired" and row.change is not None]


def _recovery_height(grid: Grid) -> float:
    tasks = {task for row in grid.rows for task in row.tasks}
    return 1.4 + 0.22 * max(len(tasks), 1) * max(len({_label(r) for r in _repairs(grid.rows)}), 1)


def _draw_recovery(axes, rows: list[Row], colours: dict[str, str], title: str) -> None:
    """By task, what each repair gains over the compressed model, and what there was to gain."""
    axis, repairs = axes[0], _repairs(rows)
    bare = next((row for row in rows if row.role == "compressed"), None)
    tasks = list(dict.fromkeys(task for row in repairs for task in row.tasks))
    for place, task in enumerate(tasks):
        if bare is not None and bare.change is not None and task in bare.change.tasks:
            lost = -100 * bare.change.tasks[task].value
            label = "lost to compression" if not place else None
            axis.barh(place, lost, height=0.8, color="#e6e6e6", label=label)
        for number, row in enumerate(repairs):
            assert row.change is not None
            found = row.change.tasks[task]
            height = place + 0.7 * ((number + 0.5) / len(repairs) - 0.5)
            style = {"fmt": "o", "capsize": 2, "markersize": 4, "color": colours[_label(row)]}
            label = _label(row) if not place else None
            value = [100 * found.value]
            axis.errorbar(value, [height], xerr=_reach(found), label=label, **style)
    axis.set_yticks(range(len(tasks)), tasks)
    axis.set_ylim(len(tasks) - 0.5, -0.5)
    axis.axvline(0, linestyle=":", color="grey")
    axis.set(title=title, xlabel="points over the compressed model (bars: 95 % of items)")
    _name(axis)


def _pools(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.choices and not row.name.endswith(ORACLE)]


def _choices_height(grid: Grid) -> float:
    return 1.2 + 0.35 * max(len({_label(row) for row in _pools(grid.rows)}), 1)


def _draw_choices(axes, rows: list[Row], colours: dict[str, str], title: str) -> None:
    """How often each prompt of a pool was chosen."""
    from matplotlib import colormaps

    axis, pools = axes[0], _pools(rows)
    most = max((len(row.prompts) for row in pools), default=1)
    for place, row in enumerate(pools):
        total, left = sum(row.choices or ()), 0.0
        for number, count in enumerate(row.choices or ()):
            colour = colormaps["viridis"](number / max(most - 1, 1))
            axis.barh(place, count / total, left=left, color=colour)
            if count / total > 0.08:
                text = (left + count / total / 2, place, row.prompts[number])
                light = "white" if number < most / 2 else "black"
                axis.text(*text, ha="center", va="center", fontsize="small", color=light)
            left += count / total
    axis.set_yticks(range(len(pools)), [_label(row) for row in pools])
    axis.set(title=title, xlabel="share of the questions", xlim=(0, 1))
    axis.set_ylim(len(pools) - 0.5, -0.5)

"""Figures for people who would rather look than read tables."""

import math
from pathlib import Path

from idp_jax.config.choices import Role
from idp_jax.evaluation.comparison import pooled_accuracy
from idp_jax.evaluation.pool_results import Kind, Policy, Study
from idp_jax.evaluation.results import VariantResult

_COLOURS: dict[Role, str] = {
    "dense": "#4c4c4c",
    "compressed": "#b23a48",
    "repaired": "#2a6f97",
    "control": "#a9c9d9",
}

_KINDS: dict[Kind, str] = {
    "control": "#4c4c4c",
    "fixed": "#a9c9d9",
    "selector": "#2a6f97",
    "other": "#b23a48",
    "bound": "#8a8a8a",
}


def comparison(
    variants: list[VariantResult], title: str, path: Path, *, chance: float | None = None
) -> None:
    """Draws perplexity, accuracy and the choices of a repaired model's pool side by side.

    Args:
        variants: measured with tasks and perplexity.
        path: the PNG to write.
        chance: the accuracy of guessing, drawn as a line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pool = next((row for row in variants if row.role == "repaired" and row.choices), None)
    figure, axes = pyplot.subplots(
        1,
        3 if pool else 2,
        figsize=(13 if pool else 9, 4.2),
        layout="constrained",
        width_ratios=[3, 3, 1.6] if pool else [1, 1],
    )
    figure.suptitle(title)
    _draw_perplexity(axes[0], variants)
    _draw_accuracy(axes[1], variants, chance)
    for axis in axes[:2]:
        axis.tick_params(axis="x", rotation=25)
        axis.spines[["top", "right"]].set_visible(False)
    if pool:
        names = [name.replace(", ", "\n") for name in pool.prompt_names]
        bars = axes[2].bar(names, pool.choices, color=_COLOURS[pool.role])
        axes[2].bar_label(bars, padding=2)
        axes[2].set(title="choices of the pool", ylabel="questions")
        axes[2].margins(y=0.12)
        axes[2].locator_params(axis="y", integer=True)
        axes[2].spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)


def _draw_perplexity(axis, variants: list[VariantResult]) -> None:
    # An infinite perplexity has no bar.
    shown = [row for row in variants if row.perplexity and math.isfinite(row.perplexity.perplexity)]
    found = [row.perplexity for row in shown if row.perplexity]
    names, values = [row.name for row in shown], [text.perplexity for text in found]
    between = [text.interval or (text.perplexity, text.perplexity) for text in found]
    reach = [
        [value - low for value, (low, _) in zip(values, between, strict=True)],
        [min(high, 2 * value) - value for value, (_, high) in zip(values, between, strict=True)],
    ]
    bars = axis.bar(names, values, color=[_COLOURS[row.role] for row in shown])
    if names:
        axis.errorbar(names, values, yerr=reach, fmt="none", ecolor="black", capsize=5)
    axis.bar_label(bars, fmt="%.1f", label_type="center", color="white")
    axis.set(ylabel="perplexity, lower is better (bars: 95 %)", title="held-out text")
    highest = [value + above for value, above in zip(values, reach[1], strict=True)]
    axis.set_ylim(0, max(highest, default=1) * 1.05)


def _draw_accuracy(axis, variants: list[VariantResult], chance: float | None) -> None:
    for row in variants:
        estimate = pooled_accuracy(row)
        if estimate is not None:
            value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
            reach = [[value - low], [high - value]]
            colour = _COLOURS[row.role]
            axis.errorbar([row.name], [value], yerr=reach, fmt="o", color=colour, capsize=5)
    axis.set(ylabel="accuracy, % (bars: 95 %)", title="all tasks", ylim=(0, 100))
    if chance is not None:
        axis.axhline(100 * chance, linestyle=":", color="grey")
        axis.annotate("chance", (0, 100 * chance + 1), color="grey", fontsize="small")


def pool_study(study: Study, title: str, path: Path) -> None:
    """Draws what every policy gains over a random prompt, and which prompts it takes.

    A row for each measure. The stroke beside the oracle is what it would gain of noise alone.

    Args:
        path: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    most = max(len(measure.policies) for measure in study.measures)
    figure, axes = pyplot.subplots(
        len(study.measures),
        2,
        figsize=(13, (1.2 + 0.26 * most) * len(study.measures)),
        layout="constrained",
        width_ratios=[3, 2],
        squeeze=False,
    )
    figure.suptitle(title)
    for (gains, shares), measure in zip(axes, study.measures, strict=True):
        shown = measure.policies[::-1]
        _draw_gains(gains, shown)
        gains.plot(
            [measure.oracle.null], [shown[0].name], marker="|", color="black", ms=14, linestyle=""
        )
        gains.set(title=measure.name, xlabel=f"{measure.unit}, over a random prompt (bars: 95 %)")
        _draw_usage(shares, shown, len(study.prompt_lengths))
        shares.set(title="prompts taken", xlabel=f"share of {measure.items} items")
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def _draw_gains(axis, policies: list[Policy]) -> None:
    for policy in policies:
        gain = policy.gain
        known = math.isfinite(gain.low)  # one item alone has no bounds
        reach = [[gain.value - gain.low], [gain.high - gain.value]] if known else None
        colour = _KINDS[policy.kind]
        axis.errorbar([gain.value], [policy.name], xerr=reach, fmt="o", color=colour, capsize=3)
    axis.set_yticks(range(len(policies)), [policy.short for policy in policies])
    axis.axvline(0, linestyle=":", color="grey")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_usage(axis, policies: list[Policy], prompts: int) -> None:
    from matplotlib import colormaps

    axis.set_yticks(range(len(policies)), [""] * len(policies))
    for row, policy in enumerate(policies):
        if policy.usage is None:
            continue
        total, left = sum(policy.usage.counts), 0.0
        for prompt, count in enumerate(policy.usage.counts):
            colour = colormaps["viridis"](prompt / max(prompts - 1, 1))
            axis.barh(row, count / total, left=left, color=colour)
            left += count / total
    axis.set(xlim=(0, 1), ylim=(-0.6, len(policies) - 0.4))
    axis.spines[["top", "right"]].set_visible(False)

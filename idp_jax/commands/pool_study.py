"""`idp-jax pool-study`: studies a pool's choices, prints a table for each measure, draws them."""

from rich.table import Table

from idp_jax import config
from idp_jax.analysis.figures import pool_study as draw
from idp_jax.commands.tables import columns, show
from idp_jax.evaluation.pool_results import Measure, Study
from idp_jax.evaluation.pool_study import study
from idp_jax.evaluation.statistics import Estimate
from idp_jax.jobs.files import write_file
from idp_jax.jobs.progress import Bars, console


def run(settings: config.PoolStudy) -> None:
    """Studies a pool and prints what was found."""
    figure = settings.out.with_suffix(".png")
    if figure.exists() and not (settings.overwrite and settings.out.exists()):
        remedy = "give another --out" + (", or --overwrite" if settings.out.exists() else "")
        raise config.ConfigError(f"{figure} exists; {remedy}")
    found = study(settings, progress=Bars())
    for measure in found.measures:
        show(measure_table(measure), console)
        console.print(said(measure), highlight=False)
    show(cost_table(found), console)
    write_file(figure, lambda partial: draw(found, f"{settings.adapter}", partial))
    console.print(f"written to {settings.out} and {figure}", highlight=False)


def measure_table(measure: Measure) -> Table:
    """A row for each policy."""
    names = ("mean", "over random", "over best fixed [95 %]", "of oracle", "prompts", "p")
    title = f"{measure.name}: {measure.unit}, {measure.items} items"
    table = columns(title, "policy", names)
    for policy in measure.policies:
        share = "" if policy.recovery is None else f"{100 * policy.recovery.value:.0f} %"
        taken = "" if policy.usage is None else f"{policy.usage.effective:.1f}"
        chance = "" if policy.matching is None else f"{policy.matching.p_value:.3f}"
        changes = f"{policy.gain.value:+.4f}", _change(policy.over_fixed)
        table.add_row(policy.short, f"{policy.mean.value:.4f}", *changes, share, taken, chance)
    return table


def said(measure: Measure) -> str:
    """What the oracle's gain is worth, in a sentence."""
    found = measure.oracle
    verdict = "more than noise gives" if found.beyond.low > 0 else "no more than noise gives"
    return (
        f"{measure.name}: the oracle gains {found.gain:.4f} over a random prompt, {verdict}: "
        f"{found.null:.4f} (difference {_change(found.beyond)})"
    )


def cost_table(found: Study) -> Table:
    """What choosing costs, a row for each selector."""
    title = (
        f"choosing for one input of {found.cost_tokens} tokens (its pass: {found.pass_ms:.1f} ms)"
    )
    table = columns(title, "selector", ("passes", "ms", "bytes of parameters"))
    for name, cost in found.costs.items():
        table.add_row(name, f"{cost.passes:.2f}", f"{cost.ms:.1f}", f"{cost.bytes:,}")
    return table


def _change(estimate: Estimate) -> str:
    return f"{estimate.value:+.4f} [{estimate.low:+.4f},{estimate.high:+.4f}]"

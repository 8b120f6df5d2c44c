"""`idp-jax train`: trains an adapter and says what came of it."""

from typing import Any

from idp_jax import config, training
from idp_jax.commands.tables import show, training_table
from idp_jax.config import url_of
from idp_jax.formats.load import dtype_of
from idp_jax.formats.source import open_config
from idp_jax.jobs.progress import Bars, clock, console, is_first_process
from idp_jax.models.config import from_hf
from idp_jax.training.plan import measured_rate, plan
from idp_jax.training.teacher import check_teacher


def run(settings: config.Train) -> None:
    """Trains an adapter and says what came of it, or plans that and prints the plan."""
    if settings.plan:
        return _plan(settings)

    def say(line: str) -> None:
        if is_first_process():
            console.print(line, highlight=False, soft_wrap=True)

    result = training.train(settings, progress=Bars(), say=say)
    for part in result.get("prompts", [result]):
        perplexity = part["validation_perplexity"]  # null in the file where it is too large
        shown = "inf" if perplexity is None else f"{perplexity:.3f}"
        no_better = not part["best_step"] and result["training_tokens"]
        start = ": no step was better than the start" if no_better else ""
        say(f"best validation perplexity {shown} at step {part['best_step']}{start}")
        if part["stopped_early"]:
            say(
                f"stopped at step {part['last_step']} of {settings.steps}: {settings.patience} "
                "validations without a better one (--patience)"
            )
    if "time" in result:
        say(_spent(result["time"]))
    say(
        f"{result['extra_parameters']:,} parameters, {result['training_tokens']:,} tokens; "
        f"adapter in {url_of(settings.out) or settings.out}/adapter, that of the last step in last"
    )


def _spent(time: dict[str, Any]) -> str:
    """What the time of a call went to: one line."""
    seconds, reached = dict(time["seconds"]), ""
    total = seconds.pop("all")
    others = sorted(seconds.items(), key=lambda each: -each[1])
    parts = [f"{clock(value)} {name}" for name, value in others if value >= 0.5]
    if "mfu" in time:
        reached = f", MFU {time['mfu']:.0%} in them"
    said = f"goodput {time['goodput']:.0%} of {clock(total)} in steps{reached}"
    return ": ".join([said, *([", ".join(parts)] if parts else [])])


def _plan(settings: config.Train) -> None:
    """Prints what the run would take here; of the model its config.json is enough."""
    check_teacher(settings)
    raw = open_config(settings.model)
    model, dtype = from_hf(raw), dtype_of(raw, settings.dtype)
    plans = plan(settings, None)
    tokens = settings.batch_size * settings.data.sequence_length
    console.print("measuring this machine", highlight=False)
    show(training_table(plans, settings, measured_rate(model, dtype, tokens)), console)
    for found in plans:
        warning = found.warning(settings)
        if warning is not None:
            console.print(warning, highlight=False, soft_wrap=True)

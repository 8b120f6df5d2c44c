"""`idp-jax train`: trains an adapter and says what came of it."""

from pathlib import Path

from idp_jax import config, training
from idp_jax.jobs.progress import Bars, console


def run(settings: config.Train) -> None:
    """Trains an adapter and says what came of it."""
    result = training.train(settings, progress=Bars())
    for part in result.get("prompts", [result]):
        console.print(
            f"best validation perplexity {part['validation_perplexity']:.3f} at step "
            f"{part['best_step']}",
            highlight=False,
        )
    console.print(
        f"{result['extra_parameters']:,} parameters, {result['training_tokens']:,} tokens; "
        f"adapter in {Path(settings.out) / 'adapter'}",
        highlight=False,
    )

"""`idp-jax train`: trains an adapter and says what came of it."""

from pathlib import Path

from idp_jax import config, training
from idp_jax.jobs.progress import Bars, console


def run(settings: config.Train) -> None:
    """Trains an adapter and says what came of it."""
    say = lambda line: console.print(line, highlight=False, soft_wrap=True)
    result = training.train(settings, progress=Bars(), say=say)
    for part in result.get("prompts", [result]):
        perplexity = part["validation_perplexity"]  # null in the file where it is too large
        shown = "inf" if perplexity is None else f"{perplexity:.3f}"
        no_better = not part["best_step"] and result["training_tokens"]
        start = ": no step was better than the start" if no_better else ""
        say(f"best validation perplexity {shown} at step {part['best_step']}{start}")
    say(
        f"{result['extra_parameters']:,} parameters, {result['training_tokens']:,} tokens; "
        f"adapter in {Path(settings.out) / 'adapter'}"
    )

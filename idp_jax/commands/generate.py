"""`idp-jax generate`: writes a text to standard output as it comes, or many into a file."""

import sys

from idp_jax import config
from idp_jax.evaluation.generation import generate_texts
from idp_jax.jobs.progress import Bars, console, counted


def run(settings: config.Generate) -> None:
    """Generates, and says how fast."""
    found = generate_texts(settings, progress=Bars(), told=_tell)
    if settings.prompt is not None:
        _tell("\n")
    speed = found.tokens / found.seconds
    texts = counted(len(found.rows), "text")
    console.print(
        f"{texts}, {found.tokens:,} tokens, {speed:.1f} tokens per second (compilation included)",
        highlight=False,
    )
    if settings.out is not None:
        console.print(f"written to {settings.out}", highlight=False)


def _tell(text: str) -> None:
    """Writes text out at once, to a pipe as well."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()

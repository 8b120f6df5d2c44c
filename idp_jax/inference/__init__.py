"""Generation of text."""

from idp_jax.inference.continuous import Completion, complete
from idp_jax.inference.generation import generate

__all__ = ["Completion", "complete", "generate"]

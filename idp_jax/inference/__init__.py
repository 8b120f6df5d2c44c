"""Generation of text."""

from idp_jax.inference.generation import generate

__all__ = ["generate"]

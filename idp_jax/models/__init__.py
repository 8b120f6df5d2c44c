"""Decoder-only language models as flax modules: LLaMA and OPT behind one scan over layers."""

from idp_jax.models.cache import KV
from idp_jax.models.config import ModelConfig
from idp_jax.models.decoder import Decoder

__all__ = ["KV", "Decoder", "ModelConfig"]

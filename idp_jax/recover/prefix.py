"""Prefix tuning: trained keys and values of every layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from idp_jax.models.cache import KV
from idp_jax.models.decoder import Decoder
from idp_jax.recover.prompt import SoftPrompt
from idp_jax.recover.repaired import Repaired, encode_prompts


class PrefixAdapter(nnx.Module):
    """Prefix tuning: keys (after RoPE) and values [L, P, K, H] of every layer.

    There is no reparameterisation. Source: "Prefix-Tuning: Optimizing Continuous Prompts for
    Generation".
    """

    def __init__(self, k: jax.Array, v: jax.Array):
        self.k = nnx.Param(k)
        self.v = nnx.Param(v)

    def logical_axes(self) -> dict[str, Any]:
        """What the axes of the parameters mean, see `sharding.declared_axes`."""
        stored = ("layers", "time", "kv_heads", None)
        return {"k": stored, "v": stored}

    @classmethod
    def init(cls, decoder: Decoder, length: int, key: jax.Array) -> "PrefixAdapter":
        """Starts from the keys and values of a real prompt of `length` vocabulary rows."""
        prompt = SoftPrompt.init(decoder, length, key)
        kv = encode_prompts(decoder, [prompt.embeddings[...]])
        return cls(kv.k[:, 0].astype(jnp.float32), kv.v[:, 0].astype(jnp.float32))

    @property
    def length(self) -> int:
        """The number of prefix tokens P."""
        return self.k.shape[1]

    def repair(self, decoder: Decoder) -> Repaired:
        """The model with this prefix before every input; the input starts at position P."""
        length = self.k.shape[1]
        dtype = decoder.embedding.dtype
        k, v = self.k[...][:, None].astype(dtype), self.v[...][:, None].astype(dtype)
        return Repaired(
            decoder, KV(k, v, jnp.ones((1, length), bool), jnp.full((1,), length, jnp.int32))
        )

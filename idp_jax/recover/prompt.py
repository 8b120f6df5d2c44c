"""Prompt tuning: trained embeddings before the input's."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from idp_jax.models.decoder import Decoder
from idp_jax.recover.repaired import Repaired, encode_prompts


class SoftPrompt(nnx.Module):
    """Prompt tuning: `embeddings` [P, E] stand before the input's.

    Source: "The Power of Scale for Parameter-Efficient Prompt Tuning".
    """

    def __init__(self, embeddings: jax.Array):
        self.embeddings = nnx.Param(embeddings)

    def logical_axes(self) -> dict[str, Any]:
        """What the axes of the parameters mean, see `sharding.declared_axes`."""
        return {"embeddings": ("time", "embed_activation")}

    @classmethod
    def init(cls, decoder: Decoder, length: int, key: jax.Array) -> "SoftPrompt":
        """A prompt of `length` rows of the vocabulary's embedding, drawn without repetition."""
        config = decoder.config
        if not 0 <= length <= min(config.max_positions, config.vocab_size):
            raise ValueError(
                f"prompt length {length} is out of range; it must lie between 0 and "
                f"{config.max_positions}"
            )
        rows = jax.random.choice(key, config.vocab_size, (length,), replace=False)
        return cls(decoder.embedding[...][rows].astype(jnp.float32))

    @property
    def length(self) -> int:
        """The number of prompt tokens P."""
        return self.embeddings.shape[0]

    def repair(self, decoder: Decoder) -> Repaired:
        """The model with this prompt before every input."""
        if not self.length:
            return Repaired(decoder)
        return Repaired(decoder, encode_prompts(decoder, [self.embeddings[...]]))

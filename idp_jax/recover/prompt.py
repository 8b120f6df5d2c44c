"""Prompt tuning: trained embeddings before the input's."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from idp_jax.models.decoder import Decoder
from idp_jax.recover.repaired import Repaired, copies_of_batch, encode_prompts, encode_rows
from idp_jax.recover.starts import Start, first_embeddings


class SoftPrompt(nnx.Module):
    """Prompt tuning: `embeddings` [P, E] stand before the input's.

    Source: "The Power of Scale for Parameter-Efficient Prompt Tuning".

    Attributes:
        frozen: the first tokens that training leaves as they are.
    """

    def __init__(self, embeddings: jax.Array, frozen: int = 0):
        self.embeddings = nnx.Param(embeddings)
        self.frozen = frozen

    def logical_axes(self) -> dict[str, Any]:
        """What the axes of the parameters mean, see `sharding.declared_axes`."""
        return {"embeddings": ("time", "embed_activation")}

    @classmethod
    def init(cls, decoder: Decoder, length: int, key: jax.Array) -> "SoftPrompt":
        """A prompt of `length` rows of the vocabulary's embedding, drawn without repetition."""
        return cls(first_embeddings(decoder, length, Start(key)))

    @property
    def length(self) -> int:
        """The number of prompt tokens P."""
        return self.embeddings.shape[0]

    def trained(self) -> "SoftPrompt":
        """Which numbers are trained, see `methods.trained`."""
        rows = np.arange(self.length)[:, None] >= self.frozen
        return jax.tree.map(lambda x: rows, self)

    def repair(self, decoder: Decoder) -> Repaired:
        """The model with this prompt before every input."""
        if not self.length:
            return Repaired(decoder)
        return Repaired(decoder, encode_prompts(decoder, [self.embeddings[...]]))

    def repair_for_training(self, decoder: Decoder, share: jax.Array, key: jax.Array) -> Repaired:
        """As `repair`, with a prompt for each part of the batch; see `copies_of_batch`."""
        rows = copies_of_batch(self.embeddings[...])
        if len(rows) == 1 or not self.length:
            return self.repair(decoder)
        kv = encode_rows(decoder, rows, [0] * len(rows))
        kv = kv.replace(mask=kv.mask[:1], next_position=kv.next_position[:1])
        return Repaired(decoder, kv, copied=True)

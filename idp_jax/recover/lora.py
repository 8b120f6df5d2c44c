"""Low-rank updates beside the frozen matrices."""

import jax
import jax.numpy as jnp
from flax import nnx

from idp_jax.models.decoder import Decoder
from idp_jax.recover.repaired import Repaired
from idp_jax.weights import Lora


class LoraAdapter(nnx.Module):
    """Low-rank updates beside some matrices of every layer.

    Source: "LoRA: Low-Rank Adaptation of Large Language Models".

    Attributes:
        a: by matrix name, [L, I, r]; b: [L, r, O].
        alpha: the update is scaled by alpha / r.
    """

    def __init__(self, a: dict[str, jax.Array], b: dict[str, jax.Array], alpha: float):
        self.a = nnx.Dict({name: nnx.Param(value) for name, value in a.items()})
        self.b = nnx.Dict({name: nnx.Param(value) for name, value in b.items()})
        self.alpha = alpha

    @classmethod
    def init(
        cls,
        decoder: Decoder,
        rank: int,
        key: jax.Array,
        *,
        alpha: float = 16.0,
        targets: tuple[str, ...] = ("q", "v"),
    ) -> "LoraAdapter":
        """A uniform in +-1/sqrt(I) and B zero, as PEFT starts: the model is unchanged at first."""
        known = decoder.layers.weight_names
        unknown = [name for name in targets if name not in known]
        if unknown:
            raise ValueError(
                f"no matrix {unknown[0]!r} for LoRA; this model has {', '.join(known)}"
            )
        if not targets:
            raise ValueError(f"LoRA needs at least one matrix; this model has {', '.join(known)}")
        if rank < 1:
            raise ValueError(f"LoRA rank {rank} must be at least 1")
        a, b = {}, {}
        for name, subkey in zip(targets, jax.random.split(key, len(targets)), strict=True):
            inputs, outputs = matrix_shape(decoder, name)
            layers = decoder.config.num_layers
            bound = inputs**-0.5
            a[name] = jax.random.uniform(subkey, (layers, inputs, rank), jnp.float32, -bound, bound)
            b[name] = jnp.zeros((layers, rank, outputs), jnp.float32)
        return cls(a, b, alpha)

    @property
    def rank(self) -> int:
        """The rank r."""
        return next(iter(self.a.values())).shape[-1]

    def repair(self, decoder: Decoder) -> Repaired:
        """The model with the updates beside its frozen matrices (not merged)."""
        dtype = decoder.embedding.dtype
        with_updates = {
            name: Lora(
                getattr(decoder.layers, name),
                self.a[name][...].astype(dtype),
                self.b[name][...].astype(dtype),
                self.alpha / self.rank,
            )
            for name in self.a
        }
        return Repaired(decoder.with_layers(decoder.layers.replace(**with_updates)))


def matrix_shape(decoder: Decoder, name: str) -> tuple[int, int]:
    """(inputs, outputs) of a matrix of the blocks."""
    c = decoder.config
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "q": (c.hidden_dim, queries),
        "k": (c.hidden_dim, keys),
        "v": (c.hidden_dim, keys),
        "o": (queries, c.hidden_dim),
        "gate": (c.hidden_dim, c.ffw_dim),
        "up": (c.hidden_dim, c.ffw_dim),
        "down": (c.ffw_dim, c.hidden_dim),
    }[name]

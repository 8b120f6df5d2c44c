"""Low-rank updates beside the frozen matrices."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import matrices, matrix_axes
from idp_jax.recover.repaired import Repaired
from idp_jax.recover.replaced import with_parameters
from idp_jax.weights import Lora


class LoraAdapter(nnx.Module):
    """Low-rank updates beside some matrices of every layer.

    Source: "LoRA: Low-Rank Adaptation of Large Language Models".

    Attributes:
        a: by matrix name, [L, I, r]; b: [L, r, O].
        alpha: the update is scaled by alpha / r.
        bias: by matrix name, [L, O], added to x @ a @ b before it is scaled; PEFT's `lora_bias`.
        replaced: whole parameters of the model by their path, see `replaced.with_parameters`. Only
            adapters of PEFT have them: `init` makes none.
    """

    def __init__(
        self,
        a: dict[str, jax.Array],
        b: dict[str, jax.Array],
        alpha: float,
        *,
        bias: Mapping[str, jax.Array] | None = None,
        replaced: Mapping[str, jax.Array] | None = None,
    ):
        self.a = nnx.Dict({name: nnx.Param(value) for name, value in a.items()})
        self.b = nnx.Dict({name: nnx.Param(value) for name, value in b.items()})
        self.alpha = alpha
        self.bias = nnx.Dict({name: nnx.Param(value) for name, value in (bias or {}).items()})
        # A path has dots in it, which nnx.Dict takes for no attribute's name.
        self.replaced = nnx.Dict({n: nnx.Param(value) for n, value in (replaced or {}).items()})

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
        known = {matrix.name: matrix for matrix in matrices(decoder.config)}
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
            matrix, layers = known[name], decoder.config.num_layers
            bound, shape = matrix.inputs**-0.5, (layers, matrix.inputs, rank)
            a[name] = jax.random.uniform(subkey, shape, jnp.float32, -bound, bound)
            b[name] = jnp.zeros((layers, rank, matrix.outputs), jnp.float32)
        return cls(a, b, alpha)

    @property
    def rank(self) -> int:
        """The rank r."""
        return next(iter(self.a.values())).shape[-1]

    def repair(self, decoder: Decoder) -> Repaired:
        """The model with the updates beside its frozen matrices (not merged)."""
        dtype = decoder.embedding.dtype
        decoder = with_parameters(decoder, self._parameters(decoder))
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

    def _parameters(self, decoder: Decoder) -> dict[str, jax.Array]:
        """The parameters of the model that are others with this adapter, by their path."""
        values = {path: value[...] for path, value in self.replaced.items()}
        for name, bias in self.bias.items():
            path, update = f"layers.{name}.bias", bias[...] * (self.alpha / self.rank)
            old = getattr(decoder.layers, name).bias
            before = values.get(path, None if old is None else old[...].astype(jnp.float32))
            values[path] = update if before is None else before + update
        return values

    def logical_axes(self) -> dict[str, Any]:
        """What the axes of the parameters mean, see `sharding.declared_axes`."""
        return {
            "a": {name: (matrix_axes(name)[0], "rank") for name in self.a},
            "b": {name: ("rank", matrix_axes(name)[1]) for name in self.b},
            "bias": {name: (matrix_axes(name)[1],) for name in self.bias},
        }

"""Low-rank updates beside the frozen matrices.

Layers of different rank are filled up to the largest: a's last columns and b's last rows are 0
there. The invariant: these zeros stay, because the gradient of each of the two is a product with
the other, and nobody counts them as parameters.
"""

from collections.abc import Mapping, Sequence
from statistics import mode
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import matrix_axes
from idp_jax.recover.ranks import Ranks, ranks_of
from idp_jax.recover.repaired import Repaired
from idp_jax.recover.replaced import with_parameters
from idp_jax.weights import Dense, Lora, Repacked

_ByLayer = Mapping[str, Sequence[float]]


class LoraAdapter(nnx.Module):
    """Low-rank updates beside some matrices of some layers.

    Source: "LoRA: Low-Rank Adaptation of Large Language Models".

    Args:
        a: by matrix name, [L, I, r]; b: [L, r, O].
        alpha: a layer's update is scaled by alpha / its rank; one number, or one for every layer
            by matrix name.
        ranks: of every layer by matrix name, 0 where there is no update; by default r everywhere.
        bias: by matrix name, [L, O], added to x @ a @ b before it is scaled; PEFT's `lora_bias`.
        replaced: whole parameters of the model by their path, see `replaced.with_parameters`. Only
            adapters of PEFT have them: `init` makes none.
    """

    masked: ClassVar[bool] = False

    def __init__(
        self,
        a: Mapping[str, jax.Array],
        b: Mapping[str, jax.Array],
        alpha: float | _ByLayer,
        *,
        ranks: Mapping[str, Sequence[int]] | None = None,
        bias: Mapping[str, jax.Array] | None = None,
        replaced: Mapping[str, jax.Array] | None = None,
    ):
        self.a = nnx.Dict({name: nnx.Param(value) for name, value in a.items()})
        self.b = nnx.Dict({name: nnx.Param(value) for name, value in b.items()})
        # Static and hashable, since a program that was compiled for one layout fits no other.
        by_layer = lambda name: (
            alpha[name] if isinstance(alpha, Mapping) else [alpha] * len(a[name])
        )
        self.ranks = tuple(
            (name, tuple(ranks[name]) if ranks else (x.shape[-1],) * len(x))
            for name, x in sorted(a.items())
        )
        # A layer without an update has no alpha: 0, so that equal adapters compare equal.
        self.alphas = tuple(
            (name, tuple(float(x) if rank else 0.0 for x, rank in pairs))
            for name, of in self.ranks
            for pairs in [zip(by_layer(name), of, strict=True)]
        )
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
        targets: Sequence[str] = ("q", "v"),
        rules: Sequence[str] = (),
        rank_stabilized: bool = False,
    ) -> "LoraAdapter":
        """A uniform in +-1/sqrt(I) and B zero, as PEFT starts: the model is unchanged at first.

        Args:
            targets, rules: see `ranks.ranks_of`.
            rank_stabilized: scale by alpha / sqrt(rank), as "A Rank Stabilization Scaling Factor
                for Fine-Tuning with LoRA".

        Raises:
            ValueError: as `ranks.ranks_of`.
        """
        found = ranks_of(decoder.config, Ranks(rank, alpha), targets, rules)
        a, b, ranks, alphas = {}, {}, {}, {}
        subkeys = jax.random.split(key, len(found))
        for (matrix, layers), subkey in zip(found.items(), subkeys, strict=True):
            name, width = matrix.name, max(layer.rank for layer in layers)
            ranks[name] = [layer.rank for layer in layers]
            alphas[name] = [
                layer.alpha * (max(layer.rank, 1) ** 0.5 if rank_stabilized else 1)
                for layer in layers
            ]
            bound, shape = matrix.inputs**-0.5, (len(layers), matrix.inputs, width)
            drawn = jax.random.uniform(subkey, shape, jnp.float32, -bound, bound)
            used = np.arange(width) < np.asarray(ranks[name])[:, None]
            a[name] = jnp.where(used[:, None], drawn, jnp.zeros((), jnp.float32))
            b[name] = jnp.zeros((len(layers), width, matrix.outputs), jnp.float32)
        return cls(a, b, alphas, ranks=ranks)

    @property
    def rank(self) -> int:
        """The rank of most updates."""
        return mode(rank for _, ranks in self.ranks for rank in ranks if rank)

    @property
    def alpha(self) -> float:
        """The alpha of most updates."""
        return mode(alpha for _, alphas in self.alphas for alpha in alphas if alpha)

    def scales(self, name: str) -> tuple[float, ...]:
        """What every layer's product of a and b is multiplied by."""
        pairs = zip(dict(self.alphas)[name], dict(self.ranks)[name], strict=True)
        return tuple(alpha / max(rank, 1) for alpha, rank in pairs)

    def trained(self) -> "LoraAdapter":
        """Which numbers are trained, see `methods.trained`: not those that only fill up."""
        tree = jax.tree.map(lambda x: True, self)
        for name, ranks in self.ranks:
            held = np.arange(self.a[name].shape[-1]) < np.asarray(ranks)[:, None]  # [L, r]
            tree.a[name] = jax.tree.map(lambda x, held=held: held[:, None, :], self.a[name])
            tree.b[name] = jax.tree.map(lambda x, held=held: held[:, :, None], self.b[name])
        return tree

    def repair(self, decoder: Decoder) -> Repaired:
        """The model with the updates beside its frozen matrices (not merged).

        Raises:
            ValueError: a masked update of a matrix without a mask.
        """
        decoder = with_parameters(decoder, self._parameters(decoder))
        updated = {name: self._beside(name, getattr(decoder.layers, name)) for name in self.a}
        dtype = decoder.embedding.dtype
        updated = {
            name: Lora(base, a.astype(dtype), b.astype(dtype), scale, masked=self.masked)
            for name, (base, a, b, scale) in updated.items()
        }
        return Repaired(decoder.with_layers(decoder.layers.replace(**updated)))

    def _beside(self, name: str, base) -> tuple[Any, jax.Array, jax.Array, float]:
        """What `Lora` takes: layers of different scales have theirs in b."""
        if self.masked and not _has_mask(base):
            raise ValueError(
                f"{name} is quantised, and a masked LoRA needs the zeros of a pruned matrix; train "
                "without --lora.masked"
            )
        a, b, scales = self.a[name][...], self.b[name][...], self.scales(name)
        if len(set(scales)) == 1:
            return base, a, b, scales[0]
        return base, a, b * jnp.asarray(scales, jnp.float32)[:, None, None], 1.0

    def _parameters(self, decoder: Decoder) -> dict[str, jax.Array]:
        """The parameters of the model that are others with this adapter, by their path."""
        values = {path: value[...] for path, value in self.replaced.items()}
        for name, bias in self.bias.items():
            scales = jnp.asarray(self.scales(name), jnp.float32)[:, None]
            path, update = f"layers.{name}.bias", bias[...] * scales
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


class MaskedLora(LoraAdapter):
    """Updates that are 0 where the frozen matrix is, so that merging keeps its zeros.

    Source: MaskLoRA of "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs".
    """

    masked = True


def _has_mask(weight) -> bool:
    if isinstance(weight, Repacked):
        weight = jax.eval_shape(lambda w: w.restored(), weight)
    return isinstance(weight, Dense)

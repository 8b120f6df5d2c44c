"""Prefix tuning: trained keys and values of every layer, as many as each layer is given.

The invariant: slots are filled from the left, so that every layer that has any has the first token,
which attention falls back on; the input follows the longest layer.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from idp_jax.models.cache import KV
from idp_jax.models.decoder import Decoder
from idp_jax.recover.repaired import Repaired, copies_of_batch, encode_prompts
from idp_jax.recover.starts import Start, first_embeddings


class PrefixAdapter(nnx.Module):
    """Prefix tuning: keys (after RoPE) and values [L, P, K, H] of every layer.

    Source: "Prefix-Tuning: Optimizing Continuous Prompts for Generation"; with a start from text
    and a frozen first token it is a cartridge ("Cartridges: Lightweight and general-purpose long
    context representations via self-study").

    Attributes:
        frozen: the first tokens that training leaves as they are.
        lengths: tokens of each layer, the largest of them P; None where all have P. What is stored
            behind a layer's length is nothing.
    """

    def __init__(
        self,
        k: jax.Array,
        v: jax.Array,
        frozen: int = 0,
        lengths: tuple[int, ...] | None = None,
    ):
        self.k = nnx.Param(k)
        self.v = nnx.Param(v)
        self.frozen = frozen
        self.lengths = lengths

    def logical_axes(self) -> dict[str, Any]:
        """What the axes of the parameters mean, see `sharding.declared_axes`."""
        stored = ("layers", "time", "kv_heads", None)
        return {"k": stored, "v": stored}

    @classmethod
    def init(cls, decoder: Decoder, length: int, key: jax.Array) -> "PrefixAdapter":
        """Starts from the keys and values of a real prompt of `length` vocabulary rows."""
        return cls.of(decoder, first_embeddings(decoder, length, Start(key)))

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        embeddings: jax.Array,
        frozen: int = 0,
        lengths: tuple[int, ...] | None = None,
    ) -> "PrefixAdapter":
        """The keys and values that a model has for embeddings [P, E], cut to each layer's length.

        Raises:
            ValueError: a length too many or too few.
        """
        layers = decoder.config.num_layers
        if lengths is not None and len(lengths) != layers:
            raise ValueError(
                f"--prefix.lengths names {len(lengths)} layers, and the model has {layers}; give "
                "one length for each"
            )
        kv = encode_prompts(decoder, [embeddings])
        k, v = kv.k[:, 0].astype(jnp.float32), kv.v[:, 0].astype(jnp.float32)
        if lengths is not None:
            held = _slots(lengths, len(embeddings))[..., None, None]
            k, v = jnp.where(held, k, 0.0), jnp.where(held, v, 0.0)
        return cls(k, v, frozen, lengths)

    @property
    def length(self) -> int:
        """The number of slots P."""
        return self.k.shape[1]

    def trained_slots(self) -> np.ndarray:
        """Slots that training changes, bool [L | 1, P]."""
        held = _slots(self.lengths or (self.length,), self.length)
        return held & (np.arange(self.length) >= self.frozen)

    def trained(self) -> "PrefixAdapter":
        """Which numbers are trained, see `methods.trained`."""
        return jax.tree.map(lambda x: self.trained_slots()[..., None, None], self)

    def repair(self, decoder: Decoder) -> Repaired:
        """The model with this prefix before every input; the input starts at position P."""
        length = self.length
        dtype = decoder.embedding.dtype
        k, v = self.k[...][:, None].astype(dtype), self.v[...][:, None].astype(dtype)
        mask = jnp.ones((1, length), bool)
        if self.lengths is not None:
            mask = jnp.asarray(_slots(self.lengths, length))[:, None]
        return Repaired(decoder, KV(k, v, mask, jnp.full((1,), length, jnp.int32)))

    def repair_for_training(self, decoder: Decoder, share: jax.Array, key: jax.Array) -> Repaired:
        """As `repair`, with a prefix for each part of the batch; see `copies_of_batch`."""
        repaired = self.repair(decoder)
        assert repaired.prefix is not None
        k, v = (copies_of_batch(x[:, 0]) for x in (repaired.prefix.k, repaired.prefix.v))
        if len(k) == 1:
            return repaired
        kv = repaired.prefix.replace(k=jnp.moveaxis(k, 0, 1), v=jnp.moveaxis(v, 0, 1))
        return repaired.replace(prefix=kv, copied=True)


class ProjectedPrefix(nnx.Module):
    """A prefix that is trained through an MLP: what it began as + W tanh(V e + b) + c, e trained.

    Source: "Prefix-Tuning: Optimizing Continuous Prompts for Generation", where there is no
    beginning to add to. W and c are 0 at first, so that it begins where a plain prefix does,
    whatever that is. Only `prefix` is kept of it.

    Attributes:
        start: the plain prefix that it begins as; it is not trained.
        embeddings: e, [P, K * H]; hidden: V, [K * H, width]; hidden_bias: b.
        output: W, [width, L * 2 * K * H]; output_bias: c.
    """

    def __init__(self, start: PrefixAdapter, width: int, key: jax.Array):
        layers, length, heads, size = start.k.shape
        inputs, outputs = heads * size, layers * 2 * heads * size
        first, second = jax.random.split(key)
        bound = inputs**-0.5
        self.start = start
        self.embeddings = nnx.Param(jax.random.normal(first, (length, inputs), jnp.float32))
        self.hidden = nnx.Param(
            jax.random.uniform(second, (inputs, width), jnp.float32, -bound, bound)
        )
        self.hidden_bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.output = nnx.Param(jnp.zeros((width, outputs), jnp.float32))
        self.output_bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))

    def logical_axes(self) -> dict[str, Any]:
        """What the axes of the parameters mean, see `sharding.declared_axes`."""
        return {"start": self.start.logical_axes()}

    def trained(self) -> "ProjectedPrefix":
        """Which numbers are trained, see `methods.trained`: all but the beginning."""
        tree = jax.tree.map(lambda x: True, self)
        tree.start = jax.tree.map(lambda x: False, self.start)
        return tree

    def prefix(self) -> PrefixAdapter:
        """The plain prefix that the MLP gives."""
        start = self.start
        layers, length, heads, size = start.k.shape
        hidden = jnp.tanh(self.embeddings[...] @ self.hidden[...] + self.hidden_bias[...])
        flat = hidden @ self.output[...] + self.output_bias[...]
        update = jnp.moveaxis(flat.reshape(length, layers, 2, heads, size), 0, 2)
        moves = start.trained_slots()[..., None, None]
        k = jnp.where(moves, start.k[...] + update[:, 0], start.k[...])
        v = jnp.where(moves, start.v[...] + update[:, 1], start.v[...])
        return PrefixAdapter(k, v, start.frozen, start.lengths)

    def repair(self, decoder: Decoder) -> Repaired:
        """The model with the plain prefix before every input."""
        return self.prefix().repair(decoder)

    def repair_for_training(self, decoder: Decoder, share: jax.Array, key: jax.Array) -> Repaired:
        """As of the plain prefix."""
        return self.prefix().repair_for_training(decoder, share, key)


def lengths_by_damage(damage: Sequence[float], mean: int) -> tuple[int, ...]:
    """Lengths in proportion to each layer's damage, `mean` tokens on average.

    Fractions go to the layers that lose most by rounding down, of equal ones to the first. Source
    of the idea: SPT (CPAL 2026), whose lengths follow the layers' sparsity.

    Raises:
        ValueError: nothing is damaged, or by no number.
    """
    shares = np.asarray(damage, np.float64)
    total = shares.sum()
    if not np.isfinite(total) or total <= 0 or shares.min() < 0:
        raise ValueError(
            f"no lengths follow from the layers' errors, which sum up to {total}; give "
            "--prefix.lengths"
        )
    exact = shares / total * (mean * len(shares))
    lengths = np.floor(exact).astype(int)
    rest = mean * len(shares) - lengths.sum()
    lengths[np.argsort(lengths - exact, kind="stable")[:rest]] += 1
    return tuple(lengths.tolist())


def _slots(lengths: Sequence[int], longest: int) -> np.ndarray:
    """Slots that each layer fills, bool [L, P]."""
    return np.arange(longest) < np.asarray(lengths)[:, None]

"""The least time that reading a text and writing a token can take, from shapes alone.

A device multiplies so fast and reads its memory so fast; whichever of the two takes longer is the
bound ("Roofline: An Insightful Visual Performance Model"). Counted is what the mathematics need:
every matrix once for each token, every byte of weights, keys and values once for each pass. What
choosing a prompt takes is left out, so that it shows as a lower share of the roofline.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from idp_jax.evaluation.results import Part
from idp_jax.jobs.chips import CHIPS, chip_here
from idp_jax.models.config import ModelConfig
from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import matrices
from idp_jax.recover import Repaired
from idp_jax.weights import Lora

_REPEATS = 7
_SIDE = 2048  # of the matrix that a product is measured with
_BYTES = 2**28  # more than a cache holds


@dataclass(frozen=True)
class Peak(Part):
    """What a device can do at most.

    Attributes:
        operations: multiplications and additions of products, a second.
        bandwidth: bytes of memory that it reads, a second.
        origin: where both are from.
    """

    operations: float
    bandwidth: float
    origin: str

    def milliseconds(self, operations: float, moved: float) -> float:
        """Of so many operations and bytes, at least."""
        return 1000 * max(operations / self.operations, moved / self.bandwidth)

    def best(self, other: "Peak") -> "Peak":
        """The better of two measurements: others may have slowed down either."""
        operations = max(self.operations, other.operations)
        return Peak(operations, max(self.bandwidth, other.bandwidth), self.origin)


@dataclass(frozen=True)
class Bound(Part):
    """Milliseconds at least: of the first token, and of each further one in the mean."""

    ttft_ms: float
    tpot_ms: float


def peak_of(name: str | None, dtype: str) -> Peak:
    """The vendor's figures of a chip, or of the device that is here; measured where there are none.

    Args:
        name: one of `jobs.chips.CHIPS`, or None for the device here.
        dtype: that products are measured in; the vendors' figures are of bfloat16.
    """
    kind = jax.devices()[0].device_kind
    chip = chip_here(kind) if name is None else CHIPS[name]
    if chip is not None:
        origin = f"the vendor's figures of {name or kind}, bfloat16"
        return Peak(chip.flops, chip.bandwidth, origin)
    side = jnp.ones((_SIDE, _SIDE), dtype)
    row = jnp.ones((1, 4 * _SIDE), dtype)
    wide = jnp.ones((4 * _SIDE, _BYTES // side.dtype.itemsize // (4 * _SIDE)), dtype)
    multiply = jax.jit(lambda x, w: x @ w)
    return Peak(
        2 * _SIDE**3 / _best(multiply, side, side),
        wide.nbytes / _best(multiply, row, wide),
        f"measured on {kind}: the best products of {dtype}, {_SIDE:,} rows and one row",
    )


def _best(run: Callable, *arguments: Any) -> float:
    """Seconds of the fastest call, compiled before."""
    jax.block_until_ready(run(*arguments))
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def bound(
    repaired: Repaired, peak: Peak, *, batch_size: int, prompt_length: int, new_tokens: int
) -> Bound:
    """The bounds of a generation; shapes are enough.

    Args:
        prompt_length: tokens of the text; what stands before it is read from the cache.
        new_tokens: in all; a further token is counted at the mean length.
    """
    decoder, soft = repaired.decoder, 0 if repaired.prefix is None else repaired.prefix.length
    config, weights, cached = decoder.config, weight_bytes(decoder), kv_bytes(decoder)
    each = _operations(decoder)
    head = 2 * config.vocab_size * config.embedding_dim
    keys = soft + (prompt_length + 1) / 2  # that a token of the text sees, in the mean
    first = batch_size * (prompt_length * (each + _attention(config, keys)) + head)
    written = batch_size * (soft + prompt_length) * cached
    keys = soft + prompt_length + new_tokens / 2
    further = batch_size * (each + _attention(config, keys) + head)
    return Bound(
        peak.milliseconds(first, weights + written),
        peak.milliseconds(further, weights + batch_size * keys * cached),
    )


def weight_bytes(decoder: Decoder) -> int:
    """Bytes of all that a step reads of a model: of tables that rows are looked up in, nothing."""
    tables = [decoder.positions]
    if decoder.head is not None:  # else the embedding is the head
        tables.append(decoder.embedding)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return size(decoder) - size(tables)


def kv_bytes(decoder: Decoder) -> int:
    """Bytes of the keys and values of one token, all layers."""
    config = decoder.config
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return numbers * decoder.embedding.dtype.itemsize


def _operations(decoder: Decoder) -> int:
    """Multiplications and additions of one token's products with the matrices of all layers."""
    config, layers = decoder.config, decoder.layers
    own = config.num_layers * sum(matrix.inputs * matrix.outputs for matrix in matrices(config))
    updates = [w for name in layers.weight_names if isinstance(w := getattr(layers, name), Lora)]
    return 2 * (own + sum(update.a.size + update.b.size for update in updates))


def _attention(config: ModelConfig, keys: float) -> float:
    """Operations of one token that attends to so many keys, all layers."""
    return 4 * config.num_layers * config.num_heads * config.head_dim * keys

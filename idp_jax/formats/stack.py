"""Makes one stacked block of layers that a checkpoint stores each in its own way.

A decoder's layers are stacked arrays, so all layers of one matrix need the same bits, groups and
kind. The invariant: every matrix stands for the same float32 numbers as before.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from idp_jax.formats.gptq import group_index
from idp_jax.formats.later import Stacked, whole
from idp_jax.kernels.packing import pack, unpack
from idp_jax.models.block import Block
from idp_jax.weights import Dense, Quantized


def stack(blocks: list[Block]) -> Block:
    """Blocks of numpy arrays as one, with a leading axis of layers.

    Where layers differ, a matrix takes the widest bits and the finest groups among them, and is
    written out in all layers where one of them is dense. The list is emptied, and each block's
    arrays are given up as they are copied.
    """
    structure, leaves = _leaves(blocks)
    blocks.clear()
    arrays = []
    for position in range(structure.num_leaves):
        arrays.append(np.stack([layer[position] for layer in leaves]))
        for layer in leaves:
            layer[position] = None
    return jax.tree.unflatten(structure, arrays)


def stacked(blocks: list[Block]) -> Block:
    """As `stack`, of arrays that are still to be read, and so is what comes of them."""
    structure, leaves = _leaves(blocks)
    return jax.tree.unflatten(structure, [Stacked(layers) for layers in zip(*leaves, strict=True)])


def _leaves(blocks: list[Block]) -> tuple[Any, list[list]]:
    """The arrays of every layer, in one structure."""
    blocks = list(blocks)
    for name in blocks[0].weight_names:
        weights = [getattr(block, name) for block in blocks]
        if len({jax.tree.structure(weight) for weight in weights}) > 1 or _groups(weights):
            for layer, weight in enumerate(alike(whole(weights))):
                blocks[layer] = blocks[layer].replace(**{name: weight})
    return jax.tree.structure(blocks[0]), [jax.tree.leaves(block) for block in blocks]


def _groups(weights: list) -> bool:
    """Whether the numbers of groups differ."""
    return len({weight.groups for weight in weights if isinstance(weight, Quantized)}) > 1


def alike(weights: list[Dense | Quantized]) -> list[Dense] | list[Quantized]:
    """The weights [I, O] of one matrix in all layers, stored alike; the values stay.

    Scales and zeros are repeated where groups become finer; where one layer names the group of
    every input, all do.
    """
    packed = [weight for weight in weights if isinstance(weight, Quantized)]
    if len(packed) < len(weights):
        return [weight if isinstance(weight, Dense) else expanded(weight) for weight in weights]
    bits = max(weight.bits for weight in packed)
    counts = [weight.groups for weight in packed]
    indexed = any(weight.group_index is not None for weight in packed)
    groups = max(counts) if indexed else math.lcm(*counts)
    return [_converted(weight, bits, groups, indexed) for weight in packed]


def expanded(weight: Quantized, dtype: DTypeLike = np.float32) -> Dense:
    """The matrix that a packed weight stands for, which may still have to be read."""
    weight = whole(weight)
    bias = None if weight.bias is None else weight.bias[...]
    return Dense(np.asarray(_dense(weight)).astype(dtype), bias)


@jax.jit
def _dense(weight: Quantized) -> jax.Array:
    return weight.dense(jnp.float32)


def _converted(weight: Quantized, bits: int, groups: int, indexed: bool) -> Quantized:
    words, index = np.asarray(weight.words[...]), None
    held = weight.groups
    if bits != weight.bits:
        words = np.asarray(pack(unpack(jnp.asarray(words), weight.bits), bits))
    if indexed:
        # Groups beyond those of this layer are never named: what stands there is of no account.
        index = group_index(weight)
        finer = lambda x: np.pad(x, ((0, groups - held), (0, 0)), mode="edge")
    else:
        finer = lambda x: np.repeat(x, groups // held, axis=0)
    return Quantized(
        words,
        finer(np.asarray(weight.scales[...])),
        finer(np.asarray(weight.zeros[...])),
        bits=bits,
        group_index=index,
        bias=None if weight.bias is None else weight.bias[...],
    )

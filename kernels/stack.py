"""Compressed weights of many layers in one stack, of which a product uses one.

A model walks its layers with `lax.scan`. A kernel is opaque to XLA: whatever is sliced out of the
stack for it is copied in memory first, which would cost more than the product. So a weight may keep
all layers and name the one that is meant (`at`), and a kernel reads that one where it lies.

Invariant: `alone(at(stack, n))` is layer n of the stack.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

WeightT = TypeVar("WeightT", bound=Any)  # KernelWeight or SparseWeight

_ARRAYS = ("words", "values", "positions", "grid")


def at(stack: WeightT, layer: jax.Array) -> WeightT:
    """Layer number `layer` (int32 scalar) of a weight whose layers are stacked in front."""
    order = getattr(stack, "order", None)
    changed = {} if order is None else {"order": order[layer]}
    return dataclasses.replace(stack, layer=layer, **changed)


def alone(weight: WeightT) -> WeightT:
    """The layer that is meant, cut out of its stack; any other weight as it is."""
    if weight.layer is None:
        return weight
    cut = {
        name: jax.lax.dynamic_index_in_dim(array, weight.layer, keepdims=False)
        for name in _ARRAYS
        if (array := getattr(weight, name, None)) is not None
    }
    return dataclasses.replace(weight, layer=None, **cut)


def stacked(weight: WeightT) -> tuple[WeightT, jax.Array]:
    """Any weight as a stack, and the number int32 [1] of the layer that is meant."""
    if weight.layer is not None:
        return weight, jnp.asarray(weight.layer, jnp.int32).reshape(1)
    one = {
        name: array[None] for name in _ARRAYS if (array := getattr(weight, name, None)) is not None
    }
    return dataclasses.replace(weight, **one), jnp.zeros(1, jnp.int32)

"""Compressed weights of many layers in one stack, of which a product uses one.

A model walks its layers with `lax.scan`. A kernel is opaque to XLA: whatever is sliced out of the
stack for it is copied in memory first, which would cost more than the product. So a weight may keep
all layers and name the one that is meant (`select_layer`), and a kernel reads that one where it
lies.

Invariant: `slice_layer(select_layer(stack, n))` is layer n of the stack.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from .weight import Weight

WeightT = TypeVar("WeightT", bound=Weight)


def select_layer(stack: WeightT, layer: jax.Array) -> WeightT:
    """Layer number `layer` (int32 scalar) of a weight whose layers are stacked in front."""
    # `order` is applied to x by XLA, outside the kernels, and small: it is sliced at once.
    order = getattr(stack, "order", None)
    changed = {} if order is None else {"order": order[layer]}
    return dataclasses.replace(stack, layer=layer, **changed)


def slice_layer(weight: WeightT) -> WeightT:
    """The layer that is meant, cut out of its stack; any other weight as it is."""
    number = weight.layer
    if number is None:
        return weight
    layer = {
        name: jax.lax.dynamic_index_in_dim(getattr(weight, name), number, keepdims=False)
        for name in weight.axes
    }
    return dataclasses.replace(weight, layer=None, **layer)


def as_stack(weight: WeightT) -> tuple[WeightT, jax.Array]:
    """Any weight as a stack, and the number int32 [1] of the layer that is meant."""
    if weight.layer is not None:
        return weight, jnp.asarray(weight.layer, jnp.int32).reshape(1)
    stack = {name: getattr(weight, name)[None] for name in weight.axes}
    return dataclasses.replace(weight, **stack), jnp.zeros(1, jnp.int32)

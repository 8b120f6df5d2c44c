"""Products with compressed weights on a mesh.

A kernel is opaque to the partitioner, so it always runs inside `jax.shard_map`: every device
multiplies by its part of the weight. Invariant: the result is that of one device, but for the order
of a sum over devices.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
from jax.sharding import PartitionSpec

from .weight import Weight

WeightT = TypeVar("WeightT", bound=Weight)


def sharded_matmul(
    multiply: Callable[[jax.Array, WeightT], jax.Array],
    x: jax.Array,
    weight: WeightT,
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    axis: str | None,
    split: str,
    batch: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Multiplies by a weight that is cut over one axis of a mesh. Differentiable in x.

    Args:
        multiply: `quant_matmul` or `sparse24_matmul`, with its backend bound.
        x: [B, ..., I]; cut over its inputs if `split` is "inputs".
        weight: the whole weight (its arrays may already be placed accordingly).
        mesh: the mesh.
        axis: the mesh axis that cuts the weight; None if every device has all of it.
        split: "outputs" (the result is cut too) or "inputs" (parts of the result are summed).
        batch: mesh axes that cut the first axis of x.

    Returns:
        [B, ..., O], cut over `axis` if `split` is "outputs".

    Raises:
        ValueError: what `unsplittable` says.
    """
    parts = 1 if axis is None else mesh.shape[axis]
    reason = None if axis is None else unsplittable(weight, split, parts)
    if reason:
        raise ValueError(reason)
    order = getattr(weight, "order", None)
    if order is not None:
        # An input may move to another device's part: x is reordered while it is whole.
        x, weight = x[..., order], dataclasses.replace(weight, order=None)
    middle = (None,) * (x.ndim - 2)
    cut = PartitionSpec(batch, *middle, axis)
    whole = PartitionSpec(batch, *middle, None)

    def local(x: jax.Array, weight: WeightT) -> jax.Array:
        if split == "outputs":
            return multiply(x, weight)
        # The sizes are static, so shard_map hands on those of the whole weight. One group of all
        # inputs stays one: its only row of scales is every part's.
        groups = max(1, weight.groups // parts)
        part = dataclasses.replace(weight, inputs=weight.inputs // parts, groups=groups)
        return multiply(x, part) if axis is None else jax.lax.psum(multiply(x, part), axis)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(whole if split == "outputs" else cut, partition(weight, axis, split)),
        out_specs=cut if split == "outputs" else whole,
        check_vma=False,
    )(x, weight)


def partition(weight: WeightT, axis: str | None, split: str) -> WeightT:
    """The partition of a weight's arrays, as a tree like the weight."""
    specs = {}
    for name, (inputs, outputs) in weight.axes.items():
        cut = outputs if split == "outputs" else inputs
        dimensions = range(-getattr(weight, name).ndim, 0)
        if cut is not None:
            specs[name] = PartitionSpec(*(axis if d == cut else None for d in dimensions))
    return dataclasses.replace(jax.tree.map(lambda _: PartitionSpec(), weight), **specs)


def unsplittable(weight: Weight, split: str, parts: int) -> str | None:
    """Why a weight cannot be cut into equal parts, or None if it can."""
    if split not in ("inputs", "outputs"):
        return f"split must be inputs or outputs, not {split}"
    inputs, outputs = weight.tile
    if split == "outputs":
        if weight.outputs % (outputs * parts):
            return f"{weight.outputs} outputs do not divide into {parts} parts of whole {outputs}"
        return None
    if weight.inputs % (inputs * parts):
        return f"{weight.inputs} inputs do not divide into {parts} parts of whole tiles of {inputs}"
    # Rows that only fill the last span of a grid would go to the last part, instead of groups.
    spare = weight.grid is not None and weight.grid.shape[-2] != weight.groups
    if weight.groups > 1 and (weight.groups % parts or spare):
        return f"{weight.groups} groups do not divide into {parts} parts"
    return None

"""Products with compressed weights on a mesh.

A kernel is opaque to the partitioner, so it always runs inside `jax.shard_map`: every device
multiplies by its part of the weight. Invariant: the result is that of one device, but for the order
of a sum over devices.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from .quant_matmul.layout import TILE, KernelWeight
from .sparse24_matmul.layout import CODED_QUADS, QUADS, SparseWeight

Weight = KernelWeight | SparseWeight


def sharded_matmul(
    multiply: Callable[[jax.Array, Weight], jax.Array],
    x: jax.Array,
    weight: Weight,
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
        x, weight = x[..., order], dataclasses.replace(weight, order=None)
    middle = (None,) * (x.ndim - 2)
    cut = PartitionSpec(batch, *middle, axis)
    whole = PartitionSpec(batch, *middle, None)

    def local(x: jax.Array, weight: Weight) -> jax.Array:
        if split == "outputs":
            return multiply(x, weight)
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


def partition(weight: Weight, axis: str | None, split: str) -> Weight:
    """The partition of a weight's arrays, as a tree like the weight."""

    def spec(array: jax.Array, inputs_at: int, outputs_at: int) -> PartitionSpec:
        at = outputs_at if split == "outputs" else inputs_at
        return PartitionSpec(*(axis if d == at % array.ndim else None for d in range(array.ndim)))

    layer = None if weight.layer is None else PartitionSpec()
    place = functools.partial(dataclasses.replace, weight, layer=layer)
    grid = None
    if weight.grid is not None:
        one = weight.groups == 1 and split == "inputs"
        grid = PartitionSpec() if one else spec(weight.grid, -2, -1)
    outputs_at = -3 if weight.arrangement == "fragments" else -1
    if isinstance(weight, SparseWeight):
        values, positions = (spec(a, -2, outputs_at) for a in (weight.values, weight.positions))
        return place(values=values, positions=positions, grid=grid)
    order = None if weight.order is None else PartitionSpec()
    return place(words=spec(weight.words, -2, outputs_at), grid=grid, order=order)


def unsplittable(weight: Weight, split: str, parts: int) -> str | None:
    """Why a weight cannot be cut into equal parts, or None if it can."""
    if split not in ("inputs", "outputs"):
        return f"split must be inputs or outputs, not {split}"
    if split == "outputs":
        unit = 64 if weight.arrangement == "fragments" else 1
        if weight.outputs % (unit * parts):
            return f"{weight.outputs} outputs do not divide into {parts} parts of whole {unit}"
        return None
    tile = TILE
    if isinstance(weight, SparseWeight):
        tile = 4 * (QUADS if weight.bits is None else CODED_QUADS)
    if weight.inputs % (tile * parts):
        return f"{weight.inputs} inputs do not divide into {parts} parts of whole tiles of {tile}"
    spare = weight.grid is not None and weight.grid.shape[-2] != weight.groups
    if weight.groups > 1 and (weight.groups % parts or spare):
        return f"{weight.groups} groups do not divide into {parts} parts"
    return None

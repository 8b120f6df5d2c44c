"""Which weights can be cut over a mesh, whose every device then multiplies by its part.

A kernel is opaque to the partitioner, so on a mesh it runs inside `jax.shard_map`, on arrays that
were cut as `weight.axes` says.
"""

from .weight import Weight


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

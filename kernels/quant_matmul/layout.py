"""Packed weights as the kernels multiply by them, made once at load; codes.py has the words.

Invariant: `restore(repack(...))` gives back every bit. The inputs of a group are neighbours: a
checkpoint of another order (act-order) is sorted by groups, and the weight keeps that order.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from ..codes import (
    TILE,
    from_fragments,
    pack_grid,
    pack_tiles,
    to_fragments,
    unpack_grid,
    unpack_tiles,
)
from ..packing import pack, unpack


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "grid", "order", "layer"],
    meta_fields=["bits", "inputs", "groups", "scale_dtype", "arrangement"],
)
@dataclasses.dataclass(frozen=True)
class KernelWeight:
    """A packed weight in the layout of the kernels.

    Attributes:
        words: int32 [..., T * 8 * bits, O] with T = ceil(I / 256) tiles of inputs; as "fragments"
            [..., ceil(O / 64), T * bits, 512].
        grid: int32 [..., rows, O], one word per group: the 16 bits of the scale below, the zero
            above them. One row for one group, else G rows raised to whole spans of 1024 inputs.
        order: int32 [..., I] or None: the inputs in the order of the words, where a checkpoint's
            groups are not runs of inputs (act-order).
        bits: 2, 3, 4 or 8.
        inputs: I.
        groups: G.
        scale_dtype: "float16" or "bfloat16".
        arrangement: "rows" (TPU) or "fragments" (GPU).
        layer: int32 scalar or None: `words` and `grid` are stacks of layers and this one is meant
            (stack.py).
    """

    words: jax.Array
    grid: jax.Array
    order: jax.Array | None
    bits: int
    inputs: int
    groups: int
    scale_dtype: str
    arrangement: str = "rows"
    layer: jax.Array | None = None

    @property
    def group_size(self) -> int:
        """Inputs of a group."""
        return self.inputs // self.groups

    @property
    def outputs(self) -> int:
        """Columns of the weight."""
        return self.grid.shape[-1]

    @property
    def axes(self) -> dict[str, tuple[int | None, int]]:
        """See weight.py."""
        outputs = -3 if self.arrangement == "fragments" else -1
        return {"words": (-2, outputs), "grid": (None if self.groups == 1 else -2, -1)}

    @property
    def tile(self) -> tuple[int, int]:
        """See weight.py."""
        return TILE, 64 if self.arrangement == "fragments" else 1


def repack(
    words: jax.Array,
    scales: jax.Array,
    zeros: jax.Array,
    *,
    bits: int,
    group_index: jax.Array | None = None,
    arrangement: str = "rows",
) -> KernelWeight:
    """Turns a weight from the checkpoint's layout into the kernels'. Exact; can be jitted.

    Args:
        words: int32 [..., I * bits / 32, O], packed along the inputs (see packing.py).
        scales: float16 or bfloat16 [..., G, O].
        zeros: unsigned integers [..., G, O].
        bits: 2, 3, 4 or 8.
        group_index: int32 [..., I], the group of every input; every group must have I / G of them.
        arrangement: "rows" or "fragments", see the top of this file.

    Raises:
        ValueError: scales of another dtype, an unknown arrangement, or inputs that do not divide
            into the groups.
    """
    if scales.dtype not in (jnp.float16, jnp.bfloat16):
        raise ValueError(
            f"scales are {scales.dtype}, the kernels take float16 or bfloat16: cast them, or "
            "use backend xla"
        )
    if arrangement not in ("rows", "fragments"):
        raise ValueError(f"arrangement must be rows or fragments, not {arrangement}")
    if words.ndim > 2:
        # A layer at a time: the codes of one take several times the memory of its words.
        one = functools.partial(repack, bits=bits, arrangement=arrangement)
        stacked = (words, scales, zeros, group_index)
        return jax.lax.map(lambda layer: one(*layer[:3], group_index=layer[3]), stacked)
    codes = unpack(words, bits)
    inputs, groups = codes.shape[0], scales.shape[0]
    if inputs % groups:
        raise ValueError(f"{inputs} inputs do not divide into {groups} groups: use backend xla")
    order = None
    if group_index is not None:
        order = jnp.argsort(group_index, stable=True).astype(jnp.int32)
        codes = codes[order]
    packed = pack_tiles(codes, bits)
    return KernelWeight(
        words=packed if arrangement == "rows" else to_fragments(packed),
        grid=pack_grid(scales, zeros, inputs),
        order=order,
        bits=bits,
        inputs=inputs,
        groups=groups,
        scale_dtype=scales.dtype.name,
        arrangement=arrangement,
    )


def restore(
    weight: KernelWeight,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Turns a weight back into the checkpoint's layout: words, scales, zeros and group_index."""
    if weight.grid.ndim > 2:
        return jax.vmap(restore)(weight)
    codes = codes_of(weight)
    scales, zeros = scales_and_zeros(weight)
    group_index = None
    if weight.order is not None:
        codes = jnp.zeros_like(codes).at[weight.order].set(codes)
        groups = jnp.arange(weight.inputs, dtype=jnp.int32) // weight.group_size
        group_index = jnp.zeros_like(groups).at[weight.order].set(groups)
    return pack(codes, weight.bits), scales, zeros, group_index


def codes_of(weight: KernelWeight) -> jax.Array:
    """Codes uint8 [I, O], in the order of the words."""
    words = weight.words
    if weight.arrangement == "fragments":
        words = from_fragments(words)[:, : weight.outputs]
    return unpack_tiles(words, weight.bits)[: weight.inputs]


def scales_and_zeros(weight: KernelWeight) -> tuple[jax.Array, jax.Array]:
    """Scales [G, O] in the checkpoint's dtype and zeros uint8 [G, O]."""
    return unpack_grid(weight.grid[: weight.groups], weight.scale_dtype)

"""The product with a 2:4 sparse weight on TPUs.

Invariant: the dense matrix exists in VMEM only, one block of it at a time. A block is laid out by
four stores with a stride of four rows: store p writes input p of every quad, which is the first
kept value where it stood at p, the second where that one did, and zero elsewhere.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import dispatch, tpu_blocks
from ..codes import GRID_SPAN, scales_and_offsets
from ..devices import device_kind
from ..frozen import checked, frozen_product
from ..stack import as_stack
from ..tpu_blocks import LANES, group_rows, scaled, unpack_block
from . import sizes
from .layout import CODED_QUADS, QUADS, SparseWeight

unsupported = functools.partial(dispatch.unsupported, backend="pallas_tpu", span=GRID_SPAN)


def sparse24_matmul(x: jax.Array, weight: SparseWeight, *, interpret=False) -> jax.Array:
    """x [M, I] times the weight: [M, O] of x's dtype. Differentiable in x.

    Args:
        x: bfloat16 or float32 [M, I].
        weight: see layout.py.
        interpret: run on the CPU, for tests.

    Raises:
        ValueError: what `unsupported` says.
    """
    return _product(x, weight, interpret)


def _blocked(
    x: jax.Array, weight: SparseWeight, interpret, *, transposed: bool = False
) -> jax.Array:
    blocks = sizes.blocks(
        device_kind(), weight.bits, weight.inputs, weight.outputs, x.shape[0], x.dtype.itemsize
    )
    stack, layer = as_stack(weight)
    inputs = stack.positions.shape[1] * 32
    outputs = pl.cdiv(weight.outputs, LANES) * LANES
    blocks = blocks._replace(
        inputs=min(blocks.inputs, inputs), outputs=min(blocks.outputs, outputs)
    )
    rows = blocks.inputs // 4
    if weight.bits is not None:
        rows = blocks.inputs // (4 * CODED_QUADS) * 8 * weight.bits
    operands = [
        tpu_blocks.Operand(stack.positions, blocks.inputs // 32),
        tpu_blocks.Operand(stack.values, rows),
    ]
    if stack.grid is not None:
        operands.append(tpu_blocks.Operand(stack.grid, None))
    return tpu_blocks.product(
        x,
        operands,
        functools.partial(_expand, weight=weight),
        blocks=blocks,
        transposed=transposed,
        inputs=weight.inputs,
        layer=layer,
        # Stores with a stride need rows of one register's width.
        scratch=[pltpu.VMEM((blocks.inputs, LANES), jnp.float32)] * (blocks.outputs // LANES),
        interpret=interpret,
        name="sparse24_matmul_gradient" if transposed else "sparse24_matmul",
    )


_product = checked(
    frozen_product(_blocked, functools.partial(_blocked, transposed=True)), unsupported
)


def _expand(refs, part: tpu_blocks.Part, dtype, *, weight: SparseWeight) -> jax.Array:
    """One block of weights [inputs, outputs]."""
    positions_ref, values_ref, *rest = refs
    grid_ref, strips = (None, rest) if weight.bits is None else (rest[0], rest[1:])
    words = positions_ref[...]
    if weight.bits is None:
        kept = [values_ref[plane].astype(jnp.float32) for plane in range(2)]
    else:
        kept = _dequantised(values_ref, grid_ref, part, weight)
    for tile in range(words.shape[0] // 8):
        fields = [words[8 * tile : 8 * tile + 8] >> (4 * f) for f in range(8)]
        codes = jnp.concatenate(fields, axis=0)
        first, second = codes & jnp.int32(3), (codes >> 2) & jnp.int32(3)
        a, b = (plane[tile * QUADS : (tile + 1) * QUADS] for plane in kept)
        for p in range(4):
            # Row r of `column` is input p of quad r, row 4 r + p of the block. Interleaving four
            # such arrays in registers would shuffle all their rows; a store takes a stride instead.
            column = jnp.where(first == p, a, jnp.where(second == p, b, jnp.float32(0)))
            for k, strip_ref in enumerate(strips):
                part_of_row = column[:, k * LANES : (k + 1) * LANES]
                strip_ref[pl.ds(tile * 4 * QUADS + p, QUADS, 4), :] = part_of_row
    return jnp.concatenate([strip_ref[...].astype(dtype) for strip_ref in strips], axis=1)


def _dequantised(values_ref, grid_ref, part: tpu_blocks.Part, weight: SparseWeight):
    """The first and the second kept values of a block's quads, float32 [quads, outputs]."""
    assert weight.bits is not None
    codes = unpack_block(values_ref[...], weight.bits).astype(jnp.float32)
    starts = range(0, codes.shape[0], CODED_QUADS)
    pieces = [codes[start : start + CODED_QUADS] for start in starts]
    rows = grid_ref[...] if weight.groups == 1 else group_rows(grid_ref, part, weight.group_size)
    grid = scales_and_offsets(rows, weight.bits, "float16")
    # A tile has the first values of its quads, then their second ones.
    return [scaled(jnp.concatenate(pieces[plane::2], axis=0), *grid) for plane in range(2)]

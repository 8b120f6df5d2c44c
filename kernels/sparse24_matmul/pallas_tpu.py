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

from .. import tpu_blocks
from ..frozen import frozen_product
from ..quant_matmul.pallas_tpu import device_kind, group_rows, scales_and_offsets, unpack_block
from ..stack import stacked
from . import config
from .layout import CODED_QUADS, QUADS, SparseWeight

_LANES = 128


def unsupported(x: jax.Array, weight: SparseWeight) -> str | None:
    """Why this kernel cannot serve, or None if it can."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}: bfloat16 and float32 are supported"
    if weight.arrangement != "rows":
        return f"the weight is arranged as {weight.arrangement}: compress it for pallas_tpu"
    size = weight.group_size
    if weight.groups > 1 and size not in (32, 64, 128, 256, 512) and size % 1024:
        return f"group size {size} is not 32, 64, 128, 256, 512 or a multiple of 1024"
    return None


def sparse24_matmul(x: jax.Array, weight: SparseWeight, *, interpret=False) -> jax.Array:
    """x [M, I] times the weight: [M, O] of x's dtype. Differentiable in x.

    Args:
        x: bfloat16 or float32 [M, I].
        weight: see layout.py.
        interpret: run on the CPU, for tests.

    Raises:
        ValueError: what `unsupported` says.
    """
    reason = unsupported(x, weight)
    if reason:
        raise ValueError(reason)
    return _product(x, weight, interpret)


def _blocked(
    x: jax.Array, weight: SparseWeight, interpret, *, transposed: bool = False
) -> jax.Array:
    blocks = config.blocks(
        device_kind(),
        weight.bits,
        weight.inputs,
        weight.outputs,
        x.shape[0],
        x.dtype.itemsize,
    )
    stack, layer = stacked(weight)
    quads = stack.positions.shape[1] * 8
    lanes = pl.cdiv(weight.outputs, _LANES) * _LANES
    blocks = blocks._replace(i=min(blocks.i, quads * 4), o=min(blocks.o, lanes))
    rows = blocks.i // 4 if weight.bits is None else blocks.i // 512 * 8 * weight.bits
    operands = [
        tpu_blocks.Operand(stack.positions, blocks.i // 32),
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
        scratch=[pltpu.VMEM((blocks.i, _LANES), jnp.float32)] * (blocks.o // _LANES),
        interpret=interpret,
        name="sparse24_matmul_gradient" if transposed else "sparse24_matmul",
    )


_product = frozen_product(_blocked, functools.partial(_blocked, transposed=True))


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
            column = jnp.where(first == p, a, jnp.where(second == p, b, jnp.float32(0)))
            for k, strip_ref in enumerate(strips):
                part_of_row = column[:, k * _LANES : (k + 1) * _LANES]
                strip_ref[pl.ds(tile * 4 * QUADS + p, QUADS, 4), :] = part_of_row
    return jnp.concatenate([strip_ref[...].astype(dtype) for strip_ref in strips], axis=1)


def _dequantised(values_ref, grid_ref, part: tpu_blocks.Part, weight: SparseWeight):
    """The first and the second kept values of a block's quads, float32 [quads, outputs]."""
    assert weight.bits is not None
    codes = unpack_block(values_ref[...], weight.bits).astype(jnp.float32)
    starts = range(0, codes.shape[0], CODED_QUADS)
    pieces = [codes[start : start + CODED_QUADS] for start in starts]
    rows = grid_ref[...] if weight.groups == 1 else group_rows(grid_ref, part, weight.group_size)
    scales, offsets = scales_and_offsets(rows, weight.bits, "float16")
    kept = []
    for plane in range(2):
        values = jnp.concatenate(pieces[plane::2], axis=0)
        grouped = values.reshape(scales.shape[0], -1, values.shape[1])
        values = scales[:, None, :] * (grouped - offsets[:, None, :])
        kept.append(values.reshape(-1, values.shape[-1]))
    return kept

"""The walk over blocks that every TPU kernel with compressed weights shares.

It is a product and its gradient, given a way to expand one block of the weight in VMEM, and what
kernels need to expand one.

Invariant: an expanded block never leaves VMEM, and sums run in float32. Blocks need not divide the
matrix: what lies behind an edge of the summed axis is multiplied by zero on both sides (it may read
as anything, even NaN), what lies behind another edge is never written.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .codes import fields_of, pairs_of_field, rows_of_set

LANES = 128
"""Columns of a register."""
VMEM_LIMIT = 15 * 2**20
"""Bytes of VMEM a kernel may use: a v4 core has 16 MiB, the later ones more."""

_COMPILER = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
)


class Blocks(NamedTuple):
    """Sizes of a block: rows of x, outputs, inputs."""

    rows: int
    outputs: int
    inputs: int


class Operand(NamedTuple):
    """One array that stores the weight, [layers, rows, O] or [layers, planes, rows, O].

    Attributes:
        array: the whole array.
        block_rows: rows that hold one block of inputs; None for all rows, whatever the block.
    """

    array: jax.Array
    block_rows: int | None


class Part(NamedTuple):
    """What `expand` learns of the block it expands: its place on the inputs (may be traced)."""

    index: jax.Array | int
    inputs: int


Expand = Callable[[Sequence, Part, jnp.dtype], jax.Array]
"""From the blocks of the operands (refs), the part and a dtype to the weights [inputs, outputs]."""


def product(
    x: jax.Array,
    operands: Sequence[Operand],
    expand: Expand,
    *,
    blocks: Blocks,
    transposed: bool = False,
    inputs: int,
    layer: jax.Array,
    scratch: Sequence = (),
    interpret=False,
    name: str = "matmul",
) -> jax.Array:
    """Multiplies x by a weight that `expand` produces block by block.

    Args:
        x: bfloat16 or float32 [M, I], or [M, O] if `transposed`.
        operands: the arrays that hold the weight.
        expand: makes one block of the weight; the refs of `scratch` follow those of the operands.
        blocks: sizes of a block; those of outputs and inputs may exceed the matrix.
        transposed: multiply by the transpose, as the gradient does.
        inputs: I.
        layer: int32 [1], the layer that is meant.
        scratch: VMEM buffers for `expand`.
        interpret: run on the CPU, for tests.
        name: of the kernel in profiles.

    Returns:
        [M, O], or [M, I] if `transposed`, of x's dtype.
    """
    outputs = operands[0].array.shape[-1]
    kept, summed = (inputs, outputs) if transposed else (outputs, inputs)
    sizes = (blocks.inputs, blocks.outputs) if transposed else (blocks.outputs, blocks.inputs)
    kept_block, summed_block = sizes
    lengths = ((x.shape[0], blocks.rows), (kept, kept_block), (summed, summed_block))
    grid = tuple(pl.cdiv(length, block) for length, block in lengths)
    x_spec = pl.BlockSpec((blocks.rows, summed_block), lambda m, n, k, layer: (m, k))
    body = functools.partial(
        _body,
        expand=expand,
        operand_count=len(operands),
        summed=summed,
        summed_block=summed_block,
        inputs_block=blocks.inputs,
        transposed=transposed,
    )
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], kept), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[x_spec, *(_weight_spec(o, blocks.outputs, transposed) for o in operands)],
            out_specs=pl.BlockSpec((blocks.rows, kept_block), lambda m, n, k, layer: (m, n)),
            scratch_shapes=[pltpu.VMEM((blocks.rows, kept_block), jnp.float32), *scratch],
        ),
        compiler_params=_COMPILER,
        cost_estimate=_cost(x, operands, kept),
        interpret=interpret,
        name=name,
    )(layer, x, *(operand.array for operand in operands))


def _weight_spec(operand: Operand, outputs: int, transposed: bool) -> pl.BlockSpec:
    """The block of an operand that holds one block of the weight, `outputs` wide."""
    _, *planes, rows, _ = operand.array.shape
    whole = operand.block_rows is None or operand.block_rows >= rows
    shape = (None, *planes, rows if whole else operand.block_rows, outputs)

    def index(m, n, k, layer):
        row, column = (n, k) if transposed else (k, n)
        return (layer[0], *(0 for _ in planes), 0 if whole else row, column)

    return pl.BlockSpec(shape, index)


def _body(
    layer_ref,
    x_ref,
    *refs,
    expand: Expand,
    operand_count: int,
    summed: int,
    summed_block: int,
    inputs_block: int,
    transposed: bool,
):
    del layer_ref  # the index maps read it
    operand_refs, (y_ref, sum_ref, *scratch) = refs[:operand_count], refs[operand_count:]
    # The summed axis is the last of the grid, so a block of y stays in VMEM until it is whole.
    step, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    part = Part(pl.program_id(1) if transposed else step, inputs_block)
    x = x_ref[...]
    weights = expand((*operand_refs, *scratch), part, x.dtype)
    if summed % summed_block:
        x, weights = _zero_behind_edge(x, weights, summed - step * summed_block, transposed)
    sum_ref[...] += dot(x, weights, transposed=transposed)

    @pl.when(step == last)
    def _():
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _zero_behind_edge(x, weights, count, transposed: bool):
    # Both sides: what lies there may be NaN, which a zero on one side would not silence.
    columns = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    x = jnp.where(columns < count, x.astype(jnp.float32), 0.0).astype(x.dtype)
    axis = 1 if transposed else 0
    places = jax.lax.broadcasted_iota(jnp.int32, weights.shape, axis)
    weights = jnp.where(places < count, weights.astype(jnp.float32), 0.0).astype(weights.dtype)
    return x, weights


def dot(x: jax.Array, weights: jax.Array, *, transposed: bool = False) -> jax.Array:
    """x @ weights (or weights^T) in float32; float32 operands are not rounded to bfloat16."""
    exact = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x,
        weights,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def unpack_block(words: jax.Array, bits: int) -> jax.Array:
    """Words of whole tiles to bfloat16 codes [inputs, outputs]: 2^bits + q, or q with 8 bits."""
    rows, per_tile = rows_of_set(bits), 8 * bits
    blocks = []
    for tile in range(0, words.shape[0], per_tile):
        sets = [words[tile + part : tile + part + rows] for part in range(0, per_tile, rows)]
        pairs = [pairs_of_field(sets, pieces, bits) for pieces in fields_of(bits)]
        # A register of bfloat16 keeps rows 2 r and 2 r + 1 in the halves of a word: no data moves.
        blocks += [pltpu.bitcast(words, jnp.bfloat16) for words in pairs]
    return jnp.concatenate(blocks, axis=0)


def group_rows(grid_ref, part: Part, group_size: int) -> jax.Array:
    """The rows of a grid that belong to one block of inputs."""
    count = max(1, part.inputs // group_size)
    first = quotient(part.index * part.inputs, group_size)
    if count % 8 == 0:
        return grid_ref[pl.ds(pl.multiple_of(first, 8), count), :]
    # A window that does not start at a register's first row can only be read row by row.
    rows = [grid_ref[pl.ds(first + k, 1), :] for k in range(count)]
    return jnp.concatenate(rows, axis=0)


def scaled(codes: jax.Array, scales: jax.Array, offsets: jax.Array) -> jax.Array:
    """float32 codes [N, O], less the offset [G, O] of their run of N / G rows, times its scale."""
    grouped = codes.reshape(scales.shape[0], -1, codes.shape[1])
    return (scales[:, None, :] * (grouped - offsets[:, None, :])).reshape(codes.shape)


def quotient(number: jax.Array | int, divisor: int) -> jax.Array:
    """number / divisor for numbers that are not negative: `//` would test for a sign."""
    return jax.lax.div(jnp.asarray(number, jnp.int32), jnp.int32(divisor))


def _cost(x: jax.Array, operands: Sequence[Operand], kept: int) -> pl.CostEstimate:
    stored = sum(operand.array.nbytes // operand.array.shape[0] for operand in operands)
    return pl.CostEstimate(
        flops=2 * x.size * kept,
        bytes_accessed=stored + (x.size + x.shape[0] * kept) * x.dtype.itemsize,
        transcendentals=0,
    )

"""The walk over blocks that every TPU kernel with compressed weights shares: a product and its
gradient, given a way to expand one block of the weight in VMEM.

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

VMEM_LIMIT = 15 * 2**20
"""Bytes of VMEM a kernel may use: a v4 core has 16 MiB, the later ones more."""


_COMPILER = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
)


class Blocks(NamedTuple):
    """Sizes of a block: rows of x, outputs, inputs."""

    m: int
    o: int
    i: int


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
    kept_block, summed_block = (blocks.i, blocks.o) if transposed else (blocks.o, blocks.i)
    grid = (pl.cdiv(x.shape[0], blocks.m), pl.cdiv(kept, kept_block), pl.cdiv(summed, summed_block))
    x_spec = pl.BlockSpec((blocks.m, summed_block), lambda m, n, k, layer: (m, k))
    weight_specs = [_weight_spec(operand, blocks.o, transposed) for operand in operands]
    body = functools.partial(
        _body,
        expand=expand,
        operand_count=len(operands),
        summed=summed,
        summed_block=summed_block,
        inputs_block=blocks.i,
        transposed=transposed,
    )
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], kept), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[x_spec, *weight_specs],
            out_specs=pl.BlockSpec((blocks.m, kept_block), lambda m, n, k, layer: (m, n)),
            scratch_shapes=[pltpu.VMEM((blocks.m, kept_block), jnp.float32), *scratch],
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


def _cost(x: jax.Array, operands: Sequence[Operand], kept: int) -> pl.CostEstimate:
    stored = sum(operand.array.nbytes // operand.array.shape[0] for operand in operands)
    return pl.CostEstimate(
        flops=2 * x.size * kept,
        bytes_accessed=stored + (x.size + x.shape[0] * kept) * x.dtype.itemsize,
        transcendentals=0,
    )

"""The product with a packed weight on TPUs.

Invariant: codes become weights in VMEM only. Two kernels: `decode` (few rows) multiplies the bare
codes and scales the sums of a group, `prefill` (many rows, and the gradient) scales the weights.

Neither converts integers to floats one by one, which the vector unit has no time for at batch 1: a
code written into the mantissa of a bfloat16 whose exponent is that of 2^bits reads as 2^bits + q,
exactly. With z' = zero + 2^bits the product is  y = sum_g s_g (x_g @ (2^bits + q_g) - z'_g sum x_g)
for group g. Eight bits fill the mantissa and are converted.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import dispatch, tpu_blocks
from ..codes import GRID_SPAN, TILE, scales_and_offsets
from ..devices import device_kind
from ..frozen import checked, frozen_product
from ..stack import as_stack
from ..tpu_blocks import LANES, group_rows, quotient, scaled, unpack_block
from . import sizes
from .layout import KernelWeight

unsupported = functools.partial(dispatch.unsupported, backend="pallas_tpu", span=GRID_SPAN)


def quant_matmul(x: jax.Array, weight: KernelWeight, *, interpret=False) -> jax.Array:
    """x [M, I] times the weight: [M, O] of x's dtype. Differentiable in x; `order` is the caller's.

    Args:
        x: bfloat16 or float32 [M, I], in the order of the words.
        weight: see layout.py.
        interpret: run on the CPU, for tests.

    Raises:
        ValueError: what `unsupported` says.
    """
    return _product(x, weight, interpret)


def _value(x: jax.Array, weight: KernelWeight, interpret) -> jax.Array:
    kernel = _decode if x.shape[0] <= sizes.DECODE_ROWS else _prefill
    return kernel(x, weight, interpret)


def _prefill(
    x: jax.Array, weight: KernelWeight, interpret, *, transposed: bool = False
) -> jax.Array:
    blocks = sizes.prefill_blocks(
        device_kind(), weight.bits, weight.inputs, weight.outputs, x.shape[0], x.dtype.itemsize
    )
    inputs = -(-weight.inputs // TILE) * TILE
    blocks = blocks._replace(
        inputs=min(blocks.inputs, inputs), outputs=min(blocks.outputs, weight.outputs)
    )
    if weight.groups > 1:
        # A part of a sharded weight has no spare rows in its grid: its blocks must end with it.
        rows_of = lambda i: pl.cdiv(weight.inputs, i) * max(1, i // weight.group_size)
        while blocks.inputs > TILE and rows_of(blocks.inputs) > weight.grid.shape[-2]:
            blocks = blocks._replace(inputs=blocks.inputs // TILE // 2 * TILE)
    stack, layer = as_stack(weight)
    return tpu_blocks.product(
        x,
        [
            tpu_blocks.Operand(stack.words, blocks.inputs // TILE * 8 * weight.bits),
            tpu_blocks.Operand(stack.grid, None),
        ],
        functools.partial(_expand, weight=weight),
        blocks=blocks,
        transposed=transposed,
        inputs=weight.inputs,
        layer=layer,
        interpret=interpret,
        name="quant_matmul_gradient" if transposed else "quant_matmul_prefill",
    )


def _expand(refs, part: tpu_blocks.Part, dtype, *, weight: KernelWeight) -> jax.Array:
    """One block of weights [inputs, outputs]: scale * (q - zero), rounded to `dtype`."""
    words_ref, grid_ref = refs
    codes = unpack_block(words_ref[...], weight.bits).astype(jnp.float32)
    rows = grid_ref[...] if weight.groups == 1 else group_rows(grid_ref, part, weight.group_size)
    return scaled(codes, *scales_and_offsets(rows, weight.bits, weight.scale_dtype)).astype(dtype)


def _decode(x: jax.Array, weight: KernelWeight, interpret) -> jax.Array:
    tiles = -(-weight.inputs // TILE)
    outputs = sizes.decode_outputs(
        device_kind(), weight.bits, weight.inputs, weight.outputs, x.shape[0]
    )
    outputs = min(outputs, weight.outputs)
    stack, layer = as_stack(weight)
    rows = stack.grid.shape[1]
    x = jnp.pad(x, ((0, 0), (0, tiles * TILE - weight.inputs)))
    stored = (stack.words.nbytes + stack.grid.nbytes) // stack.grid.shape[0]
    whole = lambda o, layer: (0, 0)
    columns = lambda o, layer: (0, o)
    of_layer = lambda o, layer: (layer[0], 0, o)
    return pl.pallas_call(
        functools.partial(_decode_body, weight=weight),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], weight.outputs), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(weight.outputs, outputs),),
            in_specs=[
                pl.BlockSpec(x.shape, whole),
                pl.BlockSpec((None, stack.words.shape[1], outputs), of_layer),
                pl.BlockSpec((None, rows, outputs), of_layer),
            ],
            out_specs=pl.BlockSpec((x.shape[0], outputs), columns),
            scratch_shapes=[pltpu.VMEM((rows, outputs), jnp.float32)] * 2,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=tpu_blocks.VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.size * weight.outputs,
            bytes_accessed=stored + (x.size + x.shape[0] * weight.outputs) * x.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="quant_matmul_decode",
    )(layer, x, stack.words, stack.grid)


_product = checked(
    frozen_product(_value, functools.partial(_prefill, transposed=True)), unsupported
)


def _decode_body(
    layer_ref, x_ref, words_ref, grid_ref, y_ref, scales_ref, offsets_ref, *, weight: KernelWeight
):
    del layer_ref  # the index maps read it
    scales_ref[...], offsets_ref[...] = scales_and_offsets(
        grid_ref[...], weight.bits, weight.scale_dtype
    )
    rows = 8 * weight.bits
    tiles = words_ref.shape[0] // rows
    # Within a step the compiler overlaps the tiles, between steps it does not.
    unroll = next(n for n in (8, 7, 6, 5, 4, 3, 2, 1) if tiles % n == 0)

    def some_tiles(step, total):
        for k in range(unroll):
            tile = step * unroll + k
            block = words_ref[pl.ds(pl.multiple_of(tile * rows, rows), rows), :]
            codes = unpack_block(block, weight.bits).astype(x_ref.dtype)
            x = x_ref[:, pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)]
            if weight.groups == 1:
                total += _centred(x, codes, offsets_ref[...])
            else:
                total += _scaled_groups(x, codes, scales_ref, offsets_ref, tile, weight)
        return total

    total = jax.lax.fori_loop(0, tiles // unroll, some_tiles, jnp.zeros(y_ref.shape, jnp.float32))
    if weight.groups == 1:
        total *= scales_ref[...]
    y_ref[...] = total.astype(y_ref.dtype)


def _centred(x: jax.Array, codes: jax.Array, offsets: jax.Array) -> jax.Array:
    """x [M, N] @ (codes [N, O] - offsets [1, O]) in float32."""
    # What is subtracted is the same for all inputs of a group: once from a sum, not from each code.
    sums = jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)
    return tpu_blocks.dot(x, codes) - sums * offsets


def _scaled_groups(x, codes, scales_ref, offsets_ref, tile, weight: KernelWeight) -> jax.Array:
    """x [M, 256] times one tile of codes, every group scaled."""
    size, total = weight.group_size, jnp.zeros((), jnp.float32)
    for start in range(0, TILE, LANES):
        x_group, codes_part = x[:, start : start + LANES], codes[start : start + LANES]
        lane = jax.lax.broadcasted_iota(jnp.int32, x_group.shape, 1)
        for k in range(max(1, LANES // size)):
            if size < LANES:
                # The lanes of other groups are zeroed: a slice of lanes would have to be shifted.
                inside = quotient(lane, size) == k
                x_group = jnp.where(inside, x[:, start : start + LANES].astype(jnp.float32), 0.0)
                x_group = x_group.astype(x.dtype)
            row = pl.ds(quotient(tile * TILE + start, size) + k, 1)
            total += _centred(x_group, codes_part, offsets_ref[row, :]) * scales_ref[row, :]
    return total

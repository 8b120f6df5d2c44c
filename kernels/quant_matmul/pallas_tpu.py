"""The product with a packed weight on TPUs.

Invariant: codes become weights in VMEM only. Two kernels: `decode` (few rows) multiplies the bare
codes and scales the sums of a group, `prefill` (many rows, and the gradient) scales the weights.

Neither converts integers to floats one by one, which the vector unit has no time for at batch 1: a
code written into the mantissa of a bfloat16 whose exponent is that of 2^bits reads as 2^bits + q,
exactly. With z' = zero + 2^bits the product is  y = sum_g s_g (x_g @ (2^bits + q_g) - z'_g sum x_g)
for group g. Eight bits fill the mantissa and are converted.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import tpu_blocks
from ..frozen import frozen_product
from ..stack import stacked
from . import config
from .layout import GRID_SPAN, TILE, KernelWeight, fields_of, rows_of_set

_LANES = 128


def unsupported(x: jax.Array, weight: KernelWeight) -> str | None:
    """Why these kernels cannot serve, or None if they can."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}: bfloat16 and float32 are supported"
    if weight.arrangement != "rows":
        return f"the words are arranged as {weight.arrangement}: prepare the weight for pallas_tpu"
    size = weight.group_size
    if weight.groups > 1 and size not in (32, 64, 128, 256, 512) and size % GRID_SPAN:
        return f"group size {size} is not 32, 64, 128, 256, 512 or a multiple of {GRID_SPAN}"
    return None


def quant_matmul(x: jax.Array, weight: KernelWeight, *, interpret=False) -> jax.Array:
    """x [M, I] times the weight: [M, O] of x's dtype. Differentiable in x; `order` is the caller's.

    Args:
        x: bfloat16 or float32 [M, I], in the order of the words.
        weight: see layout.py.
        interpret: run on the CPU, for tests.

    Raises:
        ValueError: what `unsupported` says.
    """
    reason = unsupported(x, weight)
    if reason:
        raise ValueError(reason)
    return _product(x, weight, interpret)


def _value(x: jax.Array, weight: KernelWeight, interpret) -> jax.Array:
    kernel = _decode if x.shape[0] <= config.DECODE_ROWS else _prefill
    return kernel(x, weight, interpret)


def _prefill(
    x: jax.Array, weight: KernelWeight, interpret, *, transposed: bool = False
) -> jax.Array:
    blocks = config.prefill_blocks(
        device_kind(), weight.bits, weight.inputs, weight.outputs, x.shape[0], x.dtype.itemsize
    )
    tiles = -(-weight.inputs // TILE)
    blocks = blocks._replace(i=min(blocks.i, tiles * TILE), o=min(blocks.o, weight.outputs))
    if weight.groups > 1:
        # A part of a sharded weight has no spare rows in its grid: its blocks must end with it.
        rows_of = lambda i: pl.cdiv(weight.inputs, i) * max(1, i // weight.group_size)
        while blocks.i > TILE and rows_of(blocks.i) > weight.grid.shape[-2]:
            blocks = blocks._replace(i=blocks.i // TILE // 2 * TILE)
    stack, layer = stacked(weight)
    return tpu_blocks.product(
        x,
        [
            tpu_blocks.Operand(stack.words, blocks.i // TILE * 8 * weight.bits),
            tpu_blocks.Operand(stack.grid, None),
        ],
        functools.partial(expand, weight=weight),
        blocks=blocks,
        transposed=transposed,
        inputs=weight.inputs,
        layer=layer,
        interpret=interpret,
        name="quant_matmul_gradient" if transposed else "quant_matmul_prefill",
    )


def expand(refs, part: tpu_blocks.Part, dtype, *, weight: KernelWeight) -> jax.Array:
    """One block of weights [inputs, outputs]: scale * (q - zero), rounded to `dtype`."""
    words_ref, grid_ref = refs
    codes = unpack_block(words_ref[...], weight.bits).astype(jnp.float32)
    rows = grid_ref[...] if weight.groups == 1 else group_rows(grid_ref, part, weight.group_size)
    scales, zeros = scales_and_offsets(rows, weight.bits, weight.scale_dtype)
    grouped = codes.reshape(scales.shape[0], -1, codes.shape[1])
    weights = scales[:, None, :] * (grouped - zeros[:, None, :])
    return weights.reshape(codes.shape).astype(dtype)


def group_rows(grid_ref, part: tpu_blocks.Part, group_size: int) -> jax.Array:
    """The rows of a grid that belong to one block of inputs."""
    count = max(1, part.inputs // group_size)
    first = quotient(part.index * part.inputs, group_size)
    if count % 8 == 0:
        return grid_ref[pl.ds(pl.multiple_of(first, 8), count), :]
    # A window that does not start at a register's first row can only be read row by row.
    rows = [grid_ref[pl.ds(first + k, 1), :] for k in range(count)]
    return jnp.concatenate(rows, axis=0)


def _decode(x: jax.Array, weight: KernelWeight, interpret) -> jax.Array:
    tiles = -(-weight.inputs // TILE)
    outputs = config.decode_outputs(
        device_kind(), weight.bits, weight.inputs, weight.outputs, x.shape[0]
    )
    outputs = min(outputs, weight.outputs)
    stack, layer = stacked(weight)
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


_product = frozen_product(_value, functools.partial(_prefill, transposed=True))


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
    sums = jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)
    return tpu_blocks.dot(x, codes) - sums * offsets


def _scaled_groups(x, codes, scales_ref, offsets_ref, tile, weight: KernelWeight) -> jax.Array:
    """x [M, 256] times one tile of codes, every group scaled."""
    size, total = weight.group_size, jnp.zeros((), jnp.float32)
    for start in range(0, TILE, _LANES):
        own, codes_part = x[:, start : start + _LANES], codes[start : start + _LANES]
        lane = jax.lax.broadcasted_iota(jnp.int32, own.shape, 1)
        for k in range(max(1, _LANES // size)):
            if size < _LANES:
                # The lanes of other groups are zeroed: a slice of lanes would have to be shifted.
                inside = quotient(lane, size) == k
                own = jnp.where(inside, x[:, start : start + _LANES].astype(jnp.float32), 0.0)
                own = own.astype(x.dtype)
            row = pl.ds(quotient(tile * TILE + start, size) + k, 1)
            total += _centred(own, codes_part, offsets_ref[row, :]) * scales_ref[row, :]
    return total


def unpack_block(words: jax.Array, bits: int) -> jax.Array:
    """Words of whole tiles to bfloat16 codes [inputs, outputs]: 2^bits + q, or q with 8 bits."""
    rows, per_tile = rows_of_set(bits), 8 * bits
    blocks = []
    for tile in range(0, words.shape[0], per_tile):
        sets = [words[tile + part : tile + part + rows] for part in range(0, per_tile, rows)]
        pairs = [pairs_of_field(sets, pieces, bits) for pieces in fields_of(bits)]
        blocks += [pltpu.bitcast(words, jnp.bfloat16) for words in pairs]
    return jnp.concatenate(blocks, axis=0)


def pairs_of_field(sets: Sequence[jax.Array], pieces, bits: int) -> jax.Array:
    """Two codes of every word as two bfloat16 in a word: 2^bits + q, or q with 8 bits.

    Args:
        sets: words int32 of each set, of one shape, which is that of the result.
        pieces: a field, from `fields_of`.
        bits: 2, 3, 4 or 8.
    """
    if bits == 8:
        ((_, shift, _, _),) = pieces
        low = _bfloat16_bits((sets[0] >> shift) & np.int32(0xFF))
        high = _bfloat16_bits((sets[0] >> (shift + 16)) & np.int32(0xFF))
        return jax.lax.shift_right_logical(low, jnp.int32(16)) | high
    word = jnp.int32((127 + bits) << 7) * jnp.int32(0x00010001)
    for part, shift, mask, position in pieces:
        place = 7 - bits + position
        both = np.uint32(mask << place) * np.uint32(0x00010001)
        word |= _shifted(sets[part], shift - place) & both.astype(np.int32)
    return word


def _shifted(words: jax.Array, right: int) -> jax.Array:
    if right == 0:
        return words
    if right > 0:
        return jax.lax.shift_right_logical(words, jnp.int32(right))
    return jax.lax.shift_left(words, jnp.int32(-right))


def _bfloat16_bits(codes: jax.Array) -> jax.Array:
    """The bfloat16 of integers below 256, exact, in the upper half of a word."""
    return jax.lax.bitcast_convert_type(codes.astype(jnp.float32), jnp.int32)


def scales_and_offsets(grid: jax.Array, bits: int, scale_dtype: str) -> tuple[jax.Array, jax.Array]:
    """float32 scales and what to subtract from the values of `unpack_block`, from words of `grid`.

    float16 has no place in a TPU's registers: it is taken apart, exactly, subnormal numbers too.
    """
    base = 0 if bits == 8 else 2**bits
    offsets = (jax.lax.shift_right_logical(grid, jnp.int32(16)) + jnp.int32(base)).astype(
        jnp.float32
    )
    if scale_dtype == "bfloat16":
        return jax.lax.bitcast_convert_type(grid << 16, jnp.float32), offsets
    exponent = (grid >> 10) & jnp.int32(31)
    hidden = jnp.where(exponent > 0, jnp.int32(1 << 10), jnp.int32(0))
    mantissa = ((grid & jnp.int32(0x3FF)) | hidden).astype(jnp.float32)
    power = (jnp.maximum(exponent, 1) + jnp.int32(127 - 25)) << 23
    magnitude = mantissa * jax.lax.bitcast_convert_type(power, jnp.float32)
    negative = (grid & jnp.int32(1 << 15)) != 0
    return jnp.where(negative, -magnitude, magnitude), offsets


def quotient(number: jax.Array | int, divisor: int) -> jax.Array:
    """number / divisor for numbers that are not negative: `//` would test for a sign."""
    return jax.lax.div(jnp.asarray(number, jnp.int32), jnp.int32(divisor))


def device_kind() -> str:
    """The kind of the default device, the key of tuned.json."""
    return jax.devices()[0].device_kind

"""Packs small unsigned integers into 32-bit words, the form in which checkpoints store codes.

Invariant: the words are one little-endian bit stream along the packed axis, the layout of GPTQ
checkpoints: value k lies at bit `bits * k` of the stream, word w holds bits 32 w .. 32 w + 31. With
2, 4 and 8 bits no value crosses a word; with 3 bits 32 values fill 3 words and values 10 and 21
straddle two of them.

Three bits are handled as four aligned segments of 24 bits (8 values) for every 3 words: five shifts
realign the words, and what remains is one broadcast shift without a gather, which XLA fuses into
its consumer.
"""

import functools

import jax
import jax.numpy as jnp

BIT_WIDTHS = (2, 3, 4, 8)


def word_count(count: int, bits: int) -> int:
    """Number of 32-bit words that hold `count` values of `bits` bits."""
    return -(-count * bits // 32)


@functools.partial(jax.jit, static_argnames=("bits", "axis"))
def pack(values: jax.Array, bits: int, axis: int = 0) -> jax.Array:
    """Packs integers into words along one axis.

    Args:
      values: integers [..., N, ...] of any integer dtype, taken modulo 2^bits.
      bits: width of a value: 2, 3, 4 or 8.
      axis: the axis that holds the N values; it may be negative.

    Returns:
      int32 words [..., ceil(N * bits / 32), ...]; the unused bits of the last word are 0.

    Raises:
      ValueError: for another number of bits.
    """
    _check_bits(bits)
    axis = axis % values.ndim
    words = word_count(values.shape[axis], bits)
    fields = jnp.bitwise_and(values.astype(jnp.uint32), jnp.uint32(2**bits - 1))
    if bits == 3:
        packed = _join_segments(_gather_fields(fields, 3, 8, axis, multiple=4), axis)
    else:
        packed = _gather_fields(fields, bits, 32 // bits, axis, multiple=1)
    packed = jax.lax.slice_in_dim(packed, 0, words, axis=axis)
    return jax.lax.bitcast_convert_type(packed, jnp.int32)


@functools.partial(jax.jit, static_argnames=("bits", "count", "axis"))
def unpack(words: jax.Array, bits: int, count: int | None = None, axis: int = 0) -> jax.Array:
    """Reads the values that `pack` wrote.

    Args:
      words: int32 (or uint32) words [..., M, ...].
      bits: width of a value: 2, 3, 4 or 8.
      count: number of values to return; by default all that the words can hold, floor(32 M / bits).
      axis: the axis that holds the words; it may be negative.

    Returns:
      uint8 values [..., count, ...] in 0 .. 2^bits - 1.

    Raises:
      ValueError: for another number of bits, or a count that the words cannot hold.
    """
    _check_bits(bits)
    axis = axis % words.ndim
    held = words.shape[axis] * 32 // bits
    if count is None:
        count = held
    if not 0 <= count <= held:
        raise ValueError(
            f"count {count} does not fit {words.shape[axis]} words of {bits}-bit values: "
            f"at most {held}"
        )
    words = jax.lax.bitcast_convert_type(words, jnp.uint32)
    if bits == 3:
        fields = _spread_fields(_split_segments(words, axis), 3, 8, axis)
    else:
        fields = _spread_fields(words, bits, 32 // bits, axis)
    return jax.lax.slice_in_dim(fields, 0, count, axis=axis)


def _check_bits(bits: int) -> None:
    if bits not in BIT_WIDTHS:
        raise ValueError(f"bits must be one of {BIT_WIDTHS}, not {bits}")


def _shifts(bits: int, per_word: int, axis: int, ndim: int) -> jax.Array:
    """Bit offsets of a word's fields, shaped to broadcast on a new axis behind `axis`."""
    shape = [1] * (ndim + 1)
    shape[axis + 1] = per_word
    return (jnp.arange(per_word, dtype=jnp.uint32) * jnp.uint32(bits)).reshape(shape)


def _spread_fields(words: jax.Array, bits: int, per_word: int, axis: int) -> jax.Array:
    """uint32 [..., M, ...] -> uint8 [..., M * per_word, ...]."""
    fields = jnp.expand_dims(words, axis + 1) >> _shifts(bits, per_word, axis, words.ndim)
    fields = jnp.bitwise_and(fields, jnp.uint32(2**bits - 1)).astype(jnp.uint8)
    return _merge(fields, axis)


def _gather_fields(
    fields: jax.Array, bits: int, per_word: int, axis: int, multiple: int
) -> jax.Array:
    """uint32 [..., N, ...] -> words [..., M, ...], ceil(N / per_word) raised to a `multiple`."""
    padding = [(0, 0)] * fields.ndim
    padding[axis] = (0, -fields.shape[axis] % (per_word * multiple))
    fields = jnp.pad(fields, padding)
    fields = _split(fields, axis, per_word)
    # The fields of a word do not overlap, so their sum is their union.
    return jnp.sum(
        fields << _shifts(bits, per_word, axis, fields.ndim - 1), axis=axis + 1, dtype=jnp.uint32
    )


def _split_segments(words: jax.Array, axis: int) -> jax.Array:
    """3-bit words [..., M, ...] -> segments of 24 bits [..., 4 ceil(M / 3), ...].

    The bits above the 24th of a segment are junk of the next one.
    """
    padding = [(0, 0)] * words.ndim
    padding[axis] = (0, -words.shape[axis] % 3)
    triples = _split(jnp.pad(words, padding), axis, 3)
    a, b, c = (jax.lax.index_in_dim(triples, k, axis + 1, keepdims=False) for k in range(3))
    segments = (a, (a >> 24) | (b << 8), (b >> 16) | (c << 16), c >> 8)
    return _merge(jnp.stack(segments, axis=axis + 1), axis)


def _join_segments(segments: jax.Array, axis: int) -> jax.Array:
    """Segments of 24 bits [..., 4 K, ...] -> words [..., 3 K, ...]."""
    quads = _split(segments, axis, 4)
    a, b, c, d = (jax.lax.index_in_dim(quads, k, axis + 1, keepdims=False) for k in range(4))
    words = (a | (b << 24), (b >> 8) | (c << 16), (c >> 16) | (d << 8))
    return _merge(jnp.stack(words, axis=axis + 1), axis)


def _split(array: jax.Array, axis: int, size: int) -> jax.Array:
    """[..., K * size, ...] -> [..., K, size, ...]."""
    return array.reshape(
        *array.shape[:axis], array.shape[axis] // size, size, *array.shape[axis + 1 :]
    )


def _merge(array: jax.Array, axis: int) -> jax.Array:
    """[..., K, size, ...] -> [..., K * size, ...]."""
    return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])

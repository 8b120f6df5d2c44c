"""Packing against Python's big integers: the words are the bits of one number, 32 at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idp_jax.kernels.packing import BIT_WIDTHS, pack, unpack, word_count


def _words_of(values: list[int], bits: int) -> np.ndarray:
    stream = sum(value << (bits * k) for k, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    words = [(stream >> (32 * k)) & 0xFFFFFFFF for k in range(count)]
    return np.array(words, np.uint32).view(np.int32)


@st.composite
def _streams(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.sampled_from(BIT_WIDTHS))
    # Few distinct lengths keep the number of compilations small.
    length = draw(st.sampled_from([1, 5, 11, 22, 32, 64, 75, 96]))
    values = st.lists(st.integers(0, 2**bits - 1), min_size=length, max_size=length)
    return bits, draw(values)


@settings(deadline=None, max_examples=100)
@given(_streams())
def test_words_are_one_little_endian_stream(stream):
    bits, values = stream
    words = pack(jnp.array(values, jnp.int32), bits)
    assert words.dtype == jnp.int32
    assert words.shape == (word_count(len(values), bits),)
    np.testing.assert_array_equal(words, _words_of(values, bits))
    unpacked = unpack(words, bits, len(values))
    assert unpacked.dtype == jnp.uint8
    np.testing.assert_array_equal(unpacked, values)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_unpack_reads_arbitrary_words(bits):
    words = np.random.default_rng(bits).integers(-(2**31), 2**31, (9, 7)).astype(np.int32)
    values = unpack(jnp.asarray(words), bits)
    assert values.shape == (9 * 32 // bits, 7)
    np.testing.assert_array_equal(pack(values, bits), words)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_axes_and_jit(bits, axis):
    values = np.random.default_rng(0).integers(0, 2**bits, (32, 64, 96)).astype(np.uint8)
    words = jax.jit(pack, static_argnums=(1, 2))(jnp.asarray(values), bits, axis)
    columns = np.moveaxis(np.asarray(words), axis, 0).reshape(words.shape[axis], -1)
    first = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)[:, 5]
    np.testing.assert_array_equal(columns[:, 5], _words_of([int(v) for v in first], bits))
    unpacked = jax.jit(unpack, static_argnums=(1, 2, 3))(words, bits, None, axis)
    np.testing.assert_array_equal(unpacked, values)


def test_golden_words():
    eights = pack(jnp.full(8, 8, jnp.uint8), 4)
    assert np.asarray(eights).view(np.uint32).tolist() == [0x88888888]
    sevens = pack(jnp.full(8, 7, jnp.uint8), 4)
    assert np.asarray(sevens).view(np.uint32).tolist() == [0x77777777]
    # Values 10 and 21 of 3 bits straddle: 10 has two bits in word 0 and one in word 1, 21 one in
    # word 1 and two in word 2.
    straddling = np.zeros(32, np.uint8)
    straddling[[10, 21]] = 7
    words = np.asarray(pack(jnp.asarray(straddling), 3)).view(np.uint32)
    assert words.tolist() == [0xC0000000, 0x80000001, 0x00000003]


def test_values_are_taken_modulo():
    np.testing.assert_array_equal(unpack(pack(jnp.array([-1, 8, 3]), 3), 3, 3), [7, 0, 3])


def test_bad_input():
    with pytest.raises(ValueError, match=r"bits must be one of .* not 5"):
        pack(jnp.zeros(32, jnp.uint8), 5)
    with pytest.raises(ValueError, match=r"bits must be one of .* not 1"):
        unpack(jnp.zeros(1, jnp.int32), 1)
    with pytest.raises(ValueError, match="count 9 does not fit 1 words"):
        unpack(jnp.zeros(1, jnp.int32), 4, 9)

"""Packed tensors against Python's big integers: a row of words is one number, 32 bits at a time."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idp_jax.formats import compressed_tensors, gptq
from idp_jax.formats.quantization import BITS, Layout, Packing
from idp_jax.kernels.packing import pack
from idp_jax.weights import Dense, Quantized

INPUTS, OUTPUTS, GROUPS = 64, 32, 2


def values_of(words: np.ndarray, bits: int, count: int, per_word: int | None = None) -> list[int]:
    """The first values of a row of words; `per_word` values of each, or a stream without gaps."""
    words = [int(word) & 0xFFFFFFFF for word in words]
    if per_word is not None:
        own = [(word >> bits * k) % 2**bits for word in words for k in range(per_word)]
        return own[:count]
    number = sum(word << 32 * k for k, word in enumerate(words))
    assert number >> bits * count == 0, "bits beyond the last value"
    return [(number >> bits * k) % 2**bits for k in range(count)]


def words_of(values, bits: int, per_word: int | None = None) -> np.ndarray:
    """A row of int32 words that holds the values; the inverse of `values_of`."""
    values, words = [int(value) for value in values], []
    if per_word is not None:
        for first in range(0, len(values), per_word):
            part = values[first : first + per_word]
            words.append(sum(value << bits * k for k, value in enumerate(part)))
    else:
        number = sum(value << bits * k for k, value in enumerate(values))
        words = [number >> 32 * k & 0xFFFFFFFF for k in range(-(-len(values) * bits // 32))]
    return np.array(words, np.uint32).view(np.int32)


@st.composite
def weights(draw: st.DrawFn):
    """A packed weight with the codes [I, O] and zeros [G, O] that it was made of."""
    bits = draw(st.sampled_from(BITS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    codes = rng.integers(0, 2**bits, (INPUTS, OUTPUTS)).astype(np.uint8)
    edges = st.sampled_from([0, 1, 2 ** (bits - 1), 2**bits - 1])
    chosen = st.lists(edges, min_size=GROUPS * OUTPUTS, max_size=GROUPS * OUTPUTS)
    zero = np.array(draw(chosen), np.uint8).reshape(GROUPS, OUTPUTS)
    scales = rng.uniform(0.01, 0.1, (GROUPS, OUTPUTS)).astype(np.float16)
    index = rng.integers(0, GROUPS, INPUTS).astype(np.int32) if draw(st.booleans()) else None
    words = np.asarray(pack(jnp.asarray(codes), bits))
    return Quantized(words, scales, zero, bits=bits, group_index=index), codes, zero


def same(one: Quantized, other: Quantized) -> None:
    for name in ("words", "scales", "zeros", "group_index"):
        x, y = getattr(one, name), getattr(other, name)
        assert (x is None) == (y is None), name
        if x is not None:
            np.testing.assert_array_equal(x[...], y[...], err_msg=name)
            assert x[...].dtype == y[...].dtype


def packing_of(weight: Quantized) -> Packing:
    return Packing(weight.bits, INPUTS // GROUPS, False, weight.group_index is not None)


@settings(deadline=None, max_examples=40)
@given(weights(), st.sampled_from(["gptq", "gptq_v2"]))
def test_gptq(drawn, form):
    weight, codes, zeros = drawn
    parts = gptq.from_weight("q", weight, form)
    for column in (0, 7, OUTPUTS - 1):
        assert values_of(parts["qweight"][:, column], weight.bits, INPUTS) == list(codes[:, column])
    shift = 1 if form == "gptq" else 0
    for group in range(GROUPS):
        stored = values_of(parts["qzeros"][group], weight.bits, OUTPUTS)
        assert stored == [(int(zero) - shift) % 2**weight.bits for zero in zeros[group]]
    read = gptq.to_weight("q", (OUTPUTS, INPUTS), parts, None, packing_of(weight), Layout(form))
    same(read, weight)


@settings(deadline=None, max_examples=40)
@given(weights())
def test_pack_quantized(drawn):
    weight, codes, zeros = drawn
    parts = compressed_tensors.from_weight(weight)
    assert parts["weight_shape"].tolist() == [OUTPUTS, INPUTS]
    assert ("weight_zero_point" in parts) == bool((zeros != 2 ** (weight.bits - 1)).any())
    for row in (0, 7, OUTPUTS - 1):
        assert values_of(parts["weight_packed"][row], weight.bits, INPUTS) == list(codes[:, row])
    for group in range(GROUPS) if "weight_zero_point" in parts else ():
        words = parts["weight_zero_point"][:, group]
        assert values_of(words, weight.bits, OUTPUTS) == list(zeros[group])
    read = compressed_tensors.to_weight("q", (OUTPUTS, INPUTS), parts, None, packing_of(weight))
    same(read, weight)


@settings(deadline=None, max_examples=15)
@given(weights())
def test_symmetric_weights_store_no_zeros(drawn):
    weight, _, zeros = drawn
    weight.zeros[...] = np.full_like(zeros, 2 ** (weight.bits - 1))
    parts = compressed_tensors.from_weight(weight)
    assert "weight_zero_point" not in parts
    read = compressed_tensors.to_weight("q", (OUTPUTS, INPUTS), parts, None, packing_of(weight))
    same(read, weight)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32))
def test_3_bit_words_of_10_values(seed):
    """compressed-tensors before 0.18; the width of `weight_packed` tells."""
    rng = np.random.default_rng(seed)
    codes, zeros = rng.integers(0, 8, (OUTPUTS, INPUTS)), rng.integers(0, 8, (OUTPUTS, GROUPS))
    rows, columns = ([words_of(row, 3, 10) for row in x] for x in (codes, zeros.T))
    parts = {
        "weight_packed": np.stack(rows),
        "weight_zero_point": np.stack(columns, axis=1),
        "weight_scale": np.ones((OUTPUTS, GROUPS), np.float32),
    }
    assert values_of(rows[3], 3, INPUTS, 10) == list(codes[3])
    read = compressed_tensors.to_weight("q", (OUTPUTS, INPUTS), parts, None, Packing(3, 32, False))
    np.testing.assert_array_equal(read.zeros[...], zeros.T)
    expected = codes - np.repeat(zeros, INPUTS // GROUPS, axis=1)
    np.testing.assert_array_equal(read.dense().T, expected.astype(np.float32))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32))
def test_planes(seed):
    """`gptq_p`: of 32 values of 3 bits, two words of low bits, then one of high bits."""
    rng = np.random.default_rng(seed)
    codes, zeros = rng.integers(0, 8, (INPUTS, OUTPUTS)), rng.integers(0, 8, (GROUPS, OUTPUTS))

    def planes(values) -> np.ndarray:
        blocks = np.asarray(values).reshape(-1, 32)
        return np.concatenate([[*words_of(b % 4, 2), *words_of(b // 4, 1)] for b in blocks])

    parts = {
        "qweight": np.stack([planes(column) for column in codes.T], axis=1),
        "qzeros": np.stack([planes(row) for row in zeros]),
        "scales": np.ones((GROUPS, OUTPUTS), np.float16),
    }
    read = gptq.to_weight(
        "q", (OUTPUTS, INPUTS), parts, None, Packing(3, 32, False), Layout("gptq_p")
    )
    np.testing.assert_array_equal(read.zeros[...], zeros)
    expected = codes - np.repeat(zeros, INPUTS // GROUPS, axis=0)
    np.testing.assert_array_equal(read.dense(), expected.astype(np.float32))


def test_golden_words():
    codes = np.full((32, 32), 8, np.uint8)
    weight = Quantized(
        np.asarray(pack(jnp.asarray(codes), 4)),
        np.ones((1, 32), np.float16),
        np.full((1, 32), 8, np.uint8),
        bits=4,
    )
    for form, word in (("gptq", 0x77777777), ("gptq_v2", 0x88888888)):
        parts = gptq.from_weight("q", weight, form)
        assert (parts["qzeros"].view(np.uint32) == word).all()
        assert (parts["qweight"].view(np.uint32) == 0x88888888).all()
    weight.zeros[...] = np.zeros((1, 32), np.uint8)
    wrapped = gptq.from_weight("q", weight, "gptq")["qzeros"]
    assert (wrapped.view(np.uint32) == 0xFFFFFFFF).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_that_were_shifted_word_by_word(bits):
    """GPTQModel takes 0x1111... from a word, so a zero of 0 borrows from its neighbour."""
    zeros = np.arange(32) % 2**bits
    number = sum(int(zero) << bits * k for k, zero in enumerate(zeros))
    ones = sum(1 << bits * k for k in range(32 // bits))
    words = [((number >> 32 * k) % 2**32 - ones) % 2**32 for k in range(bits)]
    parts = {
        "qweight": np.zeros((bits, 32), np.int32),
        "qzeros": np.array([words], np.uint32).view(np.int32),
        "scales": np.ones((1, 32), np.float16),
    }
    layout = Layout("gptq", zeros_by_word=True)
    read = gptq.to_weight("q", (32, 32), parts, None, Packing(bits, -1, False), layout)
    np.testing.assert_array_equal(read.zeros[...], zeros[None])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from([(4, 8), (3, 20), (1, 4), (6, 12)]))
def test_masks(seed, shape):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=shape[::-1]).astype(np.float32) * (rng.random(shape[::-1]) < 0.5)
    parts = compressed_tensors.to_mask("q", Dense(kernel), "sparse-bitmask")
    for row, mask in enumerate(parts["bitmask"]):
        number = int.from_bytes(mask.tobytes(), "little")
        kept = [column for column in range(shape[1]) if number >> column & 1]
        assert kept == np.flatnonzero(kernel[:, row]).tolist()
        first = parts["row_offsets"][row]
        values = parts["compressed"][first : first + len(kept)]
        np.testing.assert_array_equal(values, kernel[kept, row])
    np.testing.assert_array_equal(compressed_tensors.from_mask("q", parts), kernel.T)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32))
def test_masks_of_2_in_4(seed):
    rng = np.random.default_rng(seed)
    keep = np.argsort(rng.random((5, 3, 4)), axis=-1) < rng.integers(0, 3, (5, 3, 1))
    matrix = (rng.normal(size=keep.shape) * keep).reshape(5, 12).astype(np.float32)
    parts = compressed_tensors.to_mask("q", Dense(matrix.T), "sparse-24-bitmask")
    assert parts["compressed"].shape == (5, 6) and parts["shape"].tolist() == [[5], [12]]
    np.testing.assert_array_equal(compressed_tensors.from_mask("q", parts), matrix)


def test_bad_tensors():
    matrix = np.ones((8, 4), np.float32)
    with pytest.raises(ValueError, match="q_proj is not 2:4 sparse.*--sparsity 2:4"):
        compressed_tensors.to_mask("q_proj", Dense(matrix), "sparse-24-bitmask")
    parts = compressed_tensors.to_mask("q_proj", Dense(matrix), "sparse-bitmask")
    with pytest.raises(ValueError, match=r"q_proj.bitmask .* with 31 values"):
        compressed_tensors.from_mask("q_proj", parts | {"compressed": np.ones(31, np.float32)})
    packing, scales = Packing(4, -1, True), np.ones((32, 1), np.float32)
    packed = {"weight_packed": np.zeros((32, 3), np.int32), "weight_scale": scales}
    with pytest.raises(ValueError, match=r"q_proj.weight_packed has shape \(32, 3\).*\(32, 4\)"):
        compressed_tensors.to_weight("q_proj", (32, 32), packed, None, packing)
    with pytest.raises(ValueError, match="20 inputs of q_proj .* multiples of 32"):
        compressed_tensors.to_weight("q_proj", (32, 20), packed, None, packing)
    fine = np.full((1, 32), 1 + 2**-20, np.float32)
    weight = Quantized(np.zeros((4, 32), np.int32), fine, np.zeros((1, 32), np.uint8), bits=4)
    with pytest.raises(ValueError, match="scales of q_proj .* float16 .* pack-quantized"):
        gptq.from_weight("q_proj", weight, "gptq_v2")

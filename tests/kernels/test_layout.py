"""The kernels' layout: exact in both directions, under jit, for stacked layers and act-order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.kernels.codes import fields_of, unpack_tiles
from idp_jax.kernels.packing import BIT_WIDTHS, pack, unpack
from idp_jax.kernels.quant_matmul.layout import repack, restore
from tests.kernels.problems import checkpoint


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("inputs, groups", [(32, 1), (288, 9), (1056, 33)])
@pytest.mark.parametrize("arrangement", ["rows", "fragments"])
def test_round_trip(bits, inputs, groups, arrangement):
    packed = checkpoint(bits, inputs, 5, groups)
    jitted = jax.jit(repack, static_argnames=("bits", "arrangement"))
    weight = jitted(*packed, bits=bits, arrangement=arrangement)
    tiles = -(-inputs // 256)
    shapes = {"rows": (tiles * 8 * bits, 5), "fragments": (1, tiles * bits, 512)}
    assert weight.words.shape == shapes[arrangement]
    assert weight.group_size == inputs // groups
    *back, index = jax.jit(restore)(weight)
    assert index is None
    for before, after in zip(packed, back, strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_one_shift_gives_consecutive_inputs(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (512, 3)).astype(np.uint8)
    weight = repack(
        pack(jnp.asarray(codes), bits),
        jnp.ones((1, 3), jnp.float16),
        jnp.zeros((1, 3), jnp.uint8),
        bits=bits,
    )
    np.testing.assert_array_equal(unpack_tiles(weight.words, bits), codes)
    ((_, shift, mask, _),) = fields_of(bits)[1]
    rows = 8 if bits == 3 else 8 * bits
    halves = np.asarray(weight.words)[:rows].view(np.uint32) >> shift
    pairs = np.stack([halves & mask, (halves >> 16) & mask], axis=1).reshape(2 * rows, 3)
    np.testing.assert_array_equal(pairs, codes[2 * rows : 4 * rows])


def test_a_thread_finds_its_share_of_an_operand():
    words = jnp.arange(24 * 128, dtype=jnp.int32).reshape(24, 128)
    ones, zeros = jnp.ones((1, 128), jnp.float16), jnp.zeros((1, 128), jnp.uint8)
    rows = dataclasses.replace(repack(words, ones, zeros, bits=3), words=words)
    fragments = repack(*restore(rows)[:3], bits=3, arrangement="fragments")
    # Thread 77 = 32 * 2 + 4 * 3 + 1, third set of rows, second block of outputs.
    share = fragments.words[1, 2, 4 * 77 : 4 * 78]
    outputs, in_set = 64 + 16 * 2 + 3, 16 + 1
    wanted = [words[in_set + r, outputs + o] for r in (0, 4) for o in (0, 8)]
    np.testing.assert_array_equal(share, wanted)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_act_order_and_stacked_layers(dtype):
    packed = checkpoint(3, 96, 4, 3, dtype=dtype, layers=(2,))
    rng = np.random.default_rng(1)
    index = jnp.asarray([rng.permutation(np.arange(96) // 32) for _ in range(2)], jnp.int32)
    weight = repack(*packed, bits=3, group_index=index)
    assert weight.scale_dtype == np.dtype(dtype).name and weight.order.shape == (2, 96)
    *back, restored = restore(weight)
    np.testing.assert_array_equal(index, restored)
    for before, after in zip(packed, back, strict=True):
        np.testing.assert_array_equal(before.view(np.uint8), after.view(np.uint8))
    first = unpack(packed[0][0], 3)[weight.order[0]]
    np.testing.assert_array_equal(unpack_tiles(weight.words[0], 3)[:96], first)


def test_bad_input():
    words, scales, zeros = checkpoint(4, 64, 4, 2)
    with pytest.raises(ValueError, match="scales are float32, the kernels take float16"):
        repack(words, scales.astype(jnp.float32), zeros, bits=4)
    with pytest.raises(ValueError, match="64 inputs do not divide into 3 groups"):
        repack(words, jnp.ones((3, 4), jnp.float16), jnp.ones((3, 4), jnp.uint8), bits=4)

"""The GPU kernel for packed weights: its walk over the matrix interpreted on the CPU, and where
registers hold what, against Mosaic's own description of a tensor core operand.

What a thread does with its words needs a GPU: kernels/bench/check_gpu.py runs it there.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from idp_jax.kernels.quant_matmul import config, mosaic_gpu, reference
from idp_jax.kernels.quant_matmul.layout import repack

from tests.kernels.problems import assert_near, checkpoint, groups_of

params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")


def _weight(bits, inputs, outputs, group_size):
    packed = checkpoint(bits, inputs, outputs, groups_of(inputs, group_size))
    return repack(*packed, bits=bits, arrangement="fragments")


@pytest.mark.parametrize(
    "bits, inputs, outputs, group_size, rows, dtype",
    [
        (4, 512, 128, 128, 1, "bfloat16"),
        (3, 1536, 72, -1, 5, "bfloat16"),
        (2, 320, 64, 64, 3, "float32"),
        (8, 288, 64, 32, 70, "bfloat16"),
    ],
)
def test_interpreted(bits, inputs, outputs, group_size, rows, dtype):
    weight = _weight(bits, inputs, outputs, group_size)
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), dtype)
    multiply = lambda x: mosaic_gpu.quant_matmul(x, weight, interpret=params.InterpretGPUParams())
    y, pull_back = jax.vjp(multiply, x)
    (gradient,) = pull_back(y)
    exact = (reference.quant_matmul(x, weight), reference.gradient(y, weight))
    assert_near((y, gradient), exact, dtype)


def test_registers_are_those_of_a_tensor_core_operand():
    layouts = pytest.importorskip("jax.experimental.mosaic.gpu.fragmented_array")
    layout, inputs = layouts.WGMMA_LAYOUT, 32
    for output, place in np.ndindex(64, inputs):
        index = layout.tiling.tile_indices((output, place))
        warp = index[layout.warp_dims[0]]
        lane = 4 * index[layout.lane_dims[0]] + index[layout.lane_dims[1]]
        # A thread's share of 16 inputs is one vector of four words, as `to_fragments` orders it.
        element = 2 * (place % 16 // 8) + output % 16 // 8
        assert 32 * warp + lane == 32 * (output // 16) + 4 * (output % 8) + place % 8 // 2
        assert index[layout.vector_dim] == place % 2
        registers = layout.registers_shape((64, inputs))
        inner = tuple(layout.lane_dims) + tuple(layout.warp_dims) + (layout.vector_dim,)
        kept = list(index)
        for dimension in inner:
            kept[dimension] = 0
        flat = np.ravel_multi_index(kept, registers)
        assert flat == 4 * (place // 16) + element


def test_what_it_cannot_serve_is_named():
    weight = _weight(4, 64, 64, -1)
    rows = repack(*checkpoint(4, 64, 64, 1), bits=4)
    x = jnp.ones((1, 64), jnp.bfloat16)
    assert mosaic_gpu.unsupported(x, weight) is None
    assert "prepare the weight for mosaic_gpu" in str(mosaic_gpu.unsupported(x, rows))
    assert "x is float16" in str(mosaic_gpu.unsupported(x.astype(jnp.float16), weight))
    assert "no multiples of 8" in str(mosaic_gpu.unsupported(x, _weight(4, 64, 60, -1)))
    with pytest.raises(ValueError, match="group size 96"):
        mosaic_gpu.quant_matmul(jnp.ones((1, 192), jnp.bfloat16), _weight(4, 192, 64, 96))


def test_sizes_fill_the_machine_and_fit():
    sizes = functools.partial(config.gpu_sizes, "unknown")
    assert sizes(3, 4096, 4096, 1) == (8, 4, 8)
    assert sizes(3, 4096, 11008, 1).shares == 1
    assert sizes(4, 512, 4096, 1).shares == 1
    for bits, rows in itertools.product((2, 3, 4, 8), (8, 64, 200)):
        block_rows, _, stages = sizes(bits, 4096, 4096, rows)
        assert 2 <= stages <= 8
        assert stages * (512 * block_rows + 2048 * bits + 2048) <= 110 * 2**10


def test_the_table_comes_first(monkeypatch):
    name = config.key("gpu", 3, 4096, 4096, 1)
    monkeypatch.setitem(config.tuned(), "some GPU", {name: [16, 2, 3]})
    assert config.gpu_sizes("some GPU", 3, 4096, 4096, 1) == (16, 2, 3)
    name = config.key("prefill", 3, 4096, 4096, 512)
    monkeypatch.setitem(config.tuned(), "some TPU", {name: [128, 256, 512]})
    assert config.prefill_blocks("some TPU", 3, 4096, 4096, 512, 2) == (128, 256, 512)

"""The GPU kernel for 2:4 weights on the CPU: its walk over the matrix interpreted, and every
thread's registers, made by the kernel's own arithmetic from the words that the thread reads,
against the dense matrix at the places that Mosaic's description of a tensor core operand names.

What Mosaic makes of that arithmetic needs a GPU: kernels/bench/check_gpu.py runs it there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from idp_jax.kernels.sparse24_matmul import layout, mosaic_gpu, reference
from idp_jax.kernels.sparse24_matmul.api import from_dense, sparse24_matmul

from tests.kernels.problems import assert_near, sparse_matrix

params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")


@pytest.mark.parametrize(
    "inputs, outputs, rows, dtype",
    [(512, 128, 1, "bfloat16"), (1200, 64, 5, "bfloat16"), (320, 64, 3, "float32")],
)
def test_interpreted(inputs, outputs, rows, dtype):
    weight = from_dense(sparse_matrix(inputs, outputs), backend="mosaic_gpu")
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), dtype)
    interpret = params.InterpretGPUParams()
    multiply = lambda x: mosaic_gpu.sparse24_matmul(x, weight, interpret=interpret)
    y, pull_back = jax.vjp(multiply, x)
    (gradient,) = pull_back(y)
    exact = (reference.sparse24_matmul(x, weight), reference.gradient(y, weight))
    assert_near((y, gradient), exact, dtype)


def _registers_of_threads(weight):
    """What the kernel computes of one tile: words [128 threads, 64 registers]."""
    positions = weight.positions.reshape(-1, 2, 256)[0]
    values = weight.values.reshape(-1, 2, 256)
    halves = [h for f in range(8) for h in mosaic_gpu.expand(values[f], positions, f)]
    # In `words_layout` thread t has one vector, words 4 t to 4 t + 3.
    halves = np.asarray(jnp.stack(halves)).reshape(16, 128, 4)
    return [mosaic_gpu.registers(*halves[:, thread, None]) for thread in range(128)]


def test_every_register_holds_its_two_weights(monkeypatch):
    layouts = pytest.importorskip("jax.experimental.mosaic.gpu.fragmented_array")
    monkeypatch.setattr(mosaic_gpu.gpu_blocks, "element", lambda vector, position: vector[position])
    matrix = sparse_matrix(256, 64)
    weight = from_dense(matrix, backend="mosaic_gpu")
    words = np.array(_registers_of_threads(weight), np.int32)
    found = np.asarray(jax.lax.bitcast_convert_type(jnp.asarray(words), jnp.bfloat16), np.float32)
    operand = layouts.WGMMA_LAYOUT
    inner = (*operand.lane_dims, *operand.warp_dims, operand.vector_dim)
    columns = mosaic_gpu.reordered(jnp.arange(256, dtype=jnp.float32)[None])[0].astype(int)
    expected = np.asarray(matrix, np.float32).T[:, columns]
    for output, column in np.ndindex(64, 256):
        index = list(operand.tiling.tile_indices((output, column)))
        warp = index[operand.warp_dims[0]]
        thread = 32 * warp + 4 * index[operand.lane_dims[0]] + index[operand.lane_dims[1]]
        half = index[operand.vector_dim]
        for dimension in inner:
            index[dimension] = 0
        register = np.ravel_multi_index(index, operand.registers_shape((64, 256)))
        assert found[thread, register, half] == expected[output, column]


@pytest.mark.parametrize("inputs", [8, 256, 300])
def test_round_trip(inputs):
    matrix = sparse_matrix(inputs, 128)
    weight = jax.jit(lambda m: from_dense(m, backend="mosaic_gpu"))(matrix)
    np.testing.assert_array_equal(matrix, jax.jit(layout.to_dense)(weight))
    tiles = -(-inputs // 256)
    assert weight.outputs == 128
    assert weight.values.shape == (2, tiles * 8, 512)
    assert weight.positions.shape == (2, tiles, 512)


def test_xla_multiplies_fragments():
    matrix = sparse_matrix(64, 64)
    x = jnp.ones((2, 64), jnp.bfloat16)
    rows, fragments = (from_dense(matrix, backend=name) for name in ("xla", "mosaic_gpu"))
    np.testing.assert_array_equal(
        sparse24_matmul(x, rows, backend="xla"), sparse24_matmul(x, fragments, backend="xla")
    )


def test_what_it_cannot_serve_is_named():
    weight = from_dense(sparse_matrix(64, 64), backend="mosaic_gpu")
    x = jnp.ones((1, 64), jnp.bfloat16)
    assert mosaic_gpu.unsupported(x, weight) is None
    assert "x is float16" in str(mosaic_gpu.unsupported(x.astype(jnp.float16), weight))
    rows = from_dense(sparse_matrix(64, 64), backend="xla")
    assert "compress it for mosaic_gpu" in str(mosaic_gpu.unsupported(x, rows))
    codes = layout.from_codes(
        jnp.zeros((8, 64), jnp.int32),
        jnp.ones((1, 64), jnp.float16),
        jnp.zeros((1, 64), jnp.uint8),
        bits=4,
    )
    assert "values of 4 bits" in str(mosaic_gpu.unsupported(x, codes))
    with pytest.raises(ValueError, match="72 inputs are no multiple of 16"):
        mosaic_gpu.sparse24_matmul(
            jnp.ones((1, 72), jnp.bfloat16), from_dense(sparse_matrix(72, 64), backend="mosaic_gpu")
        )
    with pytest.raises(ValueError, match="cannot serve: it needs a TPU"):
        sparse24_matmul(x, weight, backend="pallas_tpu")
    with pytest.raises(ValueError, match="cannot serve: the weight is arranged as fragments"):
        sparse24_matmul(x, weight, backend="pallas_tpu", interpret=True)
    with pytest.raises(ValueError, match="5 outputs are no multiple of 64"):
        from_dense(sparse_matrix(8, 5), backend="mosaic_gpu")
    with pytest.raises(ValueError, match="arrangement must be rows or fragments, not columns"):
        layout.from_dense(sparse_matrix(8, 5), arrangement="columns")

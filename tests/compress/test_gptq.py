"""GPTQ against a plain float64 loop over columns, and what must hold of any result."""

import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.compress.gptq import gptq
from idp_jax.compress.grid import dequantize_matrix, find_grid
from idp_jax.compress.hessian import relative_output_error
from idp_jax.compress.rtn import rtn


def _grid(columns: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    grid = find_grid(jnp.asarray(columns, jnp.float32), bits, symmetric)
    return tuple(np.asarray(a, np.float64) for a in grid)


def _column_loop(W, U, bits, group_size, symmetric):
    """The algorithm without blocks: after each column all later ones are updated at once."""
    W = W.astype(np.float64).copy()
    codes = np.zeros(W.shape)
    scale, zero = _grid(W, bits, symmetric)
    for i in range(W.shape[1]):
        if group_size != -1 and i % group_size == 0:
            scale, zero = _grid(W[:, i : i + group_size], bits, symmetric)
        codes[:, i] = np.clip(np.round(W[:, i] / scale) + zero, 0, 2**bits - 1)
        error = (W[:, i] - scale * (codes[:, i] - zero)) / U[i, i]
        W[:, i:] -= np.outer(error, U[i, i:])
    return codes


@pytest.mark.parametrize(
    ("inputs", "group_size", "block_size", "bits", "symmetric"),
    [
        (96, -1, 32, 3, False),
        (128, -1, 128, 4, True),
        (160, -1, 64, 3, False),  # the last block is partial
        (96, -1, 500, 2, False),
        (128, 32, 32, 3, False),
        (160, 32, 128, 4, False),  # groups within blocks, the last block partial
        (128, 64, 32, 3, True),  # groups wider than the block
        (96, 24, 32, 8, False),  # groups that do not divide the block
        (96, 96, 128, 3, True),
    ],
)
def test_equals_the_column_loop(
    make_layer, exact_hessian, exact_factor, inputs, group_size, block_size, bits, symmetric
):
    weights, x = make_layer(24, inputs)
    H = exact_hessian(x)
    matrix, restored, diagnostics = gptq(
        jnp.asarray(weights),
        jnp.asarray(H),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        block_size=block_size,
    )
    expected = _column_loop(weights, exact_factor(H, 0.01), bits, group_size, symmetric)
    differing = np.sum(np.any(np.asarray(matrix.codes) != expected, axis=1))
    # A weight halfway between two levels may fall to either side in float32, and its row follows.
    assert differing <= 1
    np.testing.assert_allclose(restored, dequantize_matrix(matrix), rtol=1e-6, atol=1e-6)
    groups = 1 if group_size == -1 else inputs // group_size
    assert matrix.scales.shape == matrix.zeros.shape == (24, groups)
    assert matrix.codes.dtype == matrix.zeros.dtype == jnp.uint8
    assert int(diagnostics.retries) == int(diagnostics.dead_columns) == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_better_than_rounding(make_layer, exact_hessian, bits, group_size):
    weights, x = make_layer(24, 128, seed=bits)
    weights, H = jnp.asarray(weights), jnp.asarray(exact_hessian(x))
    matrix, restored, diagnostics = gptq(weights, H, bits=bits, group_size=group_size)
    rounded = dequantize_matrix(rtn(weights, bits=bits, group_size=group_size))
    assert int(matrix.codes.max()) < 2**bits
    error = float(relative_output_error(weights, restored, H))
    assert error < float(relative_output_error(weights, rounded, H))
    np.testing.assert_allclose(diagnostics.relative_error, error, rtol=1e-4)


def test_uncorrelated_inputs_give_plain_rounding(make_layer):
    weights = jnp.asarray(make_layer(24, 96)[0])
    matrix, _, _ = gptq(weights, jnp.eye(96, dtype=jnp.float32), bits=3, group_size=32)
    for ours, expected in zip(matrix, rtn(weights, bits=3, group_size=32), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_dead_columns_become_zero(make_layer, exact_hessian):
    weights, x = make_layer(24, 96)
    x[:, [3, 50]] = 0
    weights[:, 3] = 100  # must not widen the grid of the row
    H = jnp.asarray(exact_hessian(x))
    matrix, restored, diagnostics = gptq(jnp.asarray(weights), H, bits=4)
    assert int(diagnostics.dead_columns) == 2
    np.testing.assert_array_equal(restored[:, [3, 50]], 0)
    assert float(matrix.scales.max()) < 1


def test_singular_hessian_is_damped(make_layer):
    weights, x = make_layer(8, 64)
    few = x[:5].astype(np.float64)
    H = jnp.asarray(few.T @ few, jnp.float32)
    _, restored, diagnostics = gptq(jnp.asarray(weights), H, bits=4, damping=0.0)
    assert float(diagnostics.damping_used) > 0
    assert np.all(np.isfinite(restored))


def test_bad_input():
    weights, H = jnp.ones((4, 96), jnp.float32), jnp.eye(96, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"group_size 64 does not divide 96 inputs.*divisor"):
        gptq(weights, H, bits=4, group_size=64)
    with pytest.raises(ValueError, match=r"bits must be one of .* not 5"):
        gptq(weights, H, bits=5)
    with pytest.raises(ValueError, match="block_size must be at least 1, not 0"):
        gptq(weights, H, bits=4, block_size=0)

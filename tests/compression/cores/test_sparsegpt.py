"""SparseGPT against a plain float64 loop over columns, and what must hold of any result."""

import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.compression.cores.hessian import relative_output_error
from idp_jax.compression.cores.magnitude import magnitude
from idp_jax.compression.cores.sparsegpt import sparsegpt


def _smallest(scores: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(scores.ravel(), kind="stable")[:count]] = True
    return mask.reshape(scores.shape)


def _column_loop(W, U, sparsity, pattern, block_size):
    W = W.astype(np.float64).copy()
    inputs = W.shape[1]
    mask = np.zeros(W.shape, bool)
    for i in range(inputs):
        if pattern is None and i % block_size == 0:
            own = slice(i, min(i + block_size, inputs))
            scores = (W[:, own] / np.diag(U)[own]) ** 2
            mask[:, own] = _smallest(scores.T, int(sparsity * scores.size)).T
        elif pattern is not None and i % pattern[1] == 0:
            own = slice(i, i + pattern[1])
            scores = (W[:, own] / np.diag(U)[own]) ** 2
            mask[:, own] = np.array([_smallest(row, pattern[0]) for row in scores])
        error = np.where(mask[:, i], W[:, i], 0) / U[i, i]
        W[:, i:] -= np.outer(error, U[i, i:])
    return np.where(mask, 0, W), mask


@pytest.mark.parametrize(
    ("inputs", "block_size", "sparsity", "pattern"),
    [
        (96, 32, 0.5, None),
        (128, 128, 0.3, None),
        (160, 64, 0.5, None),  # the last block is partial
        (96, 500, 0.9, None),
        (96, 32, None, (2, 4)),
        (160, 64, None, (4, 8)),
        (96, 32, None, (1, 3)),  # runs that do not divide the block
        (96, 4, None, (4, 8)),  # runs wider than the block
    ],
)
def test_equals_the_column_loop(
    make_layer, exact_hessian, exact_factor, inputs, block_size, sparsity, pattern
):
    weights, x = make_layer(24, inputs)
    H = exact_hessian(x)
    pruned, mask, diagnostics = sparsegpt(
        jnp.asarray(weights),
        jnp.asarray(H),
        sparsity=sparsity,
        pattern=pattern,
        block_size=block_size,
    )
    U = exact_factor(H, 0.01)
    expected, expected_mask = _column_loop(weights, U, sparsity, pattern, block_size)
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_allclose(pruned, expected, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(pruned) == 0, mask)
    assert int(diagnostics.retries) == int(diagnostics.dead_columns) == 0


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"sparsity": 0.9}, {"pattern": (2, 4)}])
def test_better_than_magnitude(make_layer, exact_hessian, target):
    weights, x = make_layer(24, 160)
    weights, H = jnp.asarray(weights), jnp.asarray(exact_hessian(x))
    pruned, mask, diagnostics = sparsegpt(weights, H, **target)
    error = float(relative_output_error(weights, pruned, H))
    by_size, other_mask = magnitude(weights, **target)
    assert error < float(relative_output_error(weights, by_size, H))
    np.testing.assert_allclose(diagnostics.relative_error, error, rtol=1e-4)
    # Counts are rounded down per block here, once per layer there; 160 inputs are two blocks.
    assert 0 <= int(other_mask.sum()) - int(mask.sum()) < 2


def test_zero_sparsity_changes_nothing(make_layer, exact_hessian):
    weights, x = make_layer(24, 160)
    x[:, 5] = 0
    pruned, mask, diagnostics = sparsegpt(
        jnp.asarray(weights), jnp.asarray(exact_hessian(x)), sparsity=0.0
    )
    np.testing.assert_array_equal(pruned, weights)
    assert not bool(mask.any())
    assert float(diagnostics.relative_error) == 0


def test_dead_columns_go_first(make_layer, exact_hessian):
    weights, x = make_layer(24, 96)
    dead = [3, 40, 95]
    x[:, dead] = 0
    H = jnp.asarray(exact_hessian(x))
    pruned, mask, diagnostics = sparsegpt(jnp.asarray(weights), H, sparsity=0.5, block_size=32)
    assert int(diagnostics.dead_columns) == 3
    assert bool(mask[:, jnp.array(dead)].all())
    np.testing.assert_array_equal(np.asarray(pruned) == 0, mask)
    assert int(mask.sum()) == 24 * 96 // 2


def test_bad_input():
    weights, H = jnp.ones((4, 96), jnp.float32), jnp.eye(96, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"sparsity 1.0 is outside"):
        sparsegpt(weights, H, sparsity=1.0)
    with pytest.raises(ValueError, match="either sparsity or pattern"):
        sparsegpt(weights, H)
    with pytest.raises(ValueError, match="block_size must be at least 1, not -1"):
        sparsegpt(weights, H, sparsity=0.5, block_size=-1)

"""Wanda against its definition, row by row."""

import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.compression.cores.wanda import wanda


def _scores(weights: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    return np.abs(weights) * np.sqrt(np.diag(hessian))


@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.5, 0.9])
def test_prunes_the_smallest_of_every_row(make_layer, exact_hessian, sparsity):
    weights, x = make_layer(24, 96)
    x *= np.random.default_rng(1).uniform(0.1, 3, 96).astype(np.float32)
    hessian = exact_hessian(x)
    pruned, mask = wanda(jnp.asarray(weights), jnp.asarray(hessian), sparsity=sparsity)
    expected = np.zeros(weights.shape, bool)
    for row, own in zip(expected, _scores(weights, hessian), strict=True):
        row[np.argsort(own, kind="stable")[: int(sparsity * 96)]] = True
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(pruned, np.where(expected, 0, weights))


@pytest.mark.parametrize("pattern", [(2, 4), (1, 3)])
def test_prunes_the_smallest_of_every_run(make_layer, exact_hessian, pattern):
    weights, x = make_layer(24, 96)
    hessian = exact_hessian(x)
    pruned, mask = wanda(jnp.asarray(weights), jnp.asarray(hessian), pattern=pattern)
    runs = _scores(weights, hessian).reshape(-1, pattern[1])
    ranks = np.argsort(np.argsort(runs, axis=1, kind="stable"), axis=1)
    expected = (ranks < pattern[0]).reshape(weights.shape)
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(pruned, np.where(expected, 0, weights))


def test_inputs_that_are_never_seen_go_first(make_layer, exact_hessian):
    weights, x = make_layer(8, 32)
    x[:, [3, 20]] = 0
    _, mask = wanda(jnp.asarray(weights), jnp.asarray(exact_hessian(x)), sparsity=0.25)
    assert bool(mask[:, jnp.array([3, 20])].all())
    assert (mask.sum(1) == 8).all()


def test_bad_input():
    weights, hessian = jnp.ones((4, 96), jnp.float32), jnp.eye(96, dtype=jnp.float32)
    with pytest.raises(ValueError, match="either sparsity or pattern"):
        wanda(weights, hessian)
    with pytest.raises(ValueError, match="96 inputs do not divide into runs of 7"):
        wanda(weights, hessian, pattern=(2, 7))

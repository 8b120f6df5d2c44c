"""Magnitude pruning: exact counts, the smallest weights, nothing else touched."""

import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.compression.cores.magnitude import magnitude


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.333, 0.5, 0.95])
def test_prunes_the_smallest_of_the_layer(make_layer, sparsity):
    weights, _ = make_layer(24, 96)
    pruned, mask = (np.asarray(a) for a in magnitude(jnp.asarray(weights), sparsity=sparsity))
    assert mask.sum() == int(sparsity * weights.size)
    np.testing.assert_array_equal(pruned == 0, mask)
    np.testing.assert_array_equal(pruned[~mask], weights[~mask])
    if mask.any():
        assert np.abs(weights[mask]).max() <= np.abs(weights[~mask]).min()


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 3)])
def test_prunes_the_smallest_of_every_run(make_layer, pattern):
    weights, _ = make_layer(24, 96)
    pruned, mask = (np.asarray(a) for a in magnitude(jnp.asarray(weights), pattern=pattern))
    zeros, run = pattern
    np.testing.assert_array_equal(pruned, np.where(mask, 0, weights))
    size, chosen = np.abs(weights).reshape(-1, run), mask.reshape(-1, run)
    np.testing.assert_array_equal(chosen.sum(axis=1), zeros)
    kept = np.where(chosen, np.inf, size).min(axis=1)
    assert np.all(np.where(chosen, size, 0).max(axis=1) <= kept)


def test_equal_weights_keep_the_count():
    _, mask = magnitude(jnp.ones((6, 8), jnp.float32), sparsity=0.5)
    assert int(mask.sum()) == 24
    _, mask = magnitude(jnp.zeros((6, 8), jnp.float32), pattern=(2, 4))
    assert int(mask.sum()) == 24


def test_bad_input():
    weights = jnp.ones((4, 96), jnp.float32)
    with pytest.raises(ValueError, match=r"sparsity 1.5 is outside"):
        magnitude(weights, sparsity=1.5)
    with pytest.raises(ValueError, match="96 inputs do not divide into runs of 7"):
        magnitude(weights, pattern=(2, 7))

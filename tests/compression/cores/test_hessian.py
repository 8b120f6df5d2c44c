"""Hessians and their factors against float64."""

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.compression.cores.hessian import (
    accumulate,
    empty_state,
    inverse_factor,
    relative_output_error,
)


def test_batches_of_any_size_add_up(make_layer, exact_hessian):
    _, x = make_layer(1, 64)
    state = empty_state(64)
    add = jax.jit(accumulate)
    for batch in (x[:100], x[100:101], x[101:]):
        state = add(state, jnp.asarray(batch))
    assert float(state.count) == len(x)
    exact = exact_hessian(x)
    np.testing.assert_allclose(state.hessian, exact, rtol=1e-4, atol=1e-5 * exact.max())


def test_empty_batch_changes_nothing(make_layer):
    _, x = make_layer(1, 32)
    empty = jnp.zeros((0, 32), jnp.float32)
    assert float(jnp.sum(jnp.abs(accumulate(empty_state(32), empty).hessian))) == 0
    state = accumulate(empty_state(32), jnp.asarray(x))
    np.testing.assert_array_equal(accumulate(state, empty).hessian, state.hessian)


def test_factor_is_the_papers(make_layer, exact_hessian, exact_factor):
    _, x = make_layer(1, 96)
    H = exact_hessian(x)
    result = inverse_factor(jnp.asarray(H), 0.01)
    U = exact_factor(H, 0.01)
    np.testing.assert_allclose(result.factor, U, atol=1e-4 * np.abs(U).max())
    np.testing.assert_array_equal(np.tril(result.factor, -1), 0)
    assert int(result.retries) == 0
    assert float(result.damping_used) == np.float32(0.01)


def test_dead_columns_are_decoupled(make_layer, exact_hessian):
    _, x = make_layer(1, 48)
    x[:, [0, 17, 47]] = 0
    H = exact_hessian(x)
    result = inverse_factor(jnp.asarray(H), 0.01)
    np.testing.assert_array_equal(np.flatnonzero(result.dead), [0, 17, 47])
    U = np.asarray(result.factor)
    for k in (0, 17, 47):
        assert np.all(np.delete(U[k], k) == 0)
        assert np.all(np.delete(U[:, k], k) == 0)
    live = ~np.asarray(result.dead)
    alone = inverse_factor(jnp.asarray(H[np.ix_(live, live)]), 0.01)
    np.testing.assert_allclose(U[np.ix_(live, live)], alone.factor, atol=1e-5)


def test_damping_grows_until_positive_definite():
    # Eigenvalues 1 and -0.15: 0.01 and 0.1 of the mean diagonal are too little, 1.0 is enough.
    H = np.eye(64)
    H[0, 1] = H[1, 0] = 1.15
    result = inverse_factor(jnp.asarray(H, jnp.float32), 0.01)
    assert int(result.retries) == 2
    np.testing.assert_allclose(float(result.damping_used), 1.0, rtol=1e-6)
    assert np.all(np.isfinite(result.factor))
    from_zero = inverse_factor(jnp.asarray(H, jnp.float32), 0.0)
    assert np.isfinite(float(from_zero.damping_used))
    assert int(from_zero.retries) > 1


def test_hopeless_hessian_is_reported():
    result = inverse_factor(jnp.full((8, 8), jnp.nan, jnp.float32), 0.01)
    assert np.isnan(float(result.damping_used))
    assert np.all(np.isnan(result.factor))


def test_relative_output_error_is_measured_on_the_outputs(make_layer, exact_hessian):
    weights, x = make_layer(24, 96)
    compressed = weights + 0.1 * np.random.default_rng(3).normal(size=weights.shape)
    compressed = compressed.astype(np.float32)
    H = jnp.asarray(exact_hessian(x))
    output = x.astype(np.float64) @ weights.T
    expected = np.sum((output - x.astype(np.float64) @ compressed.T) ** 2) / np.sum(output**2)
    measured = relative_output_error(jnp.asarray(weights), jnp.asarray(compressed), H)
    np.testing.assert_allclose(measured, expected, rtol=1e-4)
    assert float(relative_output_error(jnp.asarray(weights), jnp.asarray(weights), H)) == 0
    zeros = jnp.zeros((2, 96), jnp.float32)
    assert float(relative_output_error(zeros, zeros, H)) == 0

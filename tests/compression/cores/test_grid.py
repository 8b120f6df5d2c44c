"""Grids against the public quantizer's conventions, written out row by row."""

import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.compression.cores.grid import GRID_BITS, dequantize, find_grid, find_grids, quantize


def _reference(row: np.ndarray, bits: int, symmetric: bool) -> tuple[float, float]:
    low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
    if symmetric:
        high = max(abs(low), high)
        low = -high
    if low == high == 0.0:
        low, high = -1.0, 1.0
    levels = 2**bits - 1
    scale = float(np.float16((high - low) / levels))
    return scale, 2 ** (bits - 1) if symmetric else float(np.round(-low / scale))


@pytest.mark.parametrize("bits", GRID_BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_conventions(bits, symmetric):
    rng = np.random.default_rng(bits)
    rows = rng.normal(size=(20, 33)).astype(np.float32)
    rows[0] = 0
    rows[1] = np.abs(rows[1])
    rows[2] = -np.abs(rows[2])
    rows[3] *= 100
    scale, zero = find_grid(jnp.asarray(rows), bits, symmetric)
    expected = np.array([_reference(row, bits, symmetric) for row in rows])
    np.testing.assert_array_equal(scale, expected[:, 0])
    np.testing.assert_array_equal(zero, expected[:, 1])
    np.testing.assert_array_equal(scale, np.asarray(scale, np.float16).astype(np.float32))


@pytest.mark.parametrize("bits", GRID_BITS)
def test_rounding_error_is_half_a_step(bits):
    rows = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    scale, zero = (a[:, None] for a in find_grid(jnp.asarray(rows), bits, False))
    codes = quantize(jnp.asarray(rows), scale, zero, bits)
    assert float(codes.min()) >= 0
    assert float(codes.max()) <= 2**bits - 1
    np.testing.assert_array_equal(codes, np.round(codes))
    error = np.abs(dequantize(codes, scale, zero) - rows)
    # Half a step, and another half at the ends of the range where the zero was rounded.
    assert np.all(error <= 1.01 * np.asarray(scale))
    assert np.median(error / np.asarray(scale)) < 0.3


def test_scale_survives_float16():
    tiny = np.array([[1e-12, -1e-12], [6e4, -6e4], [1e9, -1e9]], np.float32)
    for symmetric in (False, True):
        scale, zero = find_grid(jnp.asarray(tiny), 2, symmetric)
        stored = np.asarray(scale, np.float16)
        assert np.all(stored > 0)
        assert np.all(np.isfinite(stored))
        assert np.all((np.asarray(zero) >= 0) & (np.asarray(zero) <= 3))


def test_bad_bits():
    with pytest.raises(ValueError, match=r"bits must be one of .* not 5"):
        find_grid(jnp.ones((1, 4), jnp.float32), 5, False)


def _searched(rows: np.ndarray, bits: int, symmetric: bool, importance: np.ndarray):
    """The least cost of every row over all widths, and over min-max alone, in float64."""
    low, high = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    costs = []
    for step in range(32):
        width = 1 - step * 0.8 / 32
        scale = ((high - low) * width / (2**bits - 1)).astype(np.float16).astype(np.float64)
        zero = (
            np.round(-low * width / scale)
            if not symmetric
            else np.full(len(rows), 2.0 ** (bits - 1))
        )
        costs.append(_cost(rows, scale, zero, bits, importance))
    return np.min(costs, axis=0), costs[0]


def _cost(rows, scale, zero, bits, importance) -> np.ndarray:
    scale, zero = (np.asarray(a, np.float64)[:, None] for a in (scale, zero))
    codes = np.clip(np.round(rows / scale) + zero, 0, 2**bits - 1)
    return (np.square(rows - scale * (codes - zero)) * importance).sum(1)


@pytest.mark.parametrize("bits", GRID_BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_finds_the_least_cost(bits, symmetric):
    rng = np.random.default_rng(bits)
    rows = rng.standard_t(4, size=(30, 48)).astype(np.float32)
    importance = rng.uniform(0.01, 4, 48).astype(np.float32) ** 2
    scale, zero = find_grid(jnp.asarray(rows), bits, symmetric, jnp.asarray(importance))
    found = _cost(rows, scale, zero, bits, importance)
    best, plain = _searched(rows.astype(np.float64), bits, symmetric, importance)
    # Costs are compared in float32, and a weight halfway between two levels may fall either way.
    np.testing.assert_allclose(found, best, rtol=1e-4)
    assert (found <= plain * (1 + 1e-5)).all()
    if bits < 4:
        assert found.sum() < 0.9 * plain.sum()
    np.testing.assert_array_equal(scale, np.asarray(scale, np.float16).astype(np.float32))


@pytest.mark.parametrize("search", [False, True])
def test_every_group_has_its_own_grid(search):
    rng = np.random.default_rng(5)
    columns = jnp.asarray(rng.normal(size=(3, 16, 20)), jnp.float32)
    importance = jnp.asarray(rng.uniform(size=(3, 16)), jnp.float32) if search else None
    scales, zeros = find_grids(columns, 3, False, importance)
    assert scales.shape == zeros.shape == (3, 20)
    for g in range(3):
        own = find_grid(columns[g].T, 3, False, importance[g] if search else None)
        np.testing.assert_array_equal(scales[g], own[0])
        np.testing.assert_array_equal(zeros[g], own[1])

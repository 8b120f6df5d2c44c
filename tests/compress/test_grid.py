"""Grids against the public quantizer's conventions, written out row by row."""

import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.compress.grid import GRID_BITS, dequantize, find_grid, quantize


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

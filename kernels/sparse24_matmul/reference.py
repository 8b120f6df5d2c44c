"""The product with a 2:4 sparse weight in float64 NumPy: what every other path is tested against.

Invariant: nothing is rounded but the result. Arrays must be concrete, so it cannot be jitted.
"""

import numpy as np

from ..packing import unpack
from ..stack import slice_layer
from .layout import SparseWeight, to_codes, to_dense


def dense(weight: SparseWeight) -> np.ndarray:
    """The matrix float64 [I, O]."""
    weight = slice_layer(weight)
    if weight.bits is None:
        return np.asarray(to_dense(weight), np.float64)
    words, scales, zeros = to_codes(weight)
    codes = np.asarray(unpack(words, weight.bits), np.float64)
    index = np.arange(weight.inputs) // weight.group_size
    return np.asarray(scales, np.float64)[index] * (codes - np.asarray(zeros, np.float64)[index])


def sparse24_matmul(x, weight: SparseWeight) -> np.ndarray:
    """x [..., I] times the weight: float64 [..., O]."""
    return np.asarray(x, np.float64) @ dense(weight)


def gradient(upstream, weight: SparseWeight) -> np.ndarray:
    """The gradient [..., I] with respect to x, given that of the product [..., O]."""
    return np.asarray(upstream, np.float64) @ dense(weight).T

"""The product with a packed weight in float64 NumPy: what every other path is tested against.

Invariant: nothing is rounded but the result. Arrays must be concrete, so it cannot be jitted.
"""

import numpy as np

from ..packing import unpack
from ..stack import slice_layer
from .layout import KernelWeight, restore


def dense(weight: KernelWeight) -> np.ndarray:
    """The matrix float64 [I, O] that a packed weight stands for."""
    words, scales, zeros, group_index = restore(slice_layer(weight))
    codes = np.asarray(unpack(words, weight.bits), np.float64)
    if group_index is None:
        index = np.arange(weight.inputs) // weight.group_size
    else:
        index = np.asarray(group_index)
    scales, zeros = np.asarray(scales, np.float64), np.asarray(zeros, np.float64)
    return scales[index] * (codes - zeros[index])


def quant_matmul(x, weight: KernelWeight) -> np.ndarray:
    """x [..., I] times the weight: float64 [..., O]."""
    return np.asarray(x, np.float64) @ dense(weight)


def gradient(upstream, weight: KernelWeight) -> np.ndarray:
    """The gradient [..., I] with respect to x, given that of the product [..., O]."""
    return np.asarray(upstream, np.float64) @ dense(weight).T

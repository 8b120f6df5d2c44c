"""There is no GPU kernel for 2:4 sparse weights yet; this file says so to whoever asks for it.

Invariant: `unsupported` always gives a reason, so the XLA path serves.
"""

import jax

from .layout import SparseWeight


def unsupported(x: jax.Array, weight: SparseWeight) -> str:
    """Why this backend cannot serve."""
    del x, weight
    return "no Mosaic GPU kernel multiplies by 2:4 sparse weights yet"

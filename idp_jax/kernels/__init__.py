"""Makes the repository's `kernels/` folder importable as `idp_jax.kernels`.

The top-level folder must not be a package of its own: a package named `kernels` on PyPI is probed
by transformers, and two packages of that name break every Hugging Face model load. A wheel carries
the folder here; a checkout finds it two levels up, and the type checker in `typings/`.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "kernels"
if _checkout.is_dir():
    __path__.append(str(_checkout))

"""Measuring models: harness tasks, perplexity, latency, and how sure we may be of a difference.

What needs the harness is imported on first use, and what needs jax by its own module's name
(`evaluation.perplexity`, `evaluation.latency`): a comparison of two files waits for neither.
"""

from importlib import import_module

from idp_jax.evaluation.comparison import compare
from idp_jax.evaluation.results import Comparison, Results, VariantResult, read, write
from idp_jax.evaluation.statistics import Estimate

_ON_FIRST_USE = {
    "HarnessLM": "idp_jax.evaluation.harness",
    "evaluate": "idp_jax.evaluation.harness_tasks",
}
__all__ = [
    "Comparison",
    "Estimate",
    "Results",
    "VariantResult",
    "compare",
    "read",
    "write",
    *_ON_FIRST_USE,
]


def __getattr__(name: str):
    """Imports the names that need the harness."""
    if name in _ON_FIRST_USE:
        return getattr(import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module 'idp_jax.evaluation' has no attribute {name!r}")

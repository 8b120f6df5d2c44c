"""Experiments: variants of a model are made, measured and compared, as one configuration says.

`stages` has one function for each kind of result, `runner` goes through them. An experiment is a
`config.Experiment`; the demo is one.
"""

from idp_jax.config.experiment import Experiment, Variant
from idp_jax.experiments.runner import run

__all__ = ["Experiment", "Variant", "run"]

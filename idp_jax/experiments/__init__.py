"""Experiments: variants of a model are made, measured and compared, as one configuration says.

`stages` has one function for each kind of result, `runner` goes through them. An experiment is a
`config.Experiment`; the demo is one. A sweep (`sweep`, and what begins with its name) compares
methods of recovery over learning rates and seeds.
"""

from idp_jax.config.experiment import Experiment, Variant
from idp_jax.experiments.runner import run
from idp_jax.experiments.sweep import run_sweep

__all__ = ["Experiment", "Variant", "run", "run_sweep"]

"""Experiments: variants of a model are made, measured and compared, as one configuration says.

`stages` has one function for each kind of result, `runner` goes through them. An experiment is a
`config.Experiment`; the demo is one. A sweep (`sweep`, and what begins with its name) compares
methods of recovery over learning rates and seeds; a grid (`grid`) is one experiment for each model,
compression and seed.
"""

from idp_jax.config.experiment import Experiment, Variant
from idp_jax.experiments.grid import run_grid
from idp_jax.experiments.runner import run
from idp_jax.experiments.sweep import run_sweep

__all__ = ["Experiment", "Variant", "run", "run_grid", "run_sweep"]

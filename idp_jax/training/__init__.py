"""Training of adapters on a frozen model: objectives, the step, the loop, and whole runs."""

from idp_jax.data.batch import Batch
from idp_jax.training.checkpoint import Checkpointer
from idp_jax.training.loop import Diverged, fit
from idp_jax.training.metrics import JsonLines, Sink
from idp_jax.training.objectives import Mix, Objective, make_objective, next_token
from idp_jax.training.run import train
from idp_jax.training.step import make_optimizer

__all__ = [
    "Batch",
    "Checkpointer",
    "Diverged",
    "JsonLines",
    "Mix",
    "Objective",
    "Sink",
    "fit",
    "make_objective",
    "make_optimizer",
    "next_token",
    "train",
]

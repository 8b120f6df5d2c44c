"""Training of adapters on a frozen model: objectives, the step, the loop, and whole runs."""

from idp_jax.data.batch import Batch
from idp_jax.training.checkpoint import Checkpointer
from idp_jax.training.loop import fit
from idp_jax.training.metrics import JsonLines, Sink
from idp_jax.training.objectives import OBJECTIVES, Objective, next_token
from idp_jax.training.run import train
from idp_jax.training.step import make_optimizer

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Checkpointer",
    "JsonLines",
    "Objective",
    "Sink",
    "fit",
    "make_optimizer",
    "next_token",
    "train",
]

"""Training of adapters on a frozen model: the step, the loop with its checkpoints, and what a run
leaves behind.
"""

from idp_jax.training.loop import fit
from idp_jax.training.run import train

__all__ = ["fit", "train"]

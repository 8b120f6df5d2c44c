"""`idp-jax merge`: writes an adapter into its model."""

from idp_jax import config
from idp_jax.formats.merge import merge
from idp_jax.jobs.progress import Bars, console


def run(settings: config.Merge) -> None:
    """Merges, and says where the result is."""
    out = merge(settings, progress=Bars().tracker("loading"))
    console.print(f"written to {out}", highlight=False)

"""`idp-jax convert`: writes a model in another storage form."""

from idp_jax import config
from idp_jax.formats.convert import convert
from idp_jax.jobs.progress import Bars, console


def run(settings: config.Convert) -> None:
    """Converts, and says where the result is."""
    out = convert(settings, progress=Bars().tracker(f"converting to {settings.to}"))
    console.print(f"written to {out}", highlight=False)

"""`idp-jax compress`: plans the job, runs it, and says what came of it."""

import time

from idp_jax import config
from idp_jax.commands.tables import compression_table, plan_table
from idp_jax.compression.driver import resolve_settings
from idp_jax.compression.job import Job, compress
from idp_jax.compression.plan import plan, rates
from idp_jax.formats.source import open_config
from idp_jax.jobs.progress import Bars, console, is_first_process
from idp_jax.models.config import from_hf


def run(settings: config.Compress) -> None:
    """Compresses a model and prints one table, or plans it and prints the plan."""
    if settings.plan:
        return _plan(settings)
    started = time.perf_counter()
    result = compress(settings, progress=Bars(), begin=_begin)
    if not is_first_process():
        return
    wall = time.perf_counter() - started
    console.print(compression_table(result["matrices"], f"{settings.model}: {settings.method}"))
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result["seconds"].items())
    console.print(f"seconds: {stages}; in all {wall:.1f} (compilation included)", highlight=False)
    peaks = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in result["peak_memory"].items())
    console.print(f"most memory held: {peaks}", highlight=False)
    console.print(f"written to {settings.out}", highlight=False)


def _begin(job: Job, finished: int) -> None:
    if not is_first_process():
        return
    counted = plan(job.config, job.settings, job.by_name)
    console.print(plan_table(counted, f"{job.settings.model}: memory"))
    if finished:
        console.print(f"going on behind layer {finished - 1}", highlight=False)


def _plan(settings: config.Compress) -> None:
    """Prints what the job would take, at the rates of this machine's first device."""
    model = from_hf(open_config(settings.model))
    counted = plan(model, settings, resolve_settings(model, settings, settings.form))
    console.print("measuring this machine", highlight=False)
    console.print(plan_table(counted, f"{settings.model}: plan", rates()))

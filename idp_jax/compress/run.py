"""`idp-jax compress`: plans the job, runs it, and says what came of it."""

import dataclasses
import time
from contextlib import nullcontext
from typing import Any

import jax

from idp_jax import config
from idp_jax.compress import plan, report
from idp_jax.compress.driver import StageTimes, resolve_settings
from idp_jax.compress.job import Job
from idp_jax.config_files import to_dict
from idp_jax.environment import describe, peak_memory
from idp_jax.formats.source import open_config
from idp_jax.models.config import from_hf
from idp_jax.progress import console, tracker
from idp_jax.sharding import mesh_of


def compress(settings: config.Compress) -> dict[str, Any]:
    """Compresses a model into a folder; returns the report, which is also `compression.json` there.

    Raises:
        ValueError: settings that do not fit the model, too little calibration text, or a folder
            that exists or holds another job.
    """
    if settings.plan:
        return _plan(settings)
    times, started = StageTimes(), time.perf_counter()
    mesh = mesh_of(settings.mesh)
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        job = Job(settings, mesh)
        finished = job.start()
        try:
            job.prepare(times)
            counted = plan.plan(job.config, settings, job.by_name)
            console.print(plan.table(counted, f"{settings.model}: memory"))
            if finished:
                console.print(f"going on behind layer {finished - 1}", highlight=False)
            rows = job.run(times, progress=tracker(f"compressing ({settings.method})"))
        except (ValueError, OSError):
            job.withdraw()
            raise
        result = {
            "config": to_dict(settings),
            "environment": describe(),
            "matrices": rows,
            "seconds": dict(times.seconds),
            "peak_memory": peak_memory(),
        }
        job.finish(result)
    wall = time.perf_counter() - started
    console.print(report.table(f"{settings.model}: {settings.method}", rows))
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in times.seconds.items())
    console.print(f"seconds: {stages}; in all {wall:.1f} (compilation included)", highlight=False)
    peaks = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in peak_memory().items())
    console.print(f"most memory held: {peaks}", highlight=False)
    console.print(f"written to {settings.out}", highlight=False)
    return result


def _plan(settings: config.Compress) -> dict[str, Any]:
    """Prints what the job would take, at the rates of this machine's first device."""
    model = from_hf(open_config(settings.model))
    counted = plan.plan(model, settings, resolve_settings(model, settings, settings.form))
    console.print("measuring this machine", highlight=False)
    speeds = plan.rates()
    console.print(plan.table(counted, f"{settings.model}: plan", speeds))
    return {"plan": dataclasses.asdict(counted), "rates": speeds}

"""`idp-jax plan`: compiles a training for devices that are not here, and judges it."""

from collections.abc import Sequence

from rich.table import Table

from idp_jax import config
from idp_jax.commands.tables import columns, show
from idp_jax.config import ConfigError
from idp_jax.jobs.progress import clock, console
from idp_jax.pods.chips import Topology
from idp_jax.pods.plan import Planned, Report, plan
from idp_jax.sharding import batch_parts

_GIB = 2**30
_MESSAGES = 12  # rows of a table


def run(settings: config.Plan) -> None:
    """Compiles every program of a run, prints what each takes, and fails if one does not fit."""
    say = lambda line: console.print(line, highlight=False, soft_wrap=True)
    job = plan(settings, say)
    reports = list(job.reports)
    show(_programs(reports, settings, job), console)
    for report in reports:
        if report.counts is not None and report.counts.collectives:
            show(_messages(report, job.topology), console)
            break
    step = next((r for r in reports if r.name.startswith("step") and r.counts), None)
    if step is not None:
        say(_speed(step, settings, job.topology))
    large = [r for r in reports if not r.fits(job.topology)]
    if large:
        room = f"{job.topology.chip.memory / _GIB:.2f} GiB that a device of {settings.topology} has"
        knobs = ", ".join(_knobs(large[0], settings, batch_parts(job.mesh)))
        raise ConfigError(f"{large[0].name} needs {_size(large[0])} of the {room}; give {knobs}")


def _programs(reports: Sequence[Report], settings: config.Plan, job: Planned) -> Table:
    """A row for each program; bytes and times on one device."""
    topology = job.topology
    shape = " x ".join(f"{axis} {size}" for axis, size in job.mesh.shape.items())
    table = columns(
        f"{settings.model} on {topology.name}, {shape}: per device",
        "program",
        ("GiB held", "in work", "at most", "Tflop", "GB moved", "ms at least", "MFU at most"),
    )
    for report in reports:
        if report.counts is None:
            table.add_row(report.name, "", "", _size(report))
            continue
        table.add_row(
            report.name,
            *(f"{size / _GIB:.2f}" for size in (report.held, report.work, report.peak)),
            f"{report.counts.flops / 1e12:.3g}",
            f"{report.counts.bytes() / 1e9:.3g}",
            f"{1e3 * report.bound(topology):.3g}",
            f"{report.utilization(topology):.0%}" if report.useful else "",
        )
    return table


def _messages(report: Report, topology: Topology) -> Table:
    assert report.counts is not None
    table = columns(
        f"{report.name}: messages between devices",
        "message",
        ("array", "devices", "times", "GB", "ms at least"),
    )
    for message in report.counts.collectives[:_MESSAGES]:
        shape = message.shape if len(message.shape) < 40 else f"{message.shape[:37]}..."
        table.add_row(
            message.kind,
            shape,
            str(message.size),
            str(message.count),
            f"{message.bytes * message.count / 1e9:.3g}",
            f"{1e3 * message.seconds(topology.link(message.size)):.3g}",
        )
    return table


def _speed(step: Report, settings: config.Plan, topology: Topology) -> str:
    bound = step.bound(topology)
    return (
        f"at most {step.tokens / bound:,.0f} tokens a second: {settings.steps:,} steps take "
        f"{clock(settings.steps * bound)} at least (bounds of the vendor's peaks, no forecast)"
    )


def _size(report: Report) -> str:
    least = "" if report.counts is not None else "at least "
    return f"{least}{report.peak / _GIB:.2f} GiB" if report.peak else "more"


def _knobs(report: Report, settings: config.Plan, rows: int) -> list[str]:
    """What makes a program smaller, the cheapest first."""
    knobs = []
    if settings.dtype not in (None, "bfloat16"):
        knobs.append("--dtype bfloat16")
    of_training = report.name.startswith(("step", "validation", "teacher"))
    if settings.remat not in (None, "layer") and report.name.startswith("step"):
        knobs.append("--remat layer")
    if of_training and settings.batch_size > rows * settings.passes:
        knobs.append(f"--passes {min(2 * settings.passes, settings.batch_size // rows)}")
    knobs += ["a larger --mesh.fsdp or --mesh.model", "a smaller --data.sequence-length"]
    return knobs

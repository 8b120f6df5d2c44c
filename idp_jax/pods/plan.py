"""`idp-jax plan`: a training on devices that are not here, program by program.

Times are bounds, not forecasts: no program is faster than its products at the vendor's peak, its
messages around a ring, or its arguments out of memory once.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax

from idp_jax.config import ConfigError, Plan
from idp_jax.pods.chips import Topology, open_topology
from idp_jax.pods.hlo import Counts, count
from idp_jax.pods.programs import Job, Program
from idp_jax.sharding import MESH_AXES, make_mesh
from idp_jax.training.checks import check_batch, check_shapes
from idp_jax.training.plan import forward

# What the TPU compiler says of a program that does not fit: all of it, or what comes and goes.
_USED = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMG])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Report:
    """One compiled program, on one of the devices.

    Attributes:
        name: what it does.
        held: bytes of its arguments (model, adapter, optimiser state) and of what else is there.
        work: bytes that come and go.
        peak: bytes of both at the worst moment; 0 where the compiler does not say.
        counts: see `hlo.Counts`; None where the compiler has refused a program that does not fit.
        useful: operations that its mathematics need, on each device.
        tokens: that all devices read together.
    """

    name: str
    held: int
    work: int
    peak: int
    counts: Counts | None
    useful: float
    tokens: int

    def fits(self, topology: Topology) -> bool:
        """Whether a device has the memory."""
        return self.counts is not None and self.peak <= topology.chip.memory

    def compute(self, topology: Topology) -> float:
        """Seconds of its products at the vendor's peak."""
        assert self.counts is not None
        return self.counts.flops / topology.chip.flops

    def network(self, topology: Topology) -> float:
        """Seconds of its messages."""
        assert self.counts is not None
        return sum(c.seconds(topology.link(c.size)) for c in self.counts.collectives)

    def bound(self, topology: Topology) -> float:
        """Seconds that it takes at least, if all that can be done at once is."""
        memory = self.held / topology.chip.bandwidth
        return max(self.compute(topology), self.network(topology), memory)

    def utilization(self, topology: Topology) -> float:
        """Of the peak, what is useful at that bound (MFU)."""
        bound = self.bound(topology)
        return self.useful / topology.chip.flops / bound if bound else 0.0


@dataclass(frozen=True)
class Planned:
    """A run on devices that are not here.

    Attributes:
        topology: those.
        mesh: made of them.
        reports: of its programs, each compiled when it is asked for.
    """

    topology: Topology
    mesh: jax.sharding.Mesh
    reports: Iterator[Report]


def plan(config: Plan, say: Callable[[str], None] = lambda line: None) -> Planned:
    """Compiles a run's programs, one after the other.

    Args:
        say: told what is compiled, before that takes its minutes.

    Raises:
        ConfigError: a topology, mesh or model that cannot be used.
    """
    check_shapes(config, None)  # before the compiler is opened
    topology = open_topology(config.topology)
    shape = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    if math.prod(shape.values()) == 1 < len(topology.devices):
        raise ConfigError(
            f"the file's mesh is one device, and --topology {config.topology} has "
            f"{len(topology.devices)}; give --mesh.data -1, or how they are to share the work"
        )
    mesh = make_mesh(shape, topology.devices)
    check_batch(config, mesh)
    job = Job(config, mesh, topology.chip.platform)
    for note in job.notes():
        say(note)
    programs = [p for p in job.programs() if p.name.startswith(config.programs)]
    if not programs:
        names = ", ".join(p.name for p in job.programs())
        raise ConfigError(f"--programs {config.programs} begins none of {names}")

    def reports() -> Iterator[Report]:
        for program in programs:
            say(f"compiling {program.name} for {topology.name}")
            yield _report(program, job)

    return Planned(topology, mesh, reports())


def _report(program: Program, job: Job) -> Report:
    length = job.config.data.sequence_length
    useful = program.forwards * program.tokens / length * forward(job.model, length) / job.mesh.size
    try:
        with warnings.catch_warnings():
            # What was compiled for devices that are not here cannot be kept for another time.
            warnings.filterwarnings("ignore", "Error .* persistent compilation cache")
            compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = _USED.search(str(error))
        peak = int(float(used[1]) * _UNITS[used[2]]) + program.beside if used else 0
        return Report(program.name, 0, 0, peak, None, useful, program.tokens)
    memory = compiled.memory_analysis()
    assert memory is not None
    held, work = int(memory.argument_size_in_bytes), int(memory.temp_size_in_bytes)
    fresh = int(memory.output_size_in_bytes - memory.alias_size_in_bytes)
    peak = int(getattr(memory, "peak_memory_in_bytes", 0)) or held + work + max(fresh, 0)
    counts = count(compiled.as_text() or "")
    held, peak = held + program.beside, peak + program.beside
    return Report(program.name, held, work, peak, counts, useful, program.tokens)

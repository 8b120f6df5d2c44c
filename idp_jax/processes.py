"""Who does what in a job of several processes: joining, meeting points, and gathering arrays."""

from collections.abc import Callable
from functools import cache
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from idp_jax.jobs.failures import explain_abort
from idp_jax.jobs.launch import launched_together, number
from idp_jax.sharding import MESH_AXES, make_mesh

T = TypeVar("T")
_PATIENCE = 60  # seconds after which a process that is not heard of is given up: the others end
_LONGEST_LINE = 1000  # bytes of an error that is told to other processes


def mesh_of(config) -> jax.sharding.Mesh | None:
    """The mesh that a `config.Mesh` asks for, or None for one device.

    Joins the other processes of the job first, where that is asked for or the launcher is
    recognised; several processes without a mesh of their own share the batch.
    """
    if (config.distributed or launched_together()) and not jax.distributed.is_initialized():
        # It would take SIGTERM for itself; a training agrees on where to stop, see `interruption`.
        jax.config.update("jax_enable_preemption_service", False)
        # A launcher that JAX knows (SLURM, Open MPI, TPU pods) fills these in by itself.
        jax.distributed.initialize(
            num_processes=number("JAX_NUM_PROCESSES"),
            process_id=number("JAX_PROCESS_ID"),
            heartbeat_timeout_seconds=_PATIENCE,
            shutdown_timeout_seconds=_PATIENCE,
        )
        explain_abort()
    shape = {axis: getattr(config, axis) for axis in MESH_AXES}
    if all(size == 1 for size in shape.values()):
        return make_mesh() if jax.process_count() > 1 else None
    return make_mesh(shape)


def first_process(action: Callable[[], object], name: str) -> None:
    """Runs `action` (writing a file, say) on process 0 while the others of the job wait.

    Args:
        name: of the meeting point, the same in every process.

    Raises:
        Exception: what `action` raised, on process 0.
        ValueError: the same in words, on the other processes, which would wait for ever otherwise.
    """
    if jax.process_count() == 1:
        action()
        return
    failure = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as error:
            failure = error
    multihost_utils.sync_global_devices(name)
    said = _told_by_first("" if failure is None else _said(failure))
    if failure is not None:
        raise failure
    if said:
        raise ValueError(f"process 0 failed: {' '.join(said.split())}")


def together(action: Callable[[], T], mesh: jax.sharding.Mesh | None) -> T:
    """What `action` gives, where it does so in every process of a mesh, which all call this.

    Raises:
        Exception: what it raised here.
        ValueError: what it raised in another process, in words; this one would wait for it for ever
            otherwise.
    """
    if mesh is None or not mesh.is_multi_process:
        return action()
    found, failure = None, None
    try:
        found = action()
    except Exception as error:
        failure = error
    lines = multihost_utils.process_allgather(_line("" if failure is None else _said(failure)))
    if failure is not None:
        raise failure
    for process, line in enumerate(np.asarray(lines)):
        if line.any():
            raise ValueError(f"process {process} failed: {' '.join(_text(line).split())}")
    return cast(T, found)


def _said(error: Exception) -> str:
    return str(error) or repr(error)


def _told_by_first(text: str) -> str:
    """Process 0's text, on every process; what is too long is cut off."""
    return _text(np.asarray(multihost_utils.broadcast_one_to_all(_line(text))))


def _line(text: str) -> np.ndarray:
    line = np.zeros(_LONGEST_LINE, np.uint8)
    encoded = np.frombuffer(text.encode()[:_LONGEST_LINE], np.uint8)
    line[: encoded.size] = encoded
    return line


def _text(line: np.ndarray) -> str:
    return line.tobytes().rstrip(b"\0").decode(errors="ignore")


def largest(number: int) -> jax.Array:
    """The largest of the numbers that the processes of a job give, all alike; not waited for.

    Returns:
        int32 scalar, known when the devices have done what they were given before.
    """
    mesh = _every_device()
    own = np.full(jax.local_device_count(), number, np.int32)
    with jax.set_mesh(mesh):
        given = NamedSharding(mesh, PartitionSpec(MESH_AXES))
        return _maximum(jax.make_array_from_process_local_data(given, own))


@cache
def _every_device() -> jax.sharding.Mesh:
    return make_mesh()


@jax.jit
def _maximum(numbers: jax.Array) -> jax.Array:
    return numbers.max()


def gather(tree):
    """Whole arrays on every process, of what the devices of several processes hold together.

    Every process calls this. An array that a process holds whole stays as it is: one may have
    computed it by itself, while the others wait for what it writes.
    """

    def whole(leaf):
        here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        return leaf if here else multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def everywhere(flag: bool) -> bool:
    """Whether a flag is set in every process of the job; each waits for the others' answer."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).all())

"""What a compression job will take, before it runs: memory, and time from rates measured here.

The memory is the sum of what lives at the same time in the most expensive stage of a block. The
time is the job's work, by kind, over the rates at which this machine did a little of the same work.
The invariant: nothing is read of the model but its configuration.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from idp_jax.compression.cores.gptq import gptq
from idp_jax.compression.cores.hessian import accumulate, empty_state, inverse_factor
from idp_jax.compression.flow import KEPT_BYTES
from idp_jax.config import Compress, Compression
from idp_jax.models.config import ModelConfig
from idp_jax.models.matrices import Matrix, matrices, stages
from idp_jax.sharding import MESH_AXES, parts

_FLOAT = 4  # bytes; streams, Hessians and what the cores work on are float32
# The Hessian, the matrix that becomes its factor, the factor, and masks of a byte an entry.
_SQUARE = 13
# A stage's weights, as they are visited, their errors, what they become, and the codes.
_ROW = 17
# Measured on a CPU: JAX and the other packages, and the programs that were compiled.
_LIBRARIES = 800_000_000
# Methods that walk along the Hessian's factor.
_WALKS = ("gptq", "sparsegpt")
# What every device does for itself.
_NOT_SHARED = ("factor", "compilation")


@dataclass(frozen=True)
class Plan:
    """Bytes by what holds them, operations by kind.

    Attributes:
        devices: how many work together.
        device: bytes on each device, by what they hold.
        host: bytes on the host beside the device's (the same memory, on a CPU).
        entry: bytes on the host before the first block, when the text enters the model; they are
            gone when the rest comes.
        work: multiplications and additions of the whole job, by kind; programs to compile.
        disk: bytes of the result's matrices.
    """

    devices: int
    device: dict[str, int]
    host: dict[str, int]
    entry: int
    work: dict[str, float]
    disk: int

    @property
    def peak(self) -> int:
        """Bytes where host and device share their memory."""
        blocks = sum(self.device.values()) + sum(self.host.values())
        return max(blocks, self.entry + _LIBRARIES)

    def seconds(self, rates: dict[str, float]) -> dict[str, float]:
        """The time of each kind of work, at operations in a second on one device."""
        return {
            kind: work / rates[kind] / (1 if kind in _NOT_SHARED else self.devices)
            for kind, work in self.work.items()
        }


def plan(
    config: ModelConfig,
    settings: Compress,
    by_name: dict[tuple[int, str], Compression | None],
) -> Plan:
    """Counts a job.

    Args:
        settings: whose mesh gives the number of devices, -1 counting as 1.
        by_name: the settings of every matrix, from `driver.resolve_settings`.
    """
    mesh = {axis: max(getattr(settings.mesh, axis), 1) for axis in MESH_AXES}
    data, rows = parts("batch", mesh), parts("rows", mesh)
    sizes = {matrix.name: matrix.inputs * matrix.outputs for matrix in matrices(config)}
    tokens = settings.samples * settings.sequence_length
    weights = sum(sizes.values())
    has_text = any(chosen is not None and chosen.needs_data for chosen in by_name.values())
    of_stages = [_stage_bytes(stage, rows, has_text) for stage in stages(config)]
    squares, swept = max(of_stages, key=sum)
    device = {"one block's weights": weights * _FLOAT // rows, "a stage's matrices": swept}
    if has_text:
        batch = min(settings.batch_size * data, settings.samples) * settings.sequence_length
        inner = tokens * config.ffw_dim * _FLOAT
        device |= {
            "residual streams, twice": 2 * tokens * config.hidden_dim * _FLOAT // data,
            "inner activations": (inner if inner <= KEPT_BYTES else 0) // data,
            "a micro-batch": batch * (config.ffw_dim + config.hidden_dim) * _FLOAT // data,
            "Hessian and its factor": squares,
        }
    disk = sum(int(sizes[name] * _bits(chosen) / 8) for (_, name), chosen in by_name.items())
    host = {"one block, as read": weights * 2, "libraries, programs": _LIBRARIES}
    # As read, of two bytes, and as the calibration pass runs it.
    entry = config.vocab_size * config.embedding_dim * (2 + _FLOAT) if has_text else 0
    work = _work(config, settings, by_name, has_text)
    return Plan(data * rows, device, host, entry, work, disk)


def _stage_bytes(stage: tuple[Matrix, ...], rows: int, has_text: bool) -> tuple[int, int]:
    """Bytes of what has the Hessian's shape, and of what has the matrices'."""
    inputs = stage[0].inputs
    outputs = sum(matrix.outputs for matrix in stage)
    return inputs**2 * _SQUARE * has_text, outputs * inputs * _ROW // rows


def _bits(settings: Compression | None) -> float:
    """Bits of a weight in the file, grids included."""
    if settings is None or not settings.quantizes:
        return 16.0
    group = settings.group_size
    return settings.bits + (16 + settings.bits) / group if group > 0 else float(settings.bits)


def _work(config: ModelConfig, settings: Compress, by_name, has_text: bool) -> dict[str, float]:
    walks = stages(config) if has_text else ()
    tokens, layers = settings.samples * settings.sequence_length, config.num_layers
    attention = 2 * config.num_heads * config.head_dim * settings.sequence_length  # causal: half
    forward = sum(_products(stage) for stage in walks) + attention * 2
    if walks and tokens * config.ffw_dim * _FLOAT > KEPT_BYTES:
        forward += _products(walks[2])  # the inner activations a second time
    by_matrix = {matrix.name: matrix for matrix in matrices(config)}
    used = {key: chosen for key, chosen in by_name.items() if chosen is not None}
    matrix_of = {key: by_matrix[key[1]] for key in used}
    sizes = {key: matrix.inputs * matrix.outputs for key, matrix in matrix_of.items()}
    walked = {key for key, chosen in used.items() if chosen.method in _WALKS}
    searched = {key for key, chosen in used.items() if chosen.quantizes and chosen.grid == "mse"}
    products = sum(2 * sizes[key] * matrix_of[key].inputs for key in used) if walks else 0
    return {
        "forward": float(layers * tokens * forward if walks else 0),
        "Hessian": float(layers * tokens * sum(2 * stage[0].inputs ** 2 for stage in walks)),
        "factor": float(sum(4 / 3 * i**3 for i in _factored(walked, by_matrix))),
        "sweep": float(sum(2 * sizes[key] * matrix_of[key].inputs for key in walked)),
        # Of the matrix, its result and its baseline; the walk's own is part of its rate.
        "errors": float(2 * products),
        # The baseline searches too.
        "grids": float(sum(sizes[key] * (2 if key in walked else 1) for key in searched)),
        "compilation": float(len({(chosen, matrix_of[key].stage) for key, chosen in used.items()})),
    }


def _products(stage: tuple[Matrix, ...]) -> int:
    """Multiplications and additions of one token's products with a stage's matrices."""
    return sum(2 * matrix.outputs * matrix.inputs for matrix in stage)


def _factored(walked: set[tuple[int, str]], by_matrix: dict[str, Matrix]) -> list[int]:
    """The widths of the Hessians that are factorised: one a stage."""
    widths = {(layer, by_matrix[name].stage): by_matrix[name].inputs for layer, name in walked}
    return list(widths.values())


def rates(batch: int = 4096, width: int = 1024) -> dict[str, float]:
    """Operations in a second on this machine's first device, by kind of work.

    Each is measured on a small instance of the very functions that the job runs.
    """
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (batch, width), jnp.float32)
    w = jax.random.normal(keys[1], (width, width), jnp.float32)
    hessian = accumulate(empty_state(width), x).hessian
    product = jax.jit(lambda x, w: x @ w)
    walk = jax.jit(
        lambda w, h, grid: gptq(w, h, bits=3, group_size=64, grid=grid, act_order="group")[1],
        static_argnames="grid",
    )
    factor_seconds = _seconds(lambda: inverse_factor(hessian, 0.01).factor)
    whole = _seconds(lambda: walk(w, hessian, "minmax"))
    # Differences of times on a busy machine: never less than a part of what they are taken from.
    plain = max(whole - factor_seconds, whole / 4)
    started = time.perf_counter()
    jax.block_until_ready(walk(w, hessian, "mse"))
    compilation = time.perf_counter() - started
    search = max(_seconds(lambda: walk(w, hessian, "mse")) - whole, whole / 20)
    square = 2 * batch * width**2 / _seconds(lambda: accumulate(empty_state(width), x))
    return {
        "forward": 2 * batch * width**2 / _seconds(lambda: product(x, w)),
        "Hessian": square,
        "factor": 4 / 3 * width**3 / factor_seconds,
        "sweep": 2 * width**3 / plain,
        "errors": square,  # products of the same precision
        "grids": width**2 / search,
        "compilation": 1 / compilation,
    }


def _seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """The best of some runs, compiled before."""
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - started)
    return best

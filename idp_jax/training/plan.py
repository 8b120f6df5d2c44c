"""What a training will take, before it runs: memory of the compiled step, time of its products.

The memory is XLA's own account of the very program that is run. The time is the step's matrix
products over the rate at which this machine did one of them; after its first steps a run says what
it measured. The invariant: to plan, nothing is read of the model but its configuration.
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from idp_jax.config import Train
from idp_jax.data.batch import Batch
from idp_jax.formats.load import dtype_of, storage_of
from idp_jax.formats.source import open_config
from idp_jax.jobs.machine import free_memory, shares_host
from idp_jax.jobs.progress import clock
from idp_jax.models.abstract import abstract
from idp_jax.models.config import ModelConfig, from_hf
from idp_jax.models.decoder import default_remat
from idp_jax.models.matrices import matrices
from idp_jax.recover.methods import METHODS, Run, parameter_count
from idp_jax.training.checks import abstract_adapter
from idp_jax.training.objectives import next_token
from idp_jax.training.starts import resolved
from idp_jax.training.step import TrainState, make_optimizer, make_train_step

# A step's time over that of its products alone: norms, softmax, loss and what moves between them.
# Measured with SmolLM2-135M on a CPU, 4 x 256 tokens.
_BESIDE_PRODUCTS = 1.5


@dataclass(frozen=True)
class Plan:
    """One training.

    Attributes:
        label: what is trained.
        parameters: of the adapter.
        steps: still to do.
        held: bytes that are there all the time: model, adapter and best adapter, optimiser state.
        work: bytes that come and go with a step: activations, gradients; None where XLA is silent.
        room: bytes that this machine has for both, or None where it does not say.
        step: multiplications and additions of one step.
        validations: those of all validations.
    """

    label: str
    parameters: int
    steps: int
    held: int
    work: int | None
    room: int | None
    step: float
    validations: float

    @property
    def bytes(self) -> int:
        """Of memory, in all."""
        return self.held + (self.work or 0)

    def seconds(self, rate: float) -> float:
        """The time of the whole training at `rate` operations a second."""
        return (self.steps * self.step + self.validations) * _BESIDE_PRODUCTS / rate

    def line(self, rate: float) -> str:
        """For people, before the first step."""
        gb = lambda size: f"{size / 1e9:.2f} GB"
        room = "" if self.room is None else f" of {gb(self.room)}"
        return (
            f"{self.label}: {gb(self.bytes)}{room} of memory ({gb(self.held)} held, "
            f"{gb(self.work or 0)} in a step); about {clock(self.seconds(rate))} for "
            f"{self.steps:,} steps, at {rate / 1e9:.3g} G operations/s"
        )

    def warning(self, config: Train) -> str | None:
        """What to do where the training does not fit; None where it does."""
        if self.room is None or self.bytes <= self.room:
            return None
        smaller = None
        if config.batch_size > config.passes:
            smaller = f"more --passes than {config.passes}"
        shorter = f"--data.sequence-length below {config.data.sequence_length}"
        ways = [
            None if _makes_again(config) else "--remat layer",
            smaller or shorter,
        ]
        return (
            f"warning: {self.label} needs {self.bytes / 1e9:.2f} GB, this machine has "
            f"{self.room / 1e9:.2f} GB: give {' or '.join(filter(None, ways))}"
        )


def plan(config: Train, mesh: jax.sharding.Mesh | None) -> list[Plan]:
    """Counts every training of a run, on the model's shapes alone.

    The step is that of the cross-entropy; a teacher is counted beside it as a dense model that goes
    forward once.
    """
    raw = open_config(config.model)
    model = from_hf(raw)
    keeps = config.weights == "packed" or (config.weights == "auto" and not shares_host())
    decoder = abstract(model, dtype=dtype_of(raw, config.dtype), weights=storage_of(raw, keeps))
    optimizer = make_optimizer(config.optimizer, config.learning_rate, config.steps)
    step = make_train_step(
        optimizer,
        partial(next_token, remat=config.remat),
        steps=max(config.steps, 1),
        passes=config.passes,
    )
    size = (config.batch_size, config.data.sequence_length)
    batch = Batch(jax.ShapeDtypeStruct(size, jnp.int32))
    made = []
    for run in METHODS[config.method].runs(resolved(config)):
        adapter = abstract_adapter(config, run, decoder)
        state = jax.eval_shape(lambda adapter: TrainState.start(adapter, optimizer), adapter)
        program = step.compiled(state, decoder, batch)
        made.append(planned(config, run, model, adapter, program, config.steps, mesh, None))
    return made


def planned(
    config: Train,
    run: Run,
    model: ModelConfig,
    adapter: Any,
    program: jax.stages.Compiled,
    steps: int,
    mesh: jax.sharding.Mesh | None,
    loaded: Any,
) -> Plan:
    """Counts one training.

    Args:
        program: its compiled step.
        loaded: what of `held` is in memory already, or None: the room is counted from here.
    """
    found = program.memory_analysis()
    # Devices that are the host's own share its memory.
    copies = mesh.size if mesh is not None and shares_host() else 1
    held = copies * int(getattr(found, "argument_size_in_bytes", 0))
    work, teacher = None, config.teacher.model is not None
    if found is not None:
        fresh = found.output_size_in_bytes - found.alias_size_in_bytes
        work = copies * int(found.temp_size_in_bytes + max(fresh, 0))
    if teacher and loaded is None:
        held += sum(_size(leaf) for leaf in jax.tree.leaves(abstract(_teacher(config))))
    room = free_memory()
    if room is not None and loaded is not None:
        room += copies * int(getattr(found, "argument_size_in_bytes", 0))
    window = forward(model, config.data.sequence_length)
    times = 1 + steps // config.evaluate_every
    return Plan(
        label=run.label,
        parameters=parameter_count(adapter),
        steps=steps,
        held=held,
        work=work,
        room=room,
        step=_step(config, window),
        validations=times * config.data.validation_windows * window,
    )


def seconds_of(config: Train, model: ModelConfig, rate: float) -> float:
    """The time of one training of a run by its products alone; nothing is compiled.

    Args:
        rate: operations a second, of `measured_rate`.
    """
    window = forward(model, config.data.sequence_length)
    times = 1 + config.steps // config.evaluate_every
    operations = config.steps * _step(config, window)
    operations += times * config.data.validation_windows * window
    return operations * _BESIDE_PRODUCTS / rate


def _step(config: Train, window: float) -> float:
    """Operations of a step, given those of a window's way forward."""
    teacher = config.teacher.model is not None
    return config.batch_size * window * (2 + _makes_again(config) + teacher)


def forward(model: ModelConfig, length: int) -> float:
    """Multiplications and additions of one window's way through a model.

    A step takes two such: no gradient of the frozen matrices is formed, only that of what goes
    through them.
    """
    products = sum(2 * matrix.inputs * matrix.outputs for matrix in matrices(model))
    attention = 2 * model.num_heads * model.head_dim * length  # half of the keys are hidden
    head = 2 * model.vocab_size * model.embedding_dim
    return float(length * (model.num_layers * (products + attention) + head))


def useful(model: ModelConfig, length: int) -> float:
    """Operations of a step that its mathematics need, for each token of windows of a length."""
    return 2 * forward(model, length) / length


def measured_rate(model: ModelConfig, dtype: Any, tokens: int) -> float:
    """Operations a second of one of the model's products, on this machine's first device."""
    rows, inputs, outputs = min(tokens, 2048), model.hidden_dim, model.ffw_dim
    x, w = jnp.ones((rows, inputs), dtype), jnp.ones((inputs, outputs), dtype)
    product = jax.jit(lambda x, w: x @ w)
    jax.block_until_ready(product(x, w))
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(product(x, w))
        best = min(best, time.perf_counter() - started)
    return 2.0 * rows * inputs * outputs / best


def _makes_again(config: Train) -> bool:
    """Whether the backward pass goes through the layers once more."""
    return (config.remat or default_remat()) == "layer"


def _teacher(config: Train) -> ModelConfig:
    return from_hf(open_config(str(config.teacher.model)))


def _size(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize

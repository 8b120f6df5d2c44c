"""The programs of a training run, compiled for devices that are not here.

The invariant: what is compiled is what a run calls, with arguments of the same shapes in the same
places; only the numbers are missing.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from idp_jax.config import ConfigError, Plan
from idp_jax.data.batch import Batch
from idp_jax.data.stream import validation_rows
from idp_jax.formats.load import default_dtype, dtype_of, storage_of
from idp_jax.formats.source import open_config
from idp_jax.inference.generation import decode_step, prefill
from idp_jax.models.abstract import Storage, abstract
from idp_jax.models.config import ModelConfig, from_hf
from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import Matrix, matrices
from idp_jax.models.storage import repack_matrix
from idp_jax.recover import Repaired
from idp_jax.recover.methods import METHODS, Adapter
from idp_jax.sharding import RULES, batch_parts, parts, shardings
from idp_jax.training.checks import abstract_adapter
from idp_jax.training.objectives import make_objective
from idp_jax.training.starts import resolved
from idp_jax.training.step import TrainState, evaluate_step, make_optimizer, make_train_step
from idp_jax.training.teacher import asks, hear, what_is_asked
from idp_jax.training.word import Word

_SLOTS = 128  # of a generation, new tokens


class Program(NamedTuple):
    """One program.

    Attributes:
        name: what it does.
        compile: for the mesh's devices; takes minutes.
        tokens: that it reads, all devices together; 0 where it reads none.
        forwards: ways through model and head that its mathematics need, for each token; 0 where it
            needs the head for few of them.
        beside: bytes that each device holds meanwhile and the program does not read.
    """

    name: str
    compile: Callable[[], jax.stages.Compiled]
    tokens: int = 0
    forwards: int = 1
    beside: int = 0


def placed(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes with the places that `sharding.shard` would give the arrays."""
    put = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    return jax.tree.map(put, tree, shardings(tree, mesh))


def _storage(raw: Any, config: Plan, platform: str, parts: int) -> dict[str, Storage]:
    """How a run on this platform keeps each matrix of a model's blocks.

    Raises:
        ConfigError: groups that do not divide a matrix' inputs.
    """
    kernels = {"tpu": "pallas_tpu", "gpu": "mosaic_gpu"}
    backend = kernels.get(platform) if config.kernel == "auto" else config.kernel
    backend, kept = (
        None if backend == "xla" else backend,
        storage_of(raw, config.weights != "dense"),
    )
    for matrix in matrices(from_hf(raw)):
        size = config.group_size
        if config.bits is not None:
            if size != -1 and matrix.inputs % size:
                raise ConfigError(
                    f"--group-size {size} does not divide the {matrix.inputs} inputs of "
                    f"{matrix.name}; choose one that does, or -1"
                )
            kept[matrix.name] = Storage(config.bits, size)
        if kept[matrix.name].bits is not None:
            kept[matrix.name] = replace(kept[matrix.name], backend=backend, parts=parts)
    return kept


def _bytes(tree: Any) -> int:
    """On each device, of shapes with their places."""
    size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(map(size, jax.tree.leaves(tree)))


class Job:
    """A training run on a mesh, as shapes."""

    def __init__(self, config: Plan, mesh: jax.sharding.Mesh, platform: str):
        raw = open_config(config.model)
        with jax.set_mesh(mesh):  # whose devices' it is
            config = replace(config, dtype=config.dtype or default_dtype())
        self.config, self.mesh = config, mesh
        self.model: ModelConfig = from_hf(raw)
        self.storage = _storage(raw, config, platform, parts("heads", mesh.shape))
        self.dtype = dtype_of(raw, config.dtype)
        self.objective = make_objective(config.objective, remat=config.remat)
        self._key = jax.random.key(0)
        shapes = abstract(self.model, dtype=self.dtype, weights=self.storage)
        self.decoder: Decoder = placed(shapes, mesh)
        self.teacher: Decoder | None = None
        if config.teacher.model is not None and asks(self.objective):
            theirs = open_config(config.teacher.model)
            dtype = dtype_of(theirs, config.dtype)
            kept = storage_of(theirs, config.weights != "dense")
            self.teacher = placed(abstract(from_hf(theirs), dtype=dtype, weights=kept), mesh)
        self.runs = METHODS[config.method].runs(resolved(config))
        with jax.set_mesh(mesh):  # a start may run the model, with the kernels of these devices
            self.adapters = [abstract_adapter(config, run, shapes) for run in self.runs]

    def notes(self) -> Iterator[str]:
        """What a run on these devices does otherwise than the files say, a line each."""
        for matrix in matrices(self.model):
            filled = getattr(getattr(self.decoder.layers, matrix.name), "filled", 0)
            if filled:
                yield (
                    f"{matrix.name}: its {matrix.inputs:,} inputs are filled up to "
                    f"{matrix.inputs + filled:,}, so that they divide over --mesh.model"
                )

    def programs(self) -> Iterator[Program]:
        """All of them, the training's own first."""
        config, length = self.config, self.config.data.sequence_length
        tokens = config.batch_size * length
        beside = 0 if self.teacher is None else _bytes(self.teacher)
        for run, adapter in zip(self.runs, self.adapters, strict=True):
            named = f" of {run.label}" if len(self.runs) > 1 else ""
            held = 0 if self.teacher is None else beside - _bytes(self._head())
            if config.steps:
                yield Program(f"step{named}", partial(self._step, adapter), tokens, 2, held)
            rows = self._validation_rows()
            compiling = partial(self._validation, adapter)
            yield Program(f"validation{named}", compiling, rows * length, beside=beside)
        if self.teacher is not None and config.steps:
            yield Program("teacher", self._teacher, tokens, beside=_bytes(self.decoder))
        for matrix in matrices(self.model):
            if self.storage[matrix.name].backend is not None:
                yield Program(f"loading {matrix.name}", partial(self._loading, matrix))
        rows = batch_parts(self.mesh)
        yield Program("prefill", partial(self._prefill, rows, length), rows * length, 0)
        yield Program("decode", partial(self._decode, rows, length), rows, 0)

    def _step(self, adapter: Adapter) -> jax.stages.Compiled:
        config, steps = self.config, self.config.steps
        optimizer = make_optimizer(config.optimizer, config.learning_rate, steps)
        step = make_train_step(
            optimizer, self.objective, steps=steps, key=self._key, passes=config.passes
        )
        state = jax.eval_shape(lambda adapter: TrainState.start(adapter, optimizer), adapter)
        with jax.set_mesh(self.mesh):
            batch = self._batch(config.batch_size)
            if self.teacher is not None:
                batch = batch._replace(teacher=self._word(batch))
            return step.compiled(placed(state, self.mesh), self.decoder, batch)

    def _asked(self) -> dict[str, Any]:
        return what_is_asked(self.config.teacher, self.objective)

    def _head(self) -> Any:
        """What of the teacher comes with its word."""
        teacher = self.teacher
        if teacher is None or self._asked()["form"] != "full":
            return None
        source = teacher.embedding if teacher.head is None else teacher.head.kernel
        head = jax.eval_shape(lambda teacher: teacher.output_head(), teacher)
        return head.replace(kernel=source.get_value())  # with its place

    def _word(self, batch: Batch) -> Word:
        """The teacher's word on a batch, cut like that."""
        said = partial(hear, **self._asked())
        word = jax.eval_shape(said, self.teacher, batch.tokens, batch.segments, self._key)
        word = jax.tree.map(lambda leaf: self._rows(leaf.shape, leaf.dtype), word)
        return word.replace(head=self._head())

    def _teacher(self) -> jax.stages.Compiled:
        with jax.set_mesh(self.mesh):
            batch = self._batch(self.config.batch_size)
            arguments = self.teacher, batch.tokens, batch.segments, self._key
            return hear.lower(*arguments, **self._asked()).compile()

    def _validation_rows(self) -> int:
        config, parts = self.config, batch_parts(self.mesh)
        return validation_rows(config.data.validation_windows, config.windows_at_once, parts)

    def _validation(self, adapter: Adapter) -> jax.stages.Compiled:
        batch = self._batch(self._validation_rows())
        if self.config.data.validation_windows % batch_parts(self.mesh):  # some do not count
            batch = batch._replace(loss_mask=self._rows(batch.tokens.shape, bool))
        with jax.set_mesh(self.mesh):
            return evaluate_step.lower(placed(adapter, self.mesh), self.decoder, batch).compile()

    def _loading(self, matrix: Matrix) -> jax.stages.Compiled:
        """One matrix of all layers, from the layout of the files to that of the kernels."""
        files = {name: replace(kept, backend=None) for name, kept in self.storage.items()}
        layers = placed(abstract(self.model, dtype=self.dtype, weights=files), self.mesh).layers
        backend = str(self.storage[matrix.name].backend)
        options = {"backend": backend, "use_sparse24": False}
        with jax.set_mesh(self.mesh):
            return repack_matrix.lower(getattr(layers, matrix.name), matrix, **options).compile()

    def _prefill(self, rows: int, length: int) -> jax.stages.Compiled:
        read = lambda decoder, ids: prefill(Repaired(decoder), ids, None, _SLOTS)
        with jax.set_mesh(self.mesh):
            ids = self._rows((rows, length), jnp.int32)
            return jax.jit(read).lower(self.decoder, ids).compile()

    def _decode(self, rows: int, length: int) -> jax.stages.Compiled:
        ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        read = lambda decoder, ids: prefill(Repaired(decoder), ids, None, _SLOTS)[1]
        with jax.set_mesh(self.mesh):
            cache = placed(jax.eval_shape(read, self.decoder, ids), self.mesh)
            tokens, slot = self._rows((rows,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
            step = jax.jit(decode_step, donate_argnums=2)
            return step.lower(self.decoder, tokens, cache, slot).compile()

    def _batch(self, rows: int) -> Batch:
        ids = self._rows((rows, self.config.data.sequence_length), jnp.int32)
        return Batch(ids, ids if self.config.data.documents == "apart" else None)

    def _rows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """The shape of an array whose first axis is cut like a batch."""
        place = NamedSharding(self.mesh, PartitionSpec(RULES["batch"]))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

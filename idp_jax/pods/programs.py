"""The programs of a training run, compiled for devices that are not here.

The invariant: what is compiled is what a run calls, with arguments of the same shapes in the same
places; only the numbers are missing.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from idp_jax.config import Plan
from idp_jax.data.batch import Batch
from idp_jax.formats.source import open_config
from idp_jax.inference.generation import decode_step, prefill
from idp_jax.models.abstract import DENSE, Storage, abstract
from idp_jax.models.config import ModelConfig, from_hf
from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import matrices
from idp_jax.models.storage import repack_matrix
from idp_jax.recover.methods import METHODS, Adapter, Run
from idp_jax.sharding import RULES, batch_parts, shardings
from idp_jax.training.checks import abstract_adapter
from idp_jax.training.objectives import next_token
from idp_jax.training.starts import resolved
from idp_jax.training.step import TrainState, evaluate_step, make_optimizer, make_train_step

_SLOTS = 128  # of a generation, new tokens


class Program(NamedTuple):
    """One program.

    Attributes:
        name: what it does.
        compile: for the mesh's devices; takes minutes.
        tokens: that it reads, all devices together; 0 where it reads none.
        forwards: ways through the model's layers that its mathematics need, for each token.
    """

    name: str
    compile: Callable[[], jax.stages.Compiled]
    tokens: int = 0
    forwards: int = 1


def placed(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes with the places that `sharding.shard` would give the arrays."""
    put = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    return jax.tree.map(put, tree, shardings(tree, mesh))


def storage(raw: Any, config: Plan, platform: str) -> Storage:
    """How a run on this platform keeps the matrices of a model's blocks."""
    packed = getattr(raw, "quantization_config", None) or {}
    if config.bits is not None:
        packed = {"bits": config.bits, "group_size": config.group_size}
    if config.weights == "dense" or "bits" not in packed:
        return DENSE
    kernels = {"tpu": "pallas_tpu", "gpu": "mosaic_gpu"}
    backend = kernels.get(platform) if config.kernel == "auto" else config.kernel
    backend = None if backend == "xla" else backend
    return Storage(packed["bits"], packed.get("group_size", 128), backend=backend)


class Job:
    """A training run on a mesh, as shapes."""

    def __init__(self, config: Plan, mesh: jax.sharding.Mesh, platform: str):
        raw = open_config(config.model)
        self.config, self.mesh = config, mesh
        self.model: ModelConfig = from_hf(raw)
        self.storage = storage(raw, config, platform)
        self.dtype = config.dtype
        self.decoder: Decoder = abstract(self.model, dtype=self.dtype, weights=self.storage)
        self.runs = METHODS[config.method].runs(resolved(config))
        with jax.set_mesh(mesh):  # a start may run the model, with the kernels of these devices
            self.adapters = [abstract_adapter(config, run, self.decoder) for run in self.runs]
        self._key = jax.random.key(0)

    def programs(self) -> Iterator[Program]:
        """All of them, the training's own first."""
        config, length = self.config, self.config.data.sequence_length
        for run, adapter in zip(self.runs, self.adapters, strict=True):
            named = f" of {run.label}" if len(self.runs) > 1 else ""
            tokens = config.batch_size * length
            yield Program(f"step{named}", partial(self._step, run, adapter), tokens, 2)
            rows = self._validation_rows()
            yield Program(f"validation{named}", partial(self._validation, adapter), rows * length)
        if self.storage.backend is not None:
            for matrix in matrices(self.model):
                yield Program(f"loading {matrix.name}", partial(self._loading, matrix.name))
        rows = batch_parts(self.mesh)
        yield Program("prefill", partial(self._prefill, rows, length), rows * length)
        yield Program("decode", partial(self._decode, rows, length), rows)

    def _step(self, run: Run, adapter: Adapter) -> jax.stages.Compiled:
        config = self.config
        optimizer = make_optimizer(config.optimizer, config.learning_rate, config.steps)
        objective = partial(next_token, remat=config.remat)
        step = make_train_step(
            optimizer, objective, steps=config.steps, key=self._key, passes=config.passes
        )
        state = jax.eval_shape(lambda adapter: TrainState.start(adapter, optimizer), adapter)
        with jax.set_mesh(self.mesh):
            return step.compiled(self._placed(state), self._placed(self.decoder), self._batch())

    def _validation_rows(self) -> int:
        parts = batch_parts(self.mesh)
        units = -(-self.config.data.validation_windows // parts)
        most = self.config.windows_at_once // parts
        return parts * max(n for n in range(1, most + 1) if units % n == 0)

    def _validation(self, adapter: Adapter) -> jax.stages.Compiled:
        batch = self._batch(self._validation_rows())
        with jax.set_mesh(self.mesh):
            arguments = self._placed(adapter), self._placed(self.decoder), batch
            return evaluate_step.lower(*arguments).compile()

    def _loading(self, name: str) -> jax.stages.Compiled:
        """One matrix of all layers, from the layout of the files to that of the kernels."""
        files = Storage(self.storage.bits, self.storage.group_size)
        decoder = self._placed(abstract(self.model, dtype=self.dtype, weights=files))
        matrix = next(m for m in matrices(self.model) if m.name == name)
        options = {"backend": str(self.storage.backend), "use_sparse24": False}
        with jax.set_mesh(self.mesh):
            weight = getattr(decoder.layers, name)
            return repack_matrix.lower(weight, matrix, **options).compile()

    def _prefill(self, rows: int, length: int) -> jax.stages.Compiled:
        from idp_jax.recover import Repaired

        read = lambda decoder, ids: prefill(Repaired(decoder), ids, None, _SLOTS)
        with jax.set_mesh(self.mesh):
            ids = self._batch(rows, length).tokens
            return jax.jit(read).lower(self._placed(self.decoder), ids).compile()

    def _decode(self, rows: int, length: int) -> jax.stages.Compiled:
        from idp_jax.recover import Repaired

        ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        read = lambda decoder, ids: prefill(Repaired(decoder), ids, None, _SLOTS)[1]
        with jax.set_mesh(self.mesh):
            cache = self._placed(jax.eval_shape(read, self.decoder, ids))
        rows_of = NamedSharding(self.mesh, PartitionSpec(RULES["batch"]))
        tokens = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=rows_of)
        with jax.set_mesh(self.mesh):
            step = jax.jit(decode_step, donate_argnums=2)
            slot = jax.ShapeDtypeStruct((), jnp.int32)
            return step.lower(self._placed(self.decoder), tokens, cache, slot).compile()

    def _placed(self, tree: Any) -> Any:
        return placed(tree, self.mesh)

    def _batch(self, rows: int | None = None, length: int | None = None) -> Batch:
        size = (rows or self.config.batch_size, length or self.config.data.sequence_length)
        place = NamedSharding(self.mesh, PartitionSpec(RULES["batch"]))
        return Batch(jax.ShapeDtypeStruct(size, jnp.int32, sharding=place))

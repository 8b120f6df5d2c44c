"""The training loop: steps, validations, checkpoints, and going on after an interruption.

A run that is killed and started again ends with the same adapter as one that was not: the
checkpoint holds adapter, optimiser state and
best adapter, and the order of the data depends on the step alone.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.config import Train
from idp_jax.data.stream import TrainingText
from idp_jax.models.decoder import Decoder
from idp_jax.processes import first_process
from idp_jax.sharding import shard, shard_batch
from idp_jax.training.step import (
    TrainState,
    evaluate_step,
    keep_best,
    make_optimizer,
    make_train_step,
)


def fit(
    adapter: Any,
    decoder: Decoder,
    text: TrainingText,
    config: Train,
    folder: Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[[int, int, str], None] = lambda step, steps, note: None,
) -> tuple[Any, dict[str, float]]:
    """Trains an adapter and returns the best one by validation loss.

    Args:
        folder: for `checkpoints/` (orbax) and `metrics.jsonl`; a run found there goes on.
        progress: called after every step.

    Returns:
        The adapter with the lowest validation loss, and "validation_loss", "validation_perplexity"
        and "best_step" of it.
    """
    import orbax.checkpoint as ocp

    optimizer = make_optimizer(config.optimizer, config.learning_rate, config.steps)
    step_function = make_train_step(optimizer, remat=config.remat)
    state = TrainState.start(shard(adapter, mesh), optimizer)
    options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
    metrics = _Metrics(folder / "metrics.jsonl")
    with ocp.CheckpointManager(folder.absolute() / "checkpoints", options=options) as manager:
        state = _restore(manager, state)
        fresh = manager.latest_step() is None
        last = -1 if fresh else int(state.step)
        first_process(lambda: metrics.drop_after(last), "metrics")
        if fresh:
            state = _validate(state, decoder, text, config.batch_size, metrics, manager)
        batches = text.batches(config.batch_size, skip=int(state.step))
        for number in range(int(state.step) + 1, config.steps + 1):
            state, values = step_function(state, decoder, shard_batch(next(batches), mesh))
            progress(number, config.steps, f"loss {float(values['loss']):.3f}")
            metrics.write(number, {name: float(value) for name, value in values.items()})
            if number % config.evaluate_every == 0 or number == config.steps:
                state = _validate(state, decoder, text, config.batch_size, metrics, manager)
    best = float(state.best_loss)
    return state.best_adapter, {
        "validation_loss": best,
        "validation_perplexity": float(np.exp(best)),
        "best_step": int(state.best_step),
    }


def _restore(manager, state: TrainState) -> TrainState:
    """The last checkpoint's state, or `state` where there is none."""
    import orbax.checkpoint as ocp

    last = manager.latest_step()
    if last is None:
        return state
    leaves, structure = jax.tree.flatten(state)
    restored = manager.restore(last, args=ocp.args.StandardRestore(dict(enumerate_names(leaves))))
    return jax.tree.unflatten(structure, [restored[name] for name, _ in enumerate_names(leaves)])


def enumerate_names(leaves: list) -> list[tuple[str, Any]]:
    """Leaves under fixed names: a checkpoint does not depend on how a module spells its own
    tree.
    """
    return [(f"leaf_{number:04d}", leaf) for number, leaf in enumerate(leaves)]


def _validate(state: TrainState, decoder, text, batch_size: int, metrics, manager) -> TrainState:
    """Measures the validation loss, keeps the best adapter and writes a checkpoint."""
    import orbax.checkpoint as ocp

    size = max(n for n in range(1, batch_size + 1) if len(text.validation) % n == 0)
    batches = text.validation.reshape(-1, size, text.length)
    loss = jnp.stack([evaluate_step(state.adapter, decoder, batch) for batch in batches]).mean()
    state = keep_best(state, loss)
    metrics.write(int(state.step), {"validation_loss": float(loss)})
    leaves = dict(enumerate_names(jax.tree.leaves(state)))
    manager.save(int(state.step), args=ocp.args.StandardSave(leaves), force=True)
    manager.wait_until_finished()
    return state


class _Metrics:
    """metrics.jsonl: one line per step, in order, even after an interruption. Written by process 0
    only.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def drop_after(self, step: int) -> None:
        """Forgets the steps that an interrupted run took after its last checkpoint."""
        if not self.path.is_file():
            return
        rows = [
            json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")
        ]
        kept = [row for row in rows if row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        if jax.process_index() == 0:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

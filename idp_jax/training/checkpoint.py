"""Checkpoints of a run: the training state, and where in the data the next batch begins.

They are written while training goes on. The invariant: a checkpoint has its name when it is
complete, and older ones go after that, so that a run that is killed finds a whole one.
"""

from pathlib import Path
from typing import Any, TypeVar

import jax

from idp_jax.jobs import signals

State = TypeVar("State")
_REASON = 200  # letters of what orbax says


class Checkpointer:
    """The last checkpoints of a run in an orbax folder; a context manager.

    Leaves are stored under fixed names, so that a checkpoint does not depend on how a module spells
    its own tree. Leaving the context waits for what is being written.

    Args:
        keep: how many are kept. The best adapter is in each of them: see `TrainState`.
    """

    def __init__(self, folder: str | Path, keep: int = 1):
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)
        self._last = self._manager.latest_step()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *error: object) -> None:
        with signals.hold():
            self._manager.close()

    def save(self, step: int, state: Any, data_state: dict[str, Any]) -> None:
        """Begins to write a checkpoint, once an earlier one is complete; every process calls this.

        The state may be given away when this returns. A step whose checkpoint is there already is
        not written again.

        Args:
            state: a pytree of arrays.
            data_state: plain JSON, see `Batches.state`.

        Raises:
            Exception: what went wrong with an earlier one.
        """
        import orbax.checkpoint as ocp

        if self._last == step:
            return
        parts = ocp.args.Composite(
            state=ocp.args.StandardSave(dict(_named(jax.tree.leaves(state)))),
            data=ocp.args.JsonSave(data_state),
        )
        with signals.hold():
            self._manager.save(step, args=parts, force=True)
        self._last = step

    def wait(self) -> None:
        """Waits until what is being written is complete; a signal waits, too."""
        with signals.hold():
            self._manager.wait_until_finished()

    def restore(self, like: State) -> tuple[State, dict[str, Any]] | None:
        """The last checkpoint, or None where there is none.

        Args:
            like: a state of the same structure, whose leaves say dtype and placement.

        Raises:
            ValueError: the checkpoint is damaged, or of another form.
        """
        import orbax.checkpoint as ocp

        last = self._manager.latest_step()
        if last is None:
            return None
        leaves, structure = jax.tree.flatten(like)
        wanted = ocp.args.Composite(
            state=ocp.args.StandardRestore(dict(_named(leaves))), data=ocp.args.JsonRestore()
        )
        try:
            found = self._manager.restore(last, args=wanted)
            state = [found["state"][name] for name, _ in _named(leaves)]
            return jax.tree.unflatten(structure, state), dict(found["data"])
        except Exception as error:  # whatever orbax meets in a damaged file
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0][:_REASON]
            folder, here = self._manager.directory, self._manager.directory / str(last)
            before = [step for step in self._manager.all_steps() if step < last]
            earlier = f"remove {here} to go on from step {max(before)}, " if before else ""
            raise ValueError(
                f"cannot go on from the checkpoint in {here} ({reason}); {earlier}remove {folder} "
                "to train from the start, or give another --out"
            ) from error


def _named(leaves: list) -> list[tuple[str, Any]]:
    return [(f"leaf_{number:04d}", leaf) for number, leaf in enumerate(leaves)]

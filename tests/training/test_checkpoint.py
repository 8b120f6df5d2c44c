"""Checkpoints are written while training goes on, whole or not at all, and the last ones stay."""

import shutil
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import checkpoint_manager

from idp_jax.training import Checkpointer


def state(value: float) -> dict:
    return {"adapter": jnp.full((4, 3), value), "step": jnp.int32(value)}


def steps_in(folder) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


@pytest.fixture
def slow(monkeypatch):
    """Writing ends when this is set."""
    go_on, end = threading.Event(), checkpoint_manager.CheckpointManager._wait_for_checkpointers

    def wait(manager):
        assert go_on.wait(60)
        end(manager)

    monkeypatch.setattr(checkpoint_manager.CheckpointManager, "_wait_for_checkpointers", wait)
    return go_on


def test_a_save_returns_before_it_is_written(tmp_path, slow):
    with Checkpointer(tmp_path) as checkpointer:
        given = state(3)
        checkpointer.save(3, given, {"windows": 6})
        checkpointer.save(3, given, {"windows": 6})  # which is under way already
        assert checkpointer._manager.is_saving_in_progress()
        for leaf in given.values():  # as a step does that takes the state over
            leaf.delete()
        slow.set()
        checkpointer.wait()
        assert not checkpointer._manager.is_saving_in_progress()
        found, place = checkpointer.restore(state(0))
    assert (np.asarray(found["adapter"]) == 3).all() and place == {"windows": 6}


def test_leaving_waits_for_what_is_written(tmp_path, slow):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state(1), {})
        threading.Timer(0.2, slow.set).start()
    assert steps_in(tmp_path) == [1]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_ones_are_kept(tmp_path, keep):
    with Checkpointer(tmp_path, keep) as checkpointer:
        for step in range(1, 6):
            checkpointer.save(step, state(step), {"windows": step})
    assert steps_in(tmp_path) == list(range(6 - keep, 6))


def test_a_damaged_one_can_be_left_for_the_one_before(tmp_path):
    with Checkpointer(tmp_path, 2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(step), {"windows": step})
    for file in (tmp_path / "2" / "data").iterdir():
        file.write_text("[")
    with Checkpointer(tmp_path, 2) as checkpointer:
        remedy = f"remove {tmp_path}/2 to go on from step 1, remove {tmp_path} to train"
        with pytest.raises(ValueError, match=remedy):
            checkpointer.restore(state(0))
    shutil.rmtree(tmp_path / "2")
    with Checkpointer(tmp_path, 2) as checkpointer:
        found = checkpointer.restore(state(0))
        assert found is not None and found[1] == {"windows": 1}
        checkpointer.save(2, state(2), {})
    assert steps_in(tmp_path) == [1, 2]

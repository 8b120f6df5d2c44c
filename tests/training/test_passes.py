"""A batch in several passes gives what it gives in one."""

import jax
import numpy as np
import optax
import pytest

from idp_jax.config import ConfigError, Data, Mesh, Teacher, Train
from idp_jax.recover import LoraAdapter
from idp_jax.sharding import make_mesh, shard, shard_batch
from idp_jax.training import Batch, make_objective, train
from idp_jax.training.step import TrainState, make_train_step
from tests.helpers import tiny_decoder, tiny_ids

pytestmark = pytest.mark.usefixtures("optax_promotes")


def _step(passes: int, mesh=None):
    """Metrics and adapter behind one step on rows that count unequally."""
    model = tiny_decoder("llama", num_layers=1)
    mask = np.random.default_rng(0).random((8, 12)) < np.linspace(0.1, 0.9, 8)[:, None]
    batch = Batch(np.asarray(tiny_ids(model, batch=8, time=12)), loss_mask=mask)
    adapter = LoraAdapter.init(model, 2, jax.random.key(0))
    adapter.b["q"][...] += 0.1  # or nothing of a would be learnt
    optimizer = optax.sgd(1.0)
    step = make_train_step(optimizer, make_objective("ce"), passes=passes)
    state = TrainState.start(shard(adapter, mesh), optimizer)
    state, metrics = step(state, shard(model, mesh), shard_batch(batch, mesh))
    return metrics, state.adapter


@pytest.mark.parametrize(("passes", "mesh"), [(2, None), (8, None), (2, {"data": 2, "fsdp": 2})])
def test_passes_change_nothing(passes, mesh):
    expected = jax.tree.leaves(_step(1))
    mesh = None if mesh is None else make_mesh(mesh, jax.devices()[:4])
    for found, wanted in zip(jax.tree.leaves(_step(passes, mesh)), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def _run(files, out, **changes) -> Train:
    data = Data(train=str(files / "text.txt"), sequence_length=16, validation_windows=2)
    return Train(
        model=str(files / "model"),
        out=out,
        batch_size=4,
        tokens=3 * 4 * 16,
        prompt_length=4,
        evaluate_every=2,
        objective="kl + 0.5*ce",
        teacher=Teacher(model=str(files / "model")),
        data=data,
        **changes,
    )


def test_a_run_goes_on_in_other_passes(files, tmp_path):
    one = train(_run(files, tmp_path / "one"))
    several = train(_run(files, tmp_path / "several", passes=2))
    assert several["validation_loss"] == pytest.approx(one["validation_loss"], abs=1e-5)
    # Done: the passes are no matter, nor what the backward pass makes again.
    assert train(_run(files, tmp_path / "one", passes=4, remat="layer")) == one


def test_passes_that_do_not_divide_are_refused(files, tmp_path):
    with pytest.raises(ConfigError, match="--batch-size 4 does not divide into --passes 3"):
        _run(files, tmp_path, passes=3)
    with pytest.raises(ConfigError, match="--batch-size 4 in 2 passes .* choose a multiple of 16"):
        train(_run(files, tmp_path / "run", passes=2, mesh=Mesh(data=8)))

"""Training changes the adapter alone, learns, and goes on after an interruption as if none was."""

import dataclasses
import functools
import json
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idp_jax.config import Optimizer
from idp_jax.data.batch import Batch
from idp_jax.data.stream import TrainingText
from idp_jax.models.storage import expand
from idp_jax.recover import LoraAdapter, PrefixAdapter, SoftPrompt
from idp_jax.sharding import make_mesh, shard, shard_batch
from idp_jax.training import Checkpointer, JsonLines, fit, loop, next_token
from idp_jax.training.step import TrainState, evaluate_step, make_optimizer, make_train_step
from tests.helpers import close, quantize_decoder, tiny_decoder

LENGTH = 16  # tokens of a window
KEY = jax.random.key(5)


pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.fixture(scope="module", autouse=True)
def one_compilation():
    """Runs of equal settings share their compiled step, which each would compile for itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", functools.cache(make_train_step))
        yield


optimizer_of = functools.cache(make_optimizer)


@functools.cache
def model():
    """A frozen model of one layer; training depends on nothing that more layers would add."""
    return tiny_decoder("llama", num_layers=1)


def text(seed: int = 0, rows: int = 24) -> TrainingText:
    """Windows of a few words over and over, which a prompt can learn to expect."""
    rng = np.random.default_rng(1)
    windows = rng.choice([7, 30, 55, 81], (rows, LENGTH)).astype(np.int32)
    return TrainingText("", None, LENGTH, windows[-4:], windows[:-4], 0, seed)


def run_fit(
    folder, adapter=None, decoder=None, *, windows=None, steps=20, rate=0.05, size=2, **rest
):
    """`fit` as a job puts it together: metrics and checkpoints in a folder."""
    windows = text() if windows is None else windows
    with (
        closing(JsonLines(folder / "metrics.jsonl")) as metrics,
        Checkpointer(folder / "checkpoints") as checkpointer,
    ):
        return fit(
            start() if adapter is None else adapter,
            model() if decoder is None else decoder,
            next_token,
            optimizer_of(Optimizer(), rate, steps),
            windows.batches(size),
            windows.validation_batches(size),
            **{"steps": steps, "evaluate_every": 4, "sinks": [metrics], **rest},
            checkpointer=checkpointer,
        )


def start(kind: str = "prompt", decoder=None):
    """An adapter before training."""
    decoder = model() if decoder is None else decoder
    if kind == "prompt":
        return SoftPrompt.init(decoder, 4, KEY)
    if kind == "prefix":
        return PrefixAdapter.init(decoder, 4, KEY)
    return LoraAdapter.init(decoder, 2, KEY)


def leaves(tree) -> list[np.ndarray]:
    """Copies on the host."""
    return [np.array(x) for x in jax.tree.leaves(tree)]


def same(first, second) -> bool:
    """Equal bit for bit."""
    return all((x == y).all() for x, y in zip(leaves(first), leaves(second), strict=True))


def rows_of(folder) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run: folder, adapter and summary."""
    folder = tmp_path_factory.mktemp("whole")
    adapter, summary = run_fit(folder)
    return folder, adapter, summary


def test_only_the_adapter_changes(whole):
    before = leaves(tiny_decoder("llama", num_layers=1))
    assert all((x == y).all() for x, y in zip(before, leaves(model()), strict=True))
    _, adapter, _ = whole
    assert jax.tree.structure(adapter) == jax.tree.structure(start())
    assert not close(adapter.embeddings[...], start().embeddings[...], 0.01)


def test_the_loss_goes_down(whole):
    folder, _, summary = whole
    rows = rows_of(folder)
    losses = [row["loss"] for row in rows if "loss" in row]
    validations = {r["step"]: r["validation_loss"] for r in rows if "validation_loss" in r}
    assert len(losses) == 20 and sorted(validations) == [0, 4, 8, 12, 16, 20]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.3
    assert summary["validation_loss"] == pytest.approx(min(validations.values()))
    assert validations[summary["best_step"]] == pytest.approx(summary["validation_loss"])
    assert summary["validation_perplexity"] == pytest.approx(np.exp(summary["validation_loss"]))


class Interrupted(Exception):
    """What kills a run here."""


def stop_after(step: int):
    """A progress callback that raises."""

    def progress(number, steps, note):
        if number == step:
            raise Interrupted

    return progress


def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, whole):
    run = functools.partial(run_fit, tmp_path)
    for stop in (2, 6, 7):  # before the first validation after a step, and twice behind one
        with pytest.raises(Interrupted):
            run(progress=stop_after(stop))
    adapter, summary = run()
    assert same(adapter, whole[1]) and summary == whole[2]
    assert rows_of(tmp_path) == rows_of(whole[0])
    # A run that is complete is not trained again.
    adapter, summary = run(progress=stop_after(1))
    assert same(adapter, whole[1]) and summary == whole[2]
    assert rows_of(tmp_path) == rows_of(whole[0])


def test_the_best_adapter_is_kept(tmp_path):
    """Of a held-out text with some of the training text's words, training soon forgets the rest."""
    rng = np.random.default_rng(9)
    words, rest = rng.choice([7, 30, 55, 81], (4, LENGTH)), rng.integers(90, 128, (4, LENGTH))
    held_out = np.where(rng.random((4, LENGTH)) < 0.3, words, rest).astype(np.int32)
    other = dataclasses.replace(text(), validation=held_out)
    adapter, summary = run_fit(tmp_path, start("lora"), windows=other, rate=0.2)
    rows = [row for row in rows_of(tmp_path) if "validation_loss" in row]
    losses = [row["validation_loss"] for row in rows]
    best = rows[int(np.argmin(losses))]
    assert losses[-1] > best["validation_loss"] + 0.02
    assert 0 < summary["best_step"] == best["step"] < 20
    first, second = (evaluate_step(adapter, model(), b)[0] for b in other.validation_batches(2))
    loss = (first + second) / 2
    assert float(loss) == pytest.approx(best["validation_loss"], rel=1e-5)
    assert summary["validation_loss"] == pytest.approx(best["validation_loss"])


def test_validation_counts_every_target_alike():
    """Where documents stand apart, windows have targets of different number."""
    rows = text().validation[:2]
    segments = np.stack([np.zeros(LENGTH, np.int32), np.arange(LENGTH, dtype=np.int32) // 2])
    batches = [Batch(rows[i : i + 1], segments=segments[i : i + 1]) for i in range(2)]
    no_steps = {"steps": 0, "evaluate_every": 1}
    fitted = lambda batches: fit(
        start(), model(), next_token, optimizer_of(Optimizer(), 0.05, 20), text().batches(1),
        batches, **no_steps,
    )[1]["validation_loss"]  # fmt: skip
    together = fitted([Batch(rows, segments=segments)])
    first, second = (fitted([batch]) for batch in batches)
    assert fitted(batches) == pytest.approx(together, rel=1e-5)
    # Fifteen targets, and one in each of eight documents.
    assert together == pytest.approx((15 * first + 8 * second) / 23, rel=1e-5)
    assert abs(together - (first + second) / 2) > 1e-3


@functools.cache
def compiled(steps: int, rate: float):
    """An optimiser and its step, compiled once per kind of adapter and mesh."""
    optimizer = make_optimizer(Optimizer(), rate, steps)
    return optimizer, make_train_step(optimizer, next_token)


def train_steps(adapter, decoder, *, seed=0, mesh=None):
    """The adapter after three steps without the loop."""
    optimizer, step = compiled(3, 1e-2)
    state = TrainState.start(shard(adapter, mesh), optimizer)
    batches = text(seed).batches(8)
    for _ in range(3):
        state, _ = step(state, decoder, shard_batch(next(batches), mesh))
    return state.adapter


def compilations() -> int:
    """How many programs `train_steps` has compiled so far."""
    return len(compiled(3, 1e-2)[1].programs)


def test_a_step_compiles_once_and_follows_the_seed():
    adapter = train_steps(start(), model())
    assert compilations() == 1
    assert same(adapter, train_steps(start(), model()))
    assert not same(adapter, train_steps(start(), model(), seed=1))
    assert compilations() == 1


def test_the_gradient_is_clipped():
    gradient = {"x": jnp.full((4,), 10.0, jnp.float32)}
    optimizer = make_optimizer(Optimizer(clip_norm=1e-3), 0.1, 4)
    updates = []
    for scale in (1.0, 100.0):
        scaled = jax.tree.map(lambda x, scale=scale: x * scale, gradient)
        updates.append(optimizer.update(scaled, optimizer.init(gradient), gradient)[1])
    first, second = (leaves(update) for update in updates)
    # The moments that the optimiser keeps are those of the clipped gradient.
    assert all(close(x, y, 1e-9) for x, y in zip(first, second, strict=True))
    moment = optax.tree_utils.tree_get(updates[0], "mu")["x"]
    assert float(jnp.linalg.norm(moment)) == pytest.approx(0.1 * 1e-3, rel=1e-4)


def rates(steps: int, warmup: float) -> list[float]:
    """The learning rate of every step: Adam's update of a constant gradient is the rate."""
    optimizer = make_optimizer(Optimizer(warmup=warmup), 1.0, steps)
    parameters = {"x": jnp.zeros((), jnp.float32)}
    update, state, found = jax.jit(optimizer.update), optimizer.init(parameters), []
    for _ in range(steps):
        updates, state = update({"x": jnp.ones((), jnp.float32)}, state, parameters)
        found.append(-float(updates["x"]))
    return found


def test_the_learning_rate_rises_and_falls():
    assert rates(10, 0.4) == pytest.approx(
        [1 / 4, 2 / 4, 3 / 4, 1, *np.linspace(1, 0, 7)[:-1]], 1e-4
    )
    assert rates(5, 0.0) == pytest.approx([1, 1, 3 / 4, 2 / 4, 1 / 4], 1e-4)
    assert rates(4, 1.0) == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1], 1e-4)
    assert rates(1, 0.05) == pytest.approx([1], 1e-4)


MESHES = {"2x2x2": {"data": 2, "fsdp": 2, "model": 2}, "8x1x1": {"data": 8}}


@pytest.fixture(scope="module", params=["prompt", "lora"])
def on_one_device(request):
    """The kind of adapter and what three steps make of it."""
    return request.param, leaves(train_steps(start(request.param), model()))


@pytest.mark.parametrize("shape", MESHES)
def test_training_does_not_depend_on_the_mesh(on_one_device, shape):
    kind, expected = on_one_device
    mesh = make_mesh(MESHES[shape])
    with jax.set_mesh(mesh):
        before = compilations()
        adapter = train_steps(start(kind), shard(model(), mesh), mesh=mesh)
    assert compilations() == before + 1
    assert not same(start(kind), expected)
    for found, wanted in zip(leaves(adapter), expected, strict=True):
        assert close(found, wanted, 1e-5)


def test_a_run_on_a_mesh_goes_on(tmp_path):
    mesh = make_mesh(MESHES["2x2x2"])
    settings = {"steps": 4, "size": 4, "evaluate_every": 2, "rate": 1e-3}
    with jax.set_mesh(mesh):
        sharded = shard(model(), mesh)
        run = functools.partial(run_fit, tmp_path, start("prefix"), sharded, mesh=mesh, **settings)
        with pytest.raises(Interrupted):
            run(progress=stop_after(3))
        adapter, summary = run()
    alone, expected = run_fit(tmp_path / "alone", start("prefix"), **settings)
    assert summary["validation_loss"] == pytest.approx(expected["validation_loss"], abs=1e-4)
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1, 2, 2, 3, 4, 4]
    assert all(close(x, y, 1e-5) for x, y in zip(leaves(adapter), leaves(alone), strict=True))


@pytest.mark.parametrize("kind", ["prompt", "lora"])
def test_training_on_packed_weights(kind):
    packed = quantize_decoder(model(), 3)
    found = leaves(train_steps(start(kind), packed))
    expected = leaves(train_steps(start(kind), expand(packed)))
    assert all(close(x, y, 1e-4) for x, y in zip(found, expected, strict=True))
    assert not same(found, start(kind))


def test_recomputed_activations_give_the_same_gradient():
    def gradient(remat):
        def loss(adapter, decoder, batch):
            return next_token(adapter.repair(decoder), batch, remat=remat)[0]

        (batch,) = text().validation_batches(4)
        return jax.jit(jax.grad(loss))(start(), model(), batch)

    with jax.numpy_dtype_promotion("strict"):
        found, expected = leaves(gradient("layer"))[0], leaves(gradient("dots"))[0]
    assert close(found, expected, 1e-5 * np.abs(expected).max())


def test_a_checkpoint_of_another_form_is_refused(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(4, args=ocp.args.StandardSave({"leaf_0000": jnp.zeros(3)}))
        manager.wait_until_finished()
    with pytest.raises(ValueError, match="cannot go on from the checkpoint in .*--out"):
        run_fit(tmp_path)

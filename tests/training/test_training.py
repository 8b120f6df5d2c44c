"""Training changes the adapter alone, learns, and goes on after an interruption as if none was."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idp_jax.config import ConfigError, Data, Lora, Optimizer, Train
from idp_jax.data.stream import TrainingText
from idp_jax.jobs.folder import claim
from idp_jax.models.storage import expand
from idp_jax.recover import LoraAdapter, PrefixAdapter, SoftPrompt
from idp_jax.sharding import make_mesh, shard, shard_batch
from idp_jax.training import fit, loop, train
from idp_jax.training.step import (
    TrainState,
    evaluate_step,
    make_optimizer,
    make_train_step,
    token_loss,
)
from tests.helpers import close, quantize_decoder, tiny_decoder, tiny_folder

LENGTH = 16  # tokens of a window
KEY = jax.random.key(5)
RATE = Optimizer(learning_rate=0.05)


@pytest.fixture(scope="module", autouse=True)
def optax_promotes():
    """optax raises floats to int32 powers; our own code is traced strictly in the tests of it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module", autouse=True)
def one_compilation():
    """Runs of equal settings share their compiled step, which each would compile for itself."""
    made = {}

    def make(optimizer, *, remat):
        return make_train_step(optimizer, remat=remat)

    def optimizer_of(settings, rate, steps):
        return made.setdefault((settings, rate, steps), make_optimizer(settings, rate, steps))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_optimizer", optimizer_of)
        patch.setattr(loop, "make_train_step", functools.cache(make))
        yield


@functools.cache
def model():
    """A frozen model of one layer; training depends on nothing that more layers would add."""
    return tiny_decoder("llama", num_layers=1)


def text(seed: int = 0, rows: int = 24) -> TrainingText:
    """Windows of a few words over and over, which a prompt can learn to expect."""
    rng = np.random.default_rng(1)
    windows = rng.choice([7, 30, 55, 81], (rows, LENGTH)).astype(np.int32)
    return TrainingText("", None, LENGTH, windows[-4:], windows[:-4], 0, seed)


def settings(steps: int = 8, **changes) -> Train:
    """A run of some steps of two windows, validated every four."""
    data = Data(sequence_length=LENGTH)
    fields = {"method": "prompt", "batch_size": 2, "evaluate_every": 4, "data": data}
    tokens = steps * 2 * LENGTH
    return Train(model="m", out="out", **{**fields, "tokens": tokens, **changes})


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
    adapter, summary = fit(start(), model(), text(), settings(20, optimizer=RATE), folder)
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
    run = functools.partial(fit, start(), model(), text(), settings(20, optimizer=RATE), tmp_path)
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
    """What is learned here makes the held-out text less likely."""
    unlike = np.random.default_rng(9).integers(90, 128, (4, LENGTH)).astype(np.int32)
    # Of a model that forgets such text clearly.
    decoder = tiny_decoder("llama", num_layers=1, seed=2)
    other = dataclasses.replace(text(), validation=unlike)
    config = settings(20, optimizer=RATE)
    adapter, summary = fit(start(decoder=decoder), decoder, other, config, tmp_path)
    rows = [row for row in rows_of(tmp_path) if "validation_loss" in row]
    losses = [row["validation_loss"] for row in rows]
    assert losses[-1] > min(losses) + 0.1
    best = rows[int(np.argmin(losses))]
    assert summary["best_step"] == best["step"] < 20
    loss = evaluate_step(adapter, decoder, jnp.asarray(unlike[:2]))
    loss = (loss + evaluate_step(adapter, decoder, jnp.asarray(unlike[2:]))) / 2
    assert float(loss) == pytest.approx(best["validation_loss"], rel=1e-5)
    assert summary["validation_loss"] == pytest.approx(best["validation_loss"])


@functools.cache
def compiled(steps: int, rate: float):
    """An optimiser and its step, compiled once per kind of adapter and mesh."""
    optimizer = make_optimizer(Optimizer(), rate, steps)
    return optimizer, make_train_step(optimizer)


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
    return compiled(3, 1e-2)[1]._cache_size()


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
    config = settings(4, batch_size=4, tokens=4 * 4 * LENGTH, evaluate_every=2)
    with jax.set_mesh(mesh):
        run = functools.partial(
            fit, start("prefix"), shard(model(), mesh), text(), config, tmp_path, mesh=mesh
        )
        with pytest.raises(Interrupted):
            run(progress=stop_after(3))
        adapter, summary = run()
    alone, expected = fit(start("prefix"), model(), text(), config, tmp_path / "alone")
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
        loss = functools.partial(token_loss, remat=remat)
        batch = jnp.asarray(text().validation)
        return jax.jit(jax.grad(loss))(start(), model(), batch)

    with jax.numpy_dtype_promotion("strict"):
        found, expected = leaves(gradient(True))[0], leaves(gradient(False))[0]
    assert close(found, expected, 1e-5 * np.abs(expected).max())


# Whole runs, from a configuration to a folder.


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model's folder and a text of about 40 windows."""
    folder = tmp_path_factory.mktemp("files")
    tiny_folder(folder / "model", num_layers=1)
    words = np.random.default_rng(0).choice(["tide ", "ship ", "lamp "], 130)
    (folder / "text.txt").write_text("".join(words))
    return folder


def run_settings(files, out, **changes) -> Train:
    """A run of two steps."""
    data = Data(
        train=str(files / "text.txt"),
        sequence_length=LENGTH,
        validation_windows=2,
        **changes.pop("data", {}),
    )
    fields = {"model": str(files / "model"), "out": out, "batch_size": 2, "evaluate_every": 2}
    return Train(**{**fields, "tokens": 2 * 2 * LENGTH, "data": data, **changes})


def test_a_run_of_a_pool(files, tmp_path):
    config = run_settings(files, tmp_path / "run", method="idp", pool_lengths=(2, 5))
    result = train(config)
    assert result["extra_parameters"] == 7 * 64
    assert result["training_tokens"] == 2 * 2 * 2 * LENGTH
    assert len(result["prompts"]) == 2
    assert json.loads((tmp_path / "run" / "adapter" / "pool.json").read_text())["lengths"] == [2, 5]
    assert train(config) == result  # found complete
    with pytest.raises(ConfigError, match=r"holds a run with seed = 0, this one has 1; .*--out"):
        train(run_settings(files, tmp_path / "run", method="idp", pool_lengths=(2, 5), seed=1))


def test_claims(tmp_path):
    config = settings()
    claim(tmp_path / "run", config)
    claim(tmp_path / "run", config)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for taken in ("other", "other/file"):
        with pytest.raises(ConfigError, match="exists and holds no run"):
            claim(tmp_path / taken, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"validation": "/no/such.txt"}}, r"no text file /no/such\.txt"),
        ({"model": "/no/such/model"}, "no model at /no/such/model"),
        ({"selector": "best"}, "no selector 'best'"),
        ({"method": "lora", "lora": Lora(targets=("x",))}, "no matrix 'x'"),
        ({"prompt_length": 500}, "prompt length 500"),
    ],
)
def test_a_run_that_cannot_start_leaves_nothing(files, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(run_settings(files, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_text_that_is_too_short(files, tmp_path):
    (tmp_path / "short.txt").write_text("a" * (2 * LENGTH + 3))
    config = run_settings(files, tmp_path / "run")
    data = Data(train=str(tmp_path / "short.txt"), sequence_length=LENGTH, validation_windows=2)
    with pytest.raises(ValueError, match="gives 2 windows of 16 tokens, too few"):
        train(Train(**{**vars(config), "data": data}))
    assert not (tmp_path / "run").exists()

"""Whole runs of pools: jointly, by clusters, of prefixes; routers from the command line."""

import json
from dataclasses import replace
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax import load_adapter, load_model
from idp_jax.cli import main
from idp_jax.config import ConfigError, Data, Optimizer, Pool, Train
from idp_jax.data.stream import TrainingText
from idp_jax.evaluation import read
from idp_jax.evaluation.perplexity import perplexity
from idp_jax.recover.methods import METHODS
from idp_jax.recover.starts import Start
from idp_jax.training import train
from idp_jax.training.clusters import part_of
from tests.helpers import tiny_decoder, tiny_folder, tiny_tokenizer

LENGTH = 16  # tokens of a window
ALPHABETS = ("aeio", "stkz")
JOINT = Pool(training="joint")


pytestmark = pytest.mark.usefixtures("optax_promotes")


def two_sources(stretches: int, seed: int) -> str:
    """Text that is of the one alphabet, then of the other, by turns."""
    rng = np.random.default_rng(seed)
    draw = lambda letters: "".join(rng.choice(list(letters), 20 * LENGTH))
    return "".join(draw(ALPHABETS[number % 2]) for number in range(stretches))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model's folder, and texts of two sources."""
    folder = tmp_path_factory.mktemp("files")
    tiny_folder(folder / "model", num_layers=2)
    (folder / "text.txt").write_text(two_sources(12, 0))
    (folder / "held_out.txt").write_text(two_sources(4, 1))
    return folder


def run_settings(files, out, steps=2, **changes) -> Train:
    """A run of a pool of two."""
    data = Data(
        train=str(files / "text.txt"),
        validation=str(files / "held_out.txt"),
        sequence_length=LENGTH,
        validation_windows=32,
    )
    fields = {"model": str(files / "model"), "out": out, "batch_size": 8, "method": "idp"}
    fields |= {"evaluate_every": 100, "checkpoint_every": 1000, "pool_lengths": (4, 4)}
    return Train(**{**fields, "tokens": steps * 8 * LENGTH, "data": data, **changes})


def rows_of(source: int, seed: int = 2) -> np.ndarray:
    """Windows of one source, int32 [64, T]."""
    letters = tiny_tokenizer()(ALPHABETS[source], add_special_tokens=False)["input_ids"]
    return np.random.default_rng(seed).choice(letters, (64, LENGTH)).astype(np.int32)


@pytest.mark.slow
def test_a_trained_router_finds_the_source_and_beats_random(files, tmp_path, capsys):
    """Two sources, two prompts and a router trained through `train`, then from the command line."""
    config = run_settings(
        files,
        tmp_path / "run",
        steps=300,
        pool=JOINT,
        selector="linear_router",
        optimizer=Optimizer(learning_rate=0.03),
    )
    train(config)
    repaired = load_adapter(load_model(files / "model"), tmp_path / "run" / "adapter")
    choose = jax.jit(lambda repaired, ids: repaired.choose(ids))
    chosen = [np.asarray(choose(repaired, rows_of(source))) for source in (0, 1)]
    right = np.concatenate([chosen[0] == 0, chosen[1] == 1]).mean()
    assert max(right, 1 - right) > 0.9
    metrics = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"balance", "usage_entropy"} <= set(metrics[-2])

    call = ["eval", "--model", files / "model", "--adapter", tmp_path / "run" / "adapter"]
    call += ["--perplexity", files / "held_out.txt", "--sequence-length", LENGTH, "--windows", 64]
    call += [
        "--out",
        tmp_path / "r.json",
        "--selector",
        "linear_router",
        "random",
        "fixed(index=1)",
    ]
    main([str(word) for word in call])
    routed, drawn, one = (v.perplexity.mean_nll for v in read(tmp_path / "r.json").variants)
    assert routed < drawn - 0.1 and routed < one - 0.1


MINE = """
import jax
import jax.numpy as jnp
from flax import nnx

class Router(nnx.Module):
    def __init__(self, decoder, prompts, key):
        self.weight = nnx.Param(jax.random.normal(key, (decoder.config.embedding_dim, prompts)))

    def __call__(self, inputs):
        return inputs.mean_embedding() @ self.weight[...]

def score(inputs):
    queries, keys = inputs.queries.mean((0, 2, 3)), inputs.prompt_keys.mean((1, 2))
    return queries @ keys.T
"""


@pytest.mark.parametrize("name", ["Router", "score"])
def test_a_selector_of_ones_own_file_trains_jointly(files, tmp_path, name):
    """It trains, saves, loads and evaluates from the command line."""
    (tmp_path / "mine.py").write_text(MINE)
    selector = f"{tmp_path / 'mine.py'}:{name}"
    call = ["train", "--model", files / "model", "--out", tmp_path / "run", "--method", "idp"]
    call += ["--pool-lengths", 4, 6, "--selector", selector, "--pool.training", "joint"]
    call += ["--data.train", files / "text.txt", "--data.sequence-length", LENGTH]
    call += ["--data.validation-windows", 4, "--tokens", 4 * LENGTH, "--batch-size", 2]
    main([str(word) for word in call])
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "pool.json").read_text())["selector"] == selector
    assert (adapter / "selector.safetensors").is_file() == (name == "Router")
    repaired = load_adapter(load_model(files / "model"), adapter)
    assert repaired.choose(jnp.asarray(rows_of(0)[:4])).shape == (4,)
    call = ["eval", "--model", files / "model", "--adapter", adapter, "--selector", selector]
    call += ["--perplexity", files / "text.txt", "--sequence-length", LENGTH, "--windows", 2]
    main([str(word) for word in [*call, "--out", tmp_path / "r.json"]])
    assert read(tmp_path / "r.json").variants[0].selector == selector


def test_a_joint_run_is_one_run(files, tmp_path):
    config = run_settings(files, tmp_path / "run", pool=JOINT, pool_lengths=(2, 5, 3))
    result = train(config)
    assert result["training_tokens"] == 2 * 8 * LENGTH
    assert result["extra_parameters"] == 10 * 64
    assert train(config) == result
    assert json.loads((tmp_path / "run/adapter/pool.json").read_text())["lengths"] == [2, 5, 3]


@pytest.mark.parametrize("training", ["apart", "joint", "clusters"])
def test_prompts_of_one_length_begin_differently(files, tmp_path, training):
    config = run_settings(files, tmp_path / "run", pool=Pool(training=training))
    runs = METHODS["idp"].runs(config)
    keys = [jax.random.fold_in(jax.random.key(0), number) for number in range(len(runs))]
    made = [run.init(tiny_decoder(), Start(key)) for run, key in zip(runs, keys, strict=True)]
    prompts = made[0].prompts if training == "joint" else made
    first, second = (np.asarray(prompt.embeddings[...]) for prompt in prompts)
    assert not (first == second).all(-1).any()
    orders, clusters = [run.order for run in runs], [run.cluster for run in runs]
    assert (orders == [0, 1]) == (training == "apart")
    assert (clusters == [(0, 2), (1, 2)]) == (training == "clusters")


def test_a_text_has_several_orders_and_parts():
    windows = np.arange(40, dtype=np.int32).reshape(10, 4)
    text = TrainingText("", None, 4, windows[-2:], windows[:-2], 0, 0)
    epoch = lambda text, number: [int(row[0]) for row in islice(text.windows(), number)]
    assert epoch(text, 8) != epoch(replace(text, order=1), 8)
    assert sorted(epoch(replace(text, order=1), 8)) == sorted(epoch(text, 8))
    part = replace(text, chosen=np.array([1, 4, 6]))
    assert sorted(epoch(part, 3)) == [4, 16, 24] and sorted(epoch(part, 6)[3:]) == [4, 16, 24]
    assert len(text.first(100).tokens) == 8


@pytest.mark.slow
def test_clusters_of_the_text_are_the_sources(files, tmp_path):
    """Each prompt learns one source, so that the nearest texts choose it."""
    config = run_settings(
        files,
        tmp_path / "run",
        steps=60,
        pool=Pool(training="clusters"),
        selector="nearest_texts(texts=64)",
        optimizer=Optimizer(learning_rate=0.03),
    )
    train(config)
    repaired = load_adapter(load_model(files / "model"), tmp_path / "run" / "adapter")
    chosen = [np.asarray(repaired.choose(jnp.asarray(rows_of(source)))) for source in (0, 1)]
    right = np.concatenate([chosen[0] == 0, chosen[1] == 1]).mean()
    assert max(right, 1 - right) > 0.9
    windows = np.concatenate([rows_of(0), rows_of(1)])
    drawn = perplexity(repaired.with_selector("random"), windows, 16).mean_nll
    assert perplexity(repaired, windows, 16).mean_nll < drawn


def test_a_cluster_keeps_the_documents_of_its_windows():
    """Documents apart: what is validated on, too, has its own segments."""
    rows = np.repeat(np.arange(6, dtype=np.int32)[:, None] % 2 * 60 + 5, LENGTH, 1)
    segments = np.arange(6, dtype=np.int32)[:, None] + np.arange(LENGTH, dtype=np.int32) // 8
    text = TrainingText("", None, LENGTH, rows[:4], rows, 0, 0, segments[:4], segments)
    for number in (0, 1):
        part = part_of(text, tiny_decoder("llama", num_layers=1), (number, 2), 0)
        (row,) = {int(x) for x in part.validation[:, 0]}
        (batch,) = part.validation_batches(2)
        np.testing.assert_array_equal(batch.segments, segments[:4][rows[:4, 0] == row])


def test_a_calibrated_score_uses_every_prompt(files, tmp_path):
    """Also where the plain score takes the same prompt for all."""
    config = run_settings(
        files, tmp_path / "run", pool_lengths=(2, 9), selector="calibrated(score='mean_attention')"
    )
    train(config)
    repaired = load_adapter(load_model(files / "model"), tmp_path / "run" / "adapter")
    windows = jnp.asarray(np.concatenate([rows_of(0), rows_of(1)]))
    counts = np.bincount(np.asarray(repaired.choose(windows)), minlength=2)
    assert counts.min() > 10
    scores = repaired.scores(windows)
    assert np.abs(np.asarray(scores)).max() < 10


def test_a_pool_of_prefixes(files, tmp_path):
    pool = Pool(training="joint", of="prefixes")
    config = run_settings(files, tmp_path / "run", pool=pool, selector="linear_router")
    assert train(config)["extra_parameters"] == 2 * 4 * 2 * 2 * 32 + 2 * 65
    model = load_model(files / "model")
    adapter = tmp_path / "run" / "adapter"
    settings = json.loads((adapter / "prompt_0_4_tokens" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "PREFIX_TUNING"
    repaired, ids = load_adapter(model, adapter), jnp.asarray(rows_of(0)[:4])
    choice = int(repaired.choose(ids)[0])
    alone = load_adapter(model, adapter / f"prompt_{choice}_4_tokens")
    np.testing.assert_allclose(repaired(ids)[0], alone(ids)[0], atol=2e-5)


def flat(inputs):
    """No selector: one number a row."""
    return inputs.real.sum(-1)


def boom(inputs):
    """No selector: it asks for what there is not."""
    return inputs.best


REFUSED = {
    "apart": ({"selector": "linear_router"}, "has parameters.*give --pool.training joint"),
    "fitted": (
        {"selector": "nearest_texts", "pool": JOINT},
        "follows from prompts that are trained; give --pool.training apart",
    ),
    "soft": (
        {"pool": Pool(training="joint", mixture="soft"), "pool_lengths": (2, 3)},
        "give equal lengths, or --pool.mixture gumbel",
    ),
    "distractors": (
        {"pool": Pool(training="joint", distractors=2)},
        "2 are not fewer than the 2 prompts",
    ),
    "prefixes": (
        {"pool": Pool(training="joint", of="prefixes"), "pool_lengths": (2, 3)},
        "must have one length",
    ),
    "layer": ({"selector": "mlp_router(layer=2)", "pool": JOINT}, "layer 2 is none of the"),
    "unknown": ({"selector": "best", "pool": JOINT}, "no selector 'best'"),
    "index": ({"selector": "fixed(index=2)"}, "index=2.: the pool has 2 prompts"),
    "shape": ({"selector": f"{__name__}:flat"}, "flat gives scores .*must give"),
    "fails": ({"selector": f"{__name__}:boom"}, "boom fails on an input: AttributeError: .*best"),
    "fails-jointly": ({"selector": f"{__name__}:boom", "pool": JOINT}, "fails on an input"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_pool_that_cannot_be_trained_leaves_nothing(files, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(run_settings(files, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_more_clusters_than_windows_differ_are_refused(files, tmp_path):
    (tmp_path / "model").symlink_to(files / "model")
    (tmp_path / "text.txt").write_text("aaaaaaaaaaaaaaaa" * 20)
    (tmp_path / "held_out.txt").symlink_to(files / "held_out.txt")
    settings = Pool(training="clusters")
    config = run_settings(tmp_path, tmp_path / "run", pool=settings, pool_lengths=(2,) * 9)
    with pytest.raises(ConfigError, match="do not fall into 9 clusters; give more text"):
        train(config)

"""Whole runs, from a configuration to a folder: claimed, trained, found complete, refused."""

import json
from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax import load_adapter, load_model
from idp_jax.config import ConfigError, Data, Lora, Mesh, Optimizer, Pool, Train
from idp_jax.evaluation.perplexity import perplexity
from idp_jax.formats import load_tokenizer
from idp_jax.jobs.folder import claim
from idp_jax.jobs.progress import Progress
from idp_jax.jobs.signals import Interrupted
from idp_jax.training import run, train
from tests.helpers import tiny_folder

LENGTH = 16  # tokens of a window


pytestmark = pytest.mark.usefixtures("optax_promotes")


def run_settings(files, out, **changes) -> Train:
    """A run of two steps."""
    text = {"train": str(files / "text.txt"), "sequence_length": LENGTH, "validation_windows": 2}
    data = Data(**{**text, **changes.pop("data", {})})
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


MINE = """
def by_length(inputs):
    length = inputs.prompt_mask.sum(-1).astype("float32")
    return -abs(inputs.real.sum(-1)[:, None].astype("float32") - length)
"""


def test_a_selector_of_ones_own_file_is_trained_saved_and_evaluated(files, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    selector = f"{tmp_path / 'mine.py'}:by_length"
    config = run_settings(
        files, tmp_path / "run", method="idp", pool_lengths=(2, 9), selector=selector
    )
    train(config)
    decoder = load_model(files / "model")
    repaired = load_adapter(decoder, tmp_path / "run" / "adapter")
    ids, mask = np.full((2, 8), 70), np.ones((2, 8), int)
    mask[0, :5] = 0
    assert repaired.choose(jnp.asarray(ids), jnp.asarray(mask)).tolist() == [0, 1]
    windows = np.random.default_rng(0).integers(3, 259, (4, LENGTH)).astype(np.int32)
    assert perplexity(repaired, windows, 2).tokens == 4 * (LENGTH - 1)


def test_a_run_on_documents_apart(files, tmp_path):
    """Its validation loss is that of the held-out documents, each by itself."""
    rng = np.random.default_rng(0)
    words = [rng.choice(["tide ", "ship ", "lamp "], n) for n in rng.integers(1, 6, 60)]
    texts = ["".join(chosen).strip() for chosen in words]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "text.jsonl").write_text(lines)
    data = {"train": str(tmp_path / "text.jsonl"), "documents": "apart"}
    config = run_settings(files, tmp_path / "run", prompt_length=3, data=data)
    result = train(config)
    decoder = load_model(files / "model")
    repaired = load_adapter(decoder, tmp_path / "run" / "adapter")
    document = [number for number, text in enumerate(texts) for _ in text.encode()]
    tokenizer = load_tokenizer(files / "model")
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    windows, losses = len(ids) // LENGTH, []
    for start in ((windows - 2) * LENGTH, (windows - 1) * LENGTH):
        part, owner = ids[start : start + LENGTH], document[start : start + LENGTH]
        for number in set(owner):
            alone = np.asarray([[i for i, d in zip(part, owner, strict=True) if d == number]])
            likelihood = np.asarray(jax.nn.log_softmax(repaired(alone)))[0, :-1]
            losses += (-likelihood[np.arange(alone.size - 1), alone[0, 1:]]).tolist()
    assert result["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    with pytest.raises(ConfigError, match="data.documents = 'apart', this one"):
        train(replace(config, data=replace(config.data, documents="joined")))


def test_documents_apart_go_with_no_choice_for_a_row(files, tmp_path):
    data = {"documents": "apart"}
    with pytest.raises(ConfigError, match="documents apart goes with no joint training"):
        run_settings(files, tmp_path, method="idp", pool=Pool(training="joint"), data=data)


def test_a_selector_with_parameters_needs_joint_training(files, tmp_path):
    config = run_settings(files, tmp_path / "run", method="idp", selector="linear_router")
    with pytest.raises(ValueError, match="linear_router has parameters"):
        train(config)


def test_claims(tmp_path):
    config = Train(model="m", out="out")
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


def test_what_is_measured_and_kept_may_change(files, tmp_path):
    """Not what is trained: that is refused, with the reason where it is not plain."""
    out = tmp_path / "run"
    train(run_settings(files, out))
    (out / "result.json").unlink()
    changes = {"evaluate_every": 1, "checkpoint_every": 7, "mesh": Mesh(data=2, model=4)}
    assert train(run_settings(files, out, **changes))["training_tokens"] == 4 * LENGTH
    reason = r"holds a run with tokens = 64, this one has 128 \(the learning rate falls"
    with pytest.raises(ConfigError, match=reason):
        train(run_settings(files, out, tokens=8 * LENGTH))
    with pytest.raises(ConfigError, match="holds a run with prompt_length = 50, this one has 3"):
        train(run_settings(files, out, prompt_length=3))


def test_a_run_at_a_constant_rate_can_be_extended(files, tmp_path):
    constant = Optimizer(schedule="constant")
    losses = {}
    for name, budgets in {"whole": (6,), "extended": (2, 6)}.items():
        for steps in budgets:
            tokens = steps * 2 * LENGTH
            changes = {"optimizer": constant, "evaluate_every": 2, "tokens": tokens}
            result = train(run_settings(files, tmp_path / name, **changes))
            assert result["training_tokens"] == tokens
        losses[name] = (tmp_path / name / "metrics.jsonl").read_text()
    assert losses["whole"] == losses["extended"]


def test_text_of_its_own_does_not_depend_on_interruptions(files, tmp_path):
    model = tiny_folder(tmp_path / "model", num_layers=1, max_positions=64)

    def own(out):
        data = Data(train="self", sequence_length=LENGTH, validation_windows=2)
        tokens = 150 * 2 * LENGTH
        return Train(model=str(model), out=out, tokens=tokens, data=data, evaluate_every=99)

    class Stops(Progress):
        @contextmanager
        def bar(self, description, unit=""):
            def update(done, total, note=""):
                if done > 1000 and "sampling" in description:
                    raise Interrupted(15)

            yield update

    said = []
    whole = train(own(tmp_path / "whole"), say=said.append)
    with pytest.raises(Interrupted):
        train(own(tmp_path / "other"), progress=Stops())
    assert (tmp_path / "other" / "self_text.partial.jsonl").stat().st_size
    assert not (tmp_path / "other" / "self_text.jsonl").exists()
    again = train(own(tmp_path / "other"))
    assert again["validation_loss"] == whole["validation_loss"]
    texts = [tmp_path / name / "self_text.jsonl" for name in ("whole", "other")]
    assert texts[0].read_bytes() == texts[1].read_bytes()
    assert not (tmp_path / "other" / "self_text.partial.jsonl").exists()
    assert said[0].startswith(
        "training prompt of 50 (3,200 parameters): 150 steps of 2 x 16 tokens"
    )
    assert said[0].endswith(f"4,800 tokens in all, of text that {tmp_path / 'model'} itself writes")
    assert said[-1].startswith("training prompt of 50: about 0:00:0")
    with pytest.raises(ConfigError, match=r"tokens = .* \(a longer run is written another text\)"):
        train(replace(own(tmp_path / "other"), tokens=10**4))


@pytest.mark.parametrize("change", ["another", "cut", "digest"])
def test_text_of_its_own_that_was_changed_is_not_trained_on(files, tmp_path, change):
    model, out = tiny_folder(tmp_path / "model", num_layers=1, max_positions=64), tmp_path / "run"
    data = Data(train="self", sequence_length=LENGTH, validation_windows=2)
    run = Train(model=str(model), out=out, tokens=4 * LENGTH, data=data, prompt_length=4)
    whole = train(run)
    text, kept = out / "self_text.jsonl", (out / "self_text.jsonl").read_bytes()
    (out / "result.json").unlink()
    if change == "digest":
        (out / "self_text.digest.json").unlink()
    else:
        text.write_bytes(kept[:-20] if change == "cut" else kept.replace(b"a", b"b"))
    with pytest.raises(ConfigError, match=r"(?s)remove .*self_text\.jsonl, and the same command"):
        train(run)
    text.unlink()
    assert train(run)["validation_loss"] == whole["validation_loss"]
    assert text.read_bytes() == kept


def test_a_result_is_json_whatever_the_loss(files, tmp_path, monkeypatch):
    def fit(start, *args, keep_last, **options):
        keep_last(start)
        return start, dict(SUMMARY)

    monkeypatch.setattr(run, "fit", fit)
    result = train(run_settings(files, tmp_path / "run"))
    assert result["validation_perplexity"] == float("inf")
    text = (tmp_path / "run" / "result.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["validation_perplexity"] is None


SUMMARY = {
    "validation_loss": 900.0,
    "validation_perplexity": float("inf"),
    "best_step": 0,
    "last_step": 2,
    "stopped_early": False,
}


def test_a_text_that_is_too_short(files, tmp_path):
    (tmp_path / "short.txt").write_text("a" * (2 * LENGTH + 3))
    config = run_settings(files, tmp_path / "run")
    data = Data(train=str(tmp_path / "short.txt"), sequence_length=LENGTH, validation_windows=2)
    with pytest.raises(ValueError, match="gives 2 windows of 16 tokens, too few"):
        train(Train(**{**vars(config), "data": data}))
    assert not (tmp_path / "run").exists()

"""Runs begin as the settings say: which text, whose keys and values, and without a single step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax import load_adapter, load_model
from idp_jax.config import ConfigError, Init, Prefix, Teacher
from idp_jax.data.stream import TrainingText
from idp_jax.evaluation.perplexity import perplexity
from idp_jax.formats import load_tokenizer
from idp_jax.formats.adapters import read_adapter
from idp_jax.recover import Pool, SoftPrompt
from idp_jax.recover.methods import Run
from idp_jax.training import train
from idp_jax.training.starts import abstract_start, resolved, starts, text_parts
from tests.helpers import close, keep, tiny_decoder, tiny_folder, tiny_ids
from tests.training.test_run import LENGTH, run_settings

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("optax_promotes")


def in_bytes(text: str) -> list[int]:
    """The tokens of a text in the tests' tokenizer, one for each byte."""
    from tests.helpers import tiny_tokenizer

    return tiny_tokenizer()(text)["input_ids"]


def parts(files, lengths, *, bos: bool = False, source: str = "text.txt", **init):
    """Tokens of each start."""
    tokenizer = load_tokenizer(files / "model")
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    config = run_settings(files, files / "none", init=Init(tokens="text", **init))
    windows = np.zeros((4, LENGTH), np.int32)
    text = TrainingText(str(files / source), tokenizer, LENGTH, windows, windows, 0, 0)
    found = text_parts(config, lengths, tokenizer, text)
    return [np.asarray(x).tolist() for x in found]


@pytest.mark.parametrize(
    ("bos", "lengths", "init", "expected"),
    [
        (False, [5], {"text": "abc"}, [in_bytes("abcab")]),
        (True, [5], {"text": "abc"}, [[1, *in_bytes("abca")]]),
        (False, [2], {"text": "abc"}, [in_bytes("ab")]),
        (True, [1], {"text": "abc"}, [[1]]),
        (True, [1], {"text": ""}, [[1]]),
        (False, [1], {"text": ""}, [[1]]),
        (True, [1], {"text": "<s>"}, [[1]]),
        (False, [1], {"text": "<s>"}, [[1]]),
        (False, [2, 3], {"text": "abcdef"}, [in_bytes("ab"), in_bytes("cde")]),
        (True, [2, 3], {"text": "abcdef"}, [[1, *in_bytes("a")], [1, *in_bytes("bc")]]),
        (False, [], {}, []),
    ],
)
def test_text_is_cut_and_repeated_by_the_rule(files, bos, lengths, init, expected):
    assert parts(files, lengths, bos=bos, **init) == expected


def test_text_comes_from_a_file_or_is_the_first_of_the_training_text(files):
    (files / "start.txt").write_text("once upon a time")
    assert parts(files, [4], file=files / "start.txt") == [in_bytes("once")]
    words = (files / "text.txt").read_text()
    assert parts(files, [7]) == [in_bytes(words[:7])]
    assert parts(files, [7], bos=True) == [[1, *in_bytes(words[:6])]]


def test_prompts_of_a_pool_do_not_begin_alike(files):
    with pytest.raises(ConfigError, match=r"has 3 tokens, too few for 4; give more"):
        parts(files, [2, 2], text="abc")
    with pytest.raises(ConfigError, match=r"has 0 tokens, too few for 1"):
        parts(files, [2], text="")


def test_without_a_step_the_start_is_the_adapter(files, tmp_path):
    """With the dense model's keys and values of one token it is IntactKV, from the command line."""
    tiny_folder(tmp_path / "dense", num_layers=1, seed=5)
    config = run_settings(
        files,
        tmp_path / "run",
        method="prefix",
        prompt_length=1,
        tokens=0,
        init=Init(tokens="text", text="<s>", model="teacher", frozen_tokens=1),
        teacher=Teacher(model=str(tmp_path / "dense")),
    )
    result = train(config)
    assert (result["training_tokens"], result["best_step"]) == (0, 0)
    assert train(config) == result
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0]
    model, dense = load_model(files / "model"), load_model(tmp_path / "dense")
    ids = tiny_ids(model)
    _, pivot = keep(dense, jnp.full((2, 1), 1, jnp.int32))
    found = load_adapter(model, tmp_path / "run" / "adapter")(ids)
    assert close(found, model(ids, past=pivot), 1e-5)


def test_a_run_keeps_its_frozen_tokens(files, tmp_path):
    config = run_settings(
        files,
        tmp_path / "run",
        method="prefix",
        prompt_length=4,
        init=Init(tokens="text", text="ahoy", frozen_tokens=2),
    )
    result = train(config)
    assert result["extra_parameters"] == 2 * 2 * 32
    model = load_model(files / "model")
    _, kv = keep(model, jnp.asarray([in_bytes("ahoy")], jnp.int32))
    found = load_adapter(model, tmp_path / "run" / "adapter").prefix
    assert (found.k[:, :, :2] == kv.k[:, :, :2]).all() and close(found.k, kv.k, 1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": Init(tokens="text", file="/no/such.txt")}, r"no text file /no/such\.txt"),
        (
            {
                "method": "prefix",
                "init": Init(model="teacher"),
                "teacher": Teacher(model="/no/such/model"),
            },
            "no model at /no/such/model",
        ),
    ],
)
def test_a_start_that_cannot_be_had_leaves_nothing(files, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(run_settings(files, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_lengths_by_damage_come_from_the_models_report(files, tmp_path):
    model = tiny_folder(tmp_path / "model", num_layers=3)
    rows = [(0, 0.0), (0, 0.0), (1, 0.1), (1, 0.3), (2, 0.6), (2, 0.6)]
    report = {"matrices": [{"layer": n, "relative_error": error} for n, error in rows]}
    (model / "compression.json").write_text(json.dumps(report))
    changes = {"method": "prefix", "prompt_length": 4, "prefix": Prefix(by_damage=True)}
    config = run_settings(files, tmp_path / "run", model=str(model), **changes)
    assert resolved(config).prefix == Prefix(lengths=(0, 3, 9))
    result = train(config)
    assert result["extra_parameters"] == 12 * 2 * 32
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["layer_lengths"] == [0, 3, 9]
    repaired = load_adapter(load_model(model), tmp_path / "run" / "adapter")
    windows = np.random.default_rng(0).integers(3, 259, (4, LENGTH)).astype(np.int32)
    assert perplexity(repaired, windows, 2).tokens == 4 * (LENGTH - 1)
    (model / "compression.json").unlink()
    with pytest.raises(ConfigError, match=r"needs .*compression\.json, the report of a compress"):
        resolved(config)
    for report, message in (
        ({"matrices": [{"layer": 0}]}, r"compression\.json has no relative_error"),
        ({"matrices": rows[:2]}, r"compression\.json has no relative_error"),
        ({"matrices": []}, "no lengths follow"),
    ):
        (model / "compression.json").write_text(json.dumps(report))
        with pytest.raises(ValueError, match=message):
            resolved(config)


def test_the_prompts_of_a_pool_begin_as_their_parts_of_the_text(files, tmp_path):
    config = run_settings(
        files,
        tmp_path / "run",
        method="idp",
        pool_lengths=(2, 3),
        tokens=0,
        init=Init(tokens="text", text="sailor"),
    )
    assert [part["best_step"] for part in train(config)["prompts"]] == [0, 0]
    model = load_model(files / "model")
    pool = read_adapter(model, tmp_path / "run" / "adapter")
    assert isinstance(pool, Pool)
    table = np.asarray(model.embedding[...])
    for prompt, words in zip(pool.prompts, ("sa", "ilo"), strict=True):
        assert (np.asarray(prompt.embeddings[...]) == table[in_bytes(words)]).all()


def test_runs_are_brought_what_they_ask_for(files):
    tokenizer = load_tokenizer(files / "model")
    config = run_settings(files, files / "none", init=Init(tokens="text", text="abcdef"))
    windows = np.arange(4 * LENGTH, dtype=np.int32).reshape(4, LENGTH)
    text = TrainingText(str(files / "text.txt"), tokenizer, LENGTH, windows, windows, 0, 0)
    run = Run("", "", lambda decoder, start: SoftPrompt(jnp.zeros((1, 64))))
    runs = [run._replace(text=(1, 2)), run._replace(windows=3, teacher=True), run]
    asked = []

    def teacher():
        asked.append(1)
        return tiny_decoder("llama", num_layers=1)

    both, taught, nothing = starts(config, runs, [KEY] * 3, tokenizer, text, teacher)
    assert [x.tolist() for x in both.text] == [in_bytes("a"), in_bytes("bc")]
    assert both.teacher is None and both.windows is None and len(asked) == 1
    assert (
        taught.teacher is not None
        and taught.windows.shape == (3, LENGTH)
        and taught.segments is None
    )
    assert (nothing.text, nothing.teacher, nothing.windows) == ((), None, None)
    shapes = abstract_start(config, runs[0])
    assert [x.shape for x in shapes.text] == [(1,), (2,)]

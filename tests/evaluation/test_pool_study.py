"""`pool-study`: utilities are those of `eval`, choices those of the pool, and stops are made up."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax import load_adapter
from idp_jax.cli import main
from idp_jax.config import ConfigError, Evaluate, PoolStudy
from idp_jax.evaluation import cost, pool_results, pool_runs, read
from idp_jax.evaluation import selection_statistics as selection
from idp_jax.evaluation.job import score
from idp_jax.evaluation.pool_study import default_selectors, study
from idp_jax.evaluation.statistics import paired_difference
from idp_jax.formats import load_model, save_adapter
from idp_jax.recover import Pool, Repaired, SoftPrompt
from tests.evaluation.test_journal import StopAfter, Stopped
from tests.helpers import tiny_decoder, tiny_folder, tiny_ids

pytestmark = pytest.mark.slow
OWN = """
import jax.numpy as jnp

def score(inputs):
    return jnp.broadcast_to(jnp.arange(3.0), (inputs.real.shape[0], 3))
"""


@pytest.fixture(scope="module", autouse=True)
def few():
    """A tenth of the resamples: what they are is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "RESAMPLES", 1000)
        patch.setattr(selection, "SHUFFLES", 199)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, a pool of three prompts for it, one prompt of the summed length, a text."""
    folder = tmp_path_factory.mktemp("files")
    tiny_folder(folder / "model", max_positions=512)
    model = load_model(folder / "model")
    prompts = [SoftPrompt.init(model, 4, jax.random.key(n)) for n in range(3)]
    save_adapter(Pool(prompts), folder / "pool", decoder=model)
    long = SoftPrompt.init(model, 12, jax.random.key(9))
    save_adapter(long, folder / "long", decoder=model)
    words = np.random.default_rng(0).choice(["tide ", "ship ", "lamp ", "storm. "], 400)
    (folder / "text.txt").write_text("".join(words))
    (folder / "mine.py").write_text(OWN)
    return folder


def settings(files, out, **changes) -> PoolStudy:
    """Six windows and some questions."""
    common = {"model": str(files / "model"), "adapter": files / "pool", "out": out}
    common |= {"perplexity": files / "text.txt", "sequence_length": 33, "windows": 6}
    common |= {"tasks": "knowledge_arts,knowledge_capitals", "limit": 4, "batch_size": 4}
    return PoolStudy(**{**common, "selector": ("mean_attention", "sum_attention"), **changes})


@pytest.fixture(scope="module")
def found(files, few, tmp_path_factory):
    """The whole study, with the control of the summed length and a selector of one's own file."""
    out = tmp_path_factory.mktemp("study") / "study.json"
    mine = f"{files / 'mine.py'}:score"
    asked = settings(files, out, baseline=(files / "long",), selector=("sum_attention", mine))
    result = study(asked)
    stored = pool_results.read(out)
    assert stored.measures == result.measures and stored.costs == result.costs
    assert [path.name for path in out.parent.iterdir()] == ["study.json"]
    return result


def measured(files, tmp_path, **changes):
    """The same items by `eval`."""
    common = settings(files, tmp_path / "r.json")
    names = ("model", "perplexity", "sequence_length", "windows", "tasks", "limit", "batch_size")
    same = {name: getattr(common, name) for name in names}
    return score(Evaluate(**same, out=tmp_path / "r.json", **changes)).variants


def test_utilities_are_those_of_eval(files, found, tmp_path):
    names = [f"fixed(index={n})" for n in range(3)] + ["sum_attention"]
    variants = measured(files, tmp_path, adapter=files / "pool", selector=tuple(names))
    tasks = ("knowledge_arts", "knowledge_capitals")
    right = lambda row: [x for task in tasks for x in row.tasks[task].samples["acc"]]
    text, accuracy = found.measure("text"), found.measure("accuracy")
    np.testing.assert_array_equal(
        accuracy.utilities, np.stack([right(row) for row in variants[:3]], 1)
    )
    losses = np.stack([row.perplexity.per_window_nll for row in variants[:3]], 1)
    np.testing.assert_allclose(text.utilities, -losses, rtol=1e-5)
    chosen = variants[3]
    prompts = [item[0] for task in tasks for item in chosen.tasks[task].prompts]
    assert accuracy.policy("sum_attention").choices == prompts
    assert accuracy.policy("sum_attention").values == right(chosen)
    np.testing.assert_allclose(
        text.policy("sum_attention").values,
        -np.asarray(chosen.perplexity.per_window_nll),
        rtol=1e-5,
    )


def test_baselines_and_the_bare_model_are_those_of_eval(files, found, tmp_path):
    for name, adapter in (("no prompt", None), (str(files / "long"), files / "long")):
        (row,) = measured(files, tmp_path / name.replace("/", ""), adapter=adapter)
        text = found.measure("text").policy(name)
        np.testing.assert_allclose(
            text.values, -np.asarray(row.perplexity.per_window_nll), rtol=1e-5
        )
        assert text.choices is None and text.kind == "other"


def test_margins_are_above_0_where_the_answer_is_right(found):
    margin, accuracy = (np.asarray(found.measure(n).utilities) for n in ("margin", "accuracy"))
    np.testing.assert_array_equal(margin > 0, accuracy == 1)
    assert 0 <= found.measure("accuracy").policy("ensemble").mean.value <= 1


def test_policies_are_held_against_the_same_references(found):
    for measure in found.measures:
        utilities = np.asarray(measure.utilities)
        random, oracle = measure.policy("random"), measure.policy("oracle")
        assert random.gain.value == 0 and oracle.regret.value == 0
        assert random.mean.value == pytest.approx(utilities.mean())
        assert oracle.mean.value == pytest.approx(utilities.max(1).mean())
        assert oracle.gain.value == pytest.approx(measure.oracle.gain)
        assert len(measure.random_draws) == 10
        for policy in measure.policies:
            assert policy.gain.value + policy.regret.value == pytest.approx(oracle.gain.value)
            assert len(policy.bins) == len(measure.bins)
            if policy.choices is not None:
                picked = utilities[np.arange(measure.items), policy.choices]
                assert policy.values == picked.tolist()
    names = [policy.name for policy in found.measure("text").policies]
    assert names[:5] == ["random", "best fixed", "prompt 0", "prompt 1", "prompt 2"]
    assert names[5:8] == ["own: mean_attention", "sum_attention", names[7]]
    assert names[7].endswith("mine.py:score")
    assert found.measure("margin").policy(names[7]).usage.counts == [0, 0, 8]
    assert found.measure("margin").policy(names[7]).correlation.tied_scores == 0


def test_the_transferable_oracle_chooses_from_the_first_half(files, found):
    pool = load_adapter(load_model(files / "model"), files / "pool")
    from idp_jax import load_tokenizer
    from idp_jax.evaluation.perplexity import windows_from_text

    text = (files / "text.txt").read_text()
    windows = windows_from_text(load_tokenizer(files / "model"), text, 33, 6)
    logprobs = np.stack(
        [
            np.asarray(jax.nn.log_softmax(pool_runs.single(pool, n)(jnp.asarray(windows))[:, :-1]))
            for n in range(3)
        ],
        1,
    ).astype(np.float64)
    taken = np.take_along_axis(logprobs, windows[:, None, 1:, None], -1)[..., 0]  # [N, M, 32]
    continuation = found.measure("continuation")
    best = continuation.policy("best on first half")
    assert best.choices == taken[..., :16].sum(-1).argmax(1).tolist()
    np.testing.assert_allclose(continuation.utilities, taken[..., 16:].mean(-1), rtol=1e-5)
    mixed = np.log(np.exp(taken).mean(1))
    ensemble = found.measure("text").policy("ensemble").values
    np.testing.assert_allclose(ensemble, mixed.mean(-1), rtol=1e-5)
    own = continuation.policy("own: mean_attention").choices
    assert own == np.asarray(pool.choose(jnp.asarray(windows[:, :17]))).tolist()


def test_scores_do_not_depend_on_the_batch(files):
    pool = load_adapter(load_model(files / "model"), files / "pool")
    rng = np.random.default_rng(1)
    inputs = [rng.integers(3, 259, size).tolist() for size in (3, 40, 12, 5, 33)]
    found = pool_runs.score_inputs(pool, inputs, 2)
    for row, scores in zip(inputs, found, strict=True):
        alone = np.asarray(pool.scores(jnp.asarray([row])))[0]
        np.testing.assert_allclose(scores, alone, rtol=1e-5)
    lost = lambda inputs: jnp.full((inputs.real.shape[0], 3), jnp.nan)
    with pytest.raises(ValueError, match="selector mine gives scores that are no numbers"):
        pool_runs.score_inputs(pool.with_selector(lost), inputs, 2, "mine")


def test_a_stopped_study_goes_on(files, tmp_path, monkeypatch):
    few = {"windows": 3, "batch_size": 1, "tasks": "knowledge_arts", "limit": 2}
    whole = study(settings(files, tmp_path / "whole.json", **few)).measures
    out, lines = tmp_path / "r.json", 0
    kept = tmp_path / "r.json.scored.jsonl"
    for updates in (2, 9):
        with pytest.raises(Stopped):
            study(settings(files, out, **few), progress=StopAfter(updates))
        assert len(kept.read_text().splitlines()) > lines and not out.exists()
        lines = len(kept.read_text().splitlines())
    reads, logprobs = [], pool_runs._token_logprobs
    counted = lambda *args: reads.append(1) or logprobs(*args)
    monkeypatch.setattr(pool_runs, "_token_logprobs", counted)
    assert study(settings(files, out, **few)).measures == whole
    assert len(reads) < 3 * 4 and not kept.exists()  # of 3 windows under 3 prompts and none


def test_the_command_prints_writes_and_draws(files, tmp_path, capsys):
    out = tmp_path / "study.json"
    call = ["pool-study", "--model", files / "model", "--adapter", files / "pool", "--out", out]
    call += ["--perplexity", files / "text.txt", "--sequence-length", 32, "--windows", 3]
    call = [str(word) for word in call]
    main([*call, "--selector", "sum_attention"])
    said = capsys.readouterr().err
    assert "continuation: the oracle gains" in said and "of parameters" in said
    continuation = pool_results.read(out).measure("continuation")
    assert continuation.policy("best on first half").usage is not None
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit):
        main(call)
    assert "exists; give another --out, or --overwrite" in capsys.readouterr().err
    out.rename(tmp_path / "moved.json")  # the figure of another study stays, too
    with pytest.raises(SystemExit):
        main(call)
    assert "study.png exists; give another --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # and without the study beside it, it is anybody's
        main([*call, "--overwrite"])
    assert "study.png exists; give another --out" in capsys.readouterr().err
    out.write_text(json.dumps({"schema": "idp-jax.results/1"}))
    with pytest.raises(SystemExit):
        main([*call, "--overwrite"])
    assert "holds no results, so it is not replaced" in capsys.readouterr().err


def test_what_cannot_be_studied_is_said_in_one_line(files, tmp_path):
    out = tmp_path / "r.json"
    with pytest.raises(ConfigError, match="nothing to study: give --tasks"):
        settings(files, out, tasks="", perplexity=None)
    with pytest.raises(ConfigError, match=r"study.png is the figure's name"):
        settings(files, tmp_path / "study.png")
    with pytest.raises(ConfigError, match="--selector names one twice: first first"):
        settings(files, out, selector=("first", "first"))
    with pytest.raises(ConfigError, match=r"--adapter .*long is no pool of two prompts"):
        study(settings(files, out, adapter=files / "long"))
    with pytest.raises(ConfigError, match="--sequence-length 3 leaves no two halves"):
        study(settings(files, out, sequence_length=3))
    with pytest.raises(ValueError, match="no selector 'best'"):
        study(settings(files, out, selector=("best",)))
    study(settings(files, out, windows=2, tasks=""))
    with pytest.raises(ConfigError, match=r"idp-jax\.pool-study/1.* is not idp-jax\.results/1"):
        read(out)
    assert {"random", "first", "fixed"}.isdisjoint(default_selectors())
    assert "mean_attention" in default_selectors()


def test_lengths_fall_into_bins_of_about_equal_size():
    names, members = pool_results.length_bins([5, 6, 7, 8, 9, 10, 11, 30])
    assert names == ["5-6 tokens", "7-8 tokens", "9-10 tokens", "11-30 tokens"]
    assert members.sum(0).tolist() == [2, 2, 2, 2] and (members.sum(1) == 1).all()
    names, members = pool_results.length_bins([4, 4, 4])
    assert names == ["4-4 tokens"] and members.all()


def test_intervals_are_those_of_paired_differences():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(2, 300))
    ours, other = selection.mean_estimate(second - first), paired_difference(first, second)
    assert ours.value == pytest.approx(other.value)
    assert (ours.low, ours.high) == pytest.approx((other.low, other.high), abs=0.02)


def test_multiplications_are_counted_through_loops():
    model = tiny_decoder("llama", num_layers=3)
    ids, config = tiny_ids(model, batch=2, time=12), model.config
    width, heads = config.hidden_dim, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    projections = 2 * width * heads + 2 * width * kv + 3 * width * config.ffw_dim
    attention = 2 * 12 * heads
    expected = 3 * 2 * 12 * (projections + attention)
    found = cost.multiplications(lambda ids: model.hidden(ids), ids)
    assert found == pytest.approx(expected, rel=0.02)
    loop = lambda x: jax.lax.fori_loop(0, 5, lambda _, y: y @ y, x)
    assert cost.multiplications(loop, jnp.ones((4, 4))) == 5 * 64
    assert cost.median_ms(jnp.sin, jnp.ones(3), repeats=3) > 0


def test_costs_are_shares_of_a_pass(found):
    costs = found.costs
    assert set(costs) == {
        p.name for p in found.measure("accuracy").policies if p.kind == "selector"
    }
    assert 0 < costs["sum_attention"].passes < 1.5 and costs["sum_attention"].bytes == 0
    assert found.prompt_lengths == [4, 4, 4] and found.cache_bytes > 2 * 2 * 3 * 4 * 32 * 4
    assert dataclasses.is_dataclass(found) and isinstance(Repaired, type)

"""`eval`: one load, as many variants as selectors, the same scores on a mesh."""

import jax
import numpy as np
import pytest

from idp_jax.cli import main
from idp_jax.config import ConfigError, Evaluate, Mesh, Timing
from idp_jax.evaluation import read
from idp_jax.evaluation.job import score
from idp_jax.formats import load_model, save_adapter
from idp_jax.recover import SoftPrompt
from tests.helpers import check_same_scores, tiny_folder, tiny_pool


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, a pool of two prompts for it, one prompt, and a text."""
    folder = tmp_path_factory.mktemp("files")
    tiny_folder(folder / "model", max_positions=512)
    model = load_model(folder / "model")
    pool = tiny_pool(model, 3, 5)
    save_adapter(pool, folder / "pool", decoder=model)
    save_adapter(pool.prompts[0], folder / "prompt", decoder=model)
    words = np.random.default_rng(0).choice(["tide ", "ship ", "lamp ", "storm. "], 400)
    (folder / "text.txt").write_text("".join(words))
    return folder


def settings(files, out, **changes) -> Evaluate:
    """Scores of a little text."""
    common = {"model": str(files / "model"), "out": out, "perplexity": files / "text.txt"}
    return Evaluate(**{**common, "sequence_length": 32, "windows": 4, "batch_size": 4, **changes})


def test_several_selectors_give_one_variant_each(files, tmp_path, monkeypatch, capsys):
    loads = []
    load = lambda *args, **options: loads.append(args) or load_model(*args, **options)
    monkeypatch.setattr("idp_jax.formats.load_model", load)
    options = ["--tasks", "knowledge_arts", "--limit", "2", "--perplexity", files / "text.txt"]
    options += ["--sequence-length", "32", "--windows", "4", "--adapter", files / "pool"]
    selectors = ["--selector", "mean_attention", "first", "random"]
    call = ["eval", "--model", files / "model", "--out", tmp_path / "r.json", *options, *selectors]
    main([str(word) for word in call])
    found = read(tmp_path / "r.json").variants
    assert len(loads) == 1 and [variant.selector for variant in found] == selectors[1:]
    assert all(variant.role == "repaired" for variant in found)
    assert all(variant.extra_parameters == 8 * 64 for variant in found)
    assert all(variant.prompt_lengths == [3, 5] for variant in found)
    assert found[1].tasks["knowledge_arts"].choices == [2, 0]
    assert found[0].tasks["knowledge_arts"].documents == found[2].tasks["knowledge_arts"].documents
    assert "knowledge_arts: prompts chosen: 3 tokens 2x, 5 tokens 0x" in capsys.readouterr().err
    # Without a selector the pool chooses in its own way.
    own = score(settings(files, tmp_path / "own.json", adapter=files / "pool")).variants[0]
    assert own.perplexity.per_window_nll == found[0].perplexity.per_window_nll


def test_a_length_beyond_the_positions_is_refused_before_the_model_loads(tmp_path, monkeypatch):
    """The prompt takes its share of them."""
    model = load_model(tiny_folder(tmp_path / "opt", "opt", max_positions=96))
    save_adapter(SoftPrompt.init(model, 5, jax.random.key(0)), tmp_path / "five", decoder=model)
    monkeypatch.setattr("idp_jax.formats.load_model", pytest.fail)
    (tmp_path / "text.txt").write_text("a " * 200)
    asked = {"model": str(tmp_path / "opt"), "adapter": tmp_path / "five", "max_length": 92}
    with pytest.raises(ConfigError, match="--max-length 92 exceeds the 91 learned positions"):
        score(settings(tmp_path, tmp_path / "r.json", **asked))
    assert not (tmp_path / "r.json").exists()


def test_a_selector_needs_a_pool(files, tmp_path):
    with pytest.raises(ConfigError, match="--selector first needs a pool: give its --adapter"):
        settings(files, tmp_path / "r.json", selector=("first",))
    with pytest.raises(ConfigError, match=r"first chooses among .* a pool, which .*prompt is not"):
        score(settings(files, tmp_path / "r", selector=("first",), adapter=files / "prompt"))
    with pytest.raises(ValueError, match="no selector 'best'; there are mean_attention"):
        score(settings(files, tmp_path / "r", selector=("best",), adapter=files / "pool"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [Mesh(data=8), Mesh(data=2, fsdp=2, model=2)])
def test_scores_on_a_mesh_are_those_without(files, tmp_path, mesh):
    measured = {"tasks": "knowledge_arts", "limit": 4, "adapter": files / "pool"}
    plain, cut = (
        score(settings(files, tmp_path / name, mesh=arranged, **measured)).variants[0]
        for name, arranged in (("plain", Mesh()), ("cut", mesh))
    )
    losses = plain.perplexity.per_window_nll
    np.testing.assert_allclose(cut.perplexity.per_window_nll, losses, rtol=2e-6)
    check_same_scores(cut.tasks["knowledge_arts"], plain.tasks["knowledge_arts"])
    assert cut.prompt_lengths == plain.prompt_lengths


def test_latency_is_measured_when_asked_for(files, tmp_path):
    timing = Timing(batch_size=2, prompt_length=4, new_tokens=3, repeats=2)
    asked = settings(files, tmp_path / "r.json", perplexity=None, latency=True, timing=timing)
    found = score(asked).variants[0]
    assert found.perplexity is None and found.role == "dense"
    assert len(found.latency.prefill_ms_runs) == 2 and found.latency.new_tokens == 3
    again = settings(files, tmp_path / "r.json", overwrite=True)
    assert score(again).variants[0].latency is None
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        settings(files, tmp_path / "r.json", perplexity=None)
    with pytest.raises(ConfigError, match="--timing.repeats 0 must be at least 1"):
        Timing(repeats=0)

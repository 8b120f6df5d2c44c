"""A selector is found by name, held in a pool, trained where it has parameters, compiled once."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.config import Optimizer
from idp_jax.data.batch import Batch
from idp_jax.formats import load_adapter, save_adapter
from idp_jax.formats.adapters import read_adapter
from idp_jax.recover import Pool, find_selector
from idp_jax.recover.selection import as_selection
from idp_jax.recover.selectors import LinearRouter, ScoreInputs, attention_scores, fixed_scores
from idp_jax.training.step import TrainState, make_optimizer, make_train_step
from tests.helpers import close, tiny_decoder, tiny_ids
from tests.recover.test_adapters import random_prompt

KEY = jax.random.key(0)
MINE = """
import jax
import jax.numpy as jnp
from flax import nnx

def by_length(inputs, *, longest=False):
    length = inputs.prompt_mask.sum(-1).astype(jnp.float32)
    scores = length if longest else -length
    return jnp.broadcast_to(scores, (inputs.real.shape[0], length.size))

class Router(nnx.Module):
    def __init__(self, decoder, prompts, key, *, width=4):
        first, second = jax.random.split(key)
        self.first = nnx.Param(jax.random.normal(first, (decoder.config.embedding_dim, width)))
        self.second = nnx.Param(jax.random.normal(second, (width, prompts)))

    def __call__(self, inputs):
        return jnp.tanh(inputs.mean_embedding() @ self.first[...]) @ self.second[...]

def flat(inputs):
    return jnp.zeros(inputs.real.shape[0], jnp.float32)

def two(inputs, other):
    return other

number = 3
"""


@functools.cache
def model():
    """One layer: only layer 0 is scored."""
    return tiny_decoder("llama", num_layers=1)


@functools.cache
def ids():
    """Four rows."""
    return tiny_ids(model(), batch=4, time=6)


def pool(selector=attention_scores, lengths=(5, 2, 3)) -> Pool:
    """A pool of different prompts."""
    return Pool([random_prompt(model(), n, seed) for seed, n in enumerate(lengths)], selector)


@pytest.fixture
def mine(tmp_path):
    """A user's file."""
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def module_scores(inputs: ScoreInputs) -> jax.Array:
    """A selector in an importable module."""
    return fixed_scores(inputs, index=2)


def choices(selector) -> list[int]:
    """What a pool's selector chooses for the four rows."""
    return np.asarray(pool(selector).repair(model()).choose(ids())).tolist()


def test_selectors_are_found_by_every_kind_of_name(mine):
    assert choices("fixed(index=1)") == [1] * 4
    assert choices(f"{__name__}:module_scores") == [2] * 4
    assert choices(f"{mine}:by_length") == [1] * 4
    assert choices(f"{mine}:by_length(longest=True)") == [0] * 4
    assert choices(functools.partial(fixed_scores, index=2)) == [2] * 4


NAMES = {
    "unknown": ("largest", "no selector 'largest'; there are mean_attention, .*file.py:name"),
    "no-file": ("/no/such.py:score", r"no file /no/such\.py with a selector; check the path"),
    "no-module": (
        "no.such:score",
        "module no.such of a selector cannot be imported .*mine.py:name",
    ),
    "no-attribute": ("MINE:best", "mine.py has no selector 'best'"),
    "not-callable": ("MINE:number", "number of .*mine.py cannot be called"),
    "arguments": ("MINE:two", r"two must be called as \(inputs\) .*missing .*'other'"),
    "option": ("fixed(place=2)", "must be called .*unexpected keyword argument 'place'"),
    "bad-option": ("fixed(index=x)", "cannot read the options .*name\\(option=1"),
    "parameters": ("linear_router", "linear_router has parameters.*train a pool .*joint"),
}


@pytest.mark.parametrize(("name", "message"), NAMES.values(), ids=NAMES)
def test_names_that_cannot_be_used_are_refused(mine, name, message):
    with pytest.raises(ValueError, match=message) as error:
        find_selector(name.replace("MINE", str(mine)))
    assert "\n" not in str(error.value)


def test_a_file_that_fails_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    with pytest.raises(ValueError, match=r"broken.py cannot be imported \(ModuleNotFoundError"):
        find_selector(f"{tmp_path / 'broken.py'}:score")


def test_scores_of_another_shape_are_refused(mine):
    with pytest.raises(ValueError, match=r"mine.py:flat gives scores \(4,\); it must .*\(4, 3\)"):
        choices(f"{mine}:flat")


def failing(inputs):
    raise KeyError("layer")


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("fixed(index='a')", r"selector fixed\(index='a'\) fails on an input: TypeError"),
        ("os:system", "selector os:system fails on an input: TypeError"),
        (failing, r"selector \S+failing fails on an input: KeyError: 'layer'"),
        (lambda inputs: jnp.zeros((2, 2), jnp.complex64), "complex64; scores must be real numbers"),
    ],
    ids=["option", "function", "error", "complex"],
)
def test_a_selector_that_fails_is_named(selector, message):
    model = tiny_decoder("llama")
    pool = Pool([random_prompt(model, n) for n in (2, 3)], selector)
    with pytest.raises(ValueError, match=message) as error:
        pool.repair(model).choose(tiny_ids(model, 2, 4))
    assert "\n" not in str(error.value)


def test_a_changed_file_is_read_again(mine):
    assert choices(f"{mine}:by_length") == [1] * 4
    mine.write_text(MINE.replace("else -length", "else length"))
    assert choices(f"{mine}:by_length") == [0] * 4


def test_selectors_compile_once(mine):
    """However often they are looked up, by name or as a function with options."""
    compiled = 0

    @jax.jit
    def choose(repaired, ids):
        nonlocal compiled
        compiled += 1
        return repaired.choose(ids)

    repaired = pool().repair(model())
    for _ in range(3):
        for selector in (
            "random",
            "fixed(index=1)",
            f"{mine}:by_length(longest=True)",
            functools.partial(attention_scores, heads="max"),
        ):
            choose(repaired.with_selector(selector), ids())
    assert compiled == 4
    router = LinearRouter(model(), 3, KEY)
    for scale in (1.0, 2.0):
        scaled = jax.tree.map(lambda x, scale=scale: x * scale, router)
        choose(repaired.with_selector(scaled), ids())
    assert compiled == 5


SAVED = {
    "built-in": ("sum_attention", "sum_attention"),
    "function": (fixed_scores, "fixed"),
    "options": (functools.partial(fixed_scores, index=2), "fixed(index=2)"),
    "module": (module_scores, f"{__name__}:module_scores"),
    "file": ("MINE:by_length(longest=True)", "MINE:by_length(longest=True)"),
}


@pytest.mark.parametrize(("selector", "name"), SAVED.values(), ids=SAVED)
def test_a_selector_is_saved_by_its_name(tmp_path, mine, monkeypatch, selector, name):
    monkeypatch.chdir(tmp_path)
    if isinstance(selector, str):
        selector = selector.replace("MINE", "mine.py")
    before = pool(selector)
    folder = save_adapter(before, tmp_path / "pool", decoder=model())
    recorded = json.loads((folder / "pool.json").read_text())["selector"]
    assert recorded == name.replace("MINE", str(mine))
    monkeypatch.chdir("/")
    after = read_adapter(model(), folder)
    assert jax.tree.structure(after.selector) == jax.tree.structure(before.selector)
    assert load_adapter(model(), folder).choose(ids()).tolist() == choices(before.selector)


def test_a_selector_whose_file_moved_is_refused_with_the_remedy(tmp_path, mine):
    folder = save_adapter(pool(f"{mine}:by_length"), tmp_path / "pool", decoder=model())
    mine.rename(tmp_path / "other.py")
    with pytest.raises(ValueError, match=r"pool\.json names .*no file .*mine\.py.*--selector"):
        load_adapter(model(), folder)
    found = load_adapter(model(), folder, f"{tmp_path / 'other.py'}:by_length")
    assert found.choose(ids()).tolist() == [1] * 4
    assert load_adapter(model(), folder, "first").choose(ids()).tolist() == [0] * 4
    with pytest.raises(ValueError, match="holds no selector.safetensors.*trained with"):
        load_adapter(model(), folder, "linear_router")


def test_only_a_pool_takes_a_selector(tmp_path):
    folder = save_adapter(random_prompt(model(), 2), tmp_path / "prompt", decoder=model())
    with pytest.raises(ValueError, match="no pool of prompts"):
        load_adapter(model(), folder, "first")


def mixture(repaired, batch: Batch):
    """The loss under every prompt, weighed by the scores: what trains a router and its prompts."""
    weights = jax.nn.softmax(repaired.scores(batch.tokens))
    losses = []
    for number in range(repaired.prefix.batch):
        past = repaired.prefix.rows(jnp.full(batch.tokens.shape[:1], number))
        logits = repaired.decoder.logits(repaired.decoder.hidden(batch.tokens, past=past))
        likelihood = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(likelihood, batch.tokens[:, 1:, None], -1)
        losses.append(-picked.mean((1, 2)))
    usage = weights.mean(0)
    return (weights * jnp.stack(losses, -1)).sum(-1).mean(), {"largest_share": usage.max()}


ROUTERS = ("linear_router", "mlp_router(width=3)", "cosine_keys(pull=0.1)", "MINE:Router(width=3)")


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_trains_with_its_pool_and_is_saved_with_it(tmp_path, mine, name):
    selector = find_selector(name.replace("MINE", str(mine)), (model(), 3, KEY))
    before = pool(selector)
    optimizer = make_optimizer(Optimizer(), 0.05, 3)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to int32 powers
        step = make_train_step(optimizer, mixture)
        state = TrainState.start(before, optimizer)
        for _ in range(3):
            state, metrics = step(state, model(), Batch(ids()))
    assert 1 / 3 <= float(metrics["largest_share"]) <= 1 and float(metrics["gradient_norm"]) > 0
    trained = state.adapter
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(trained), strict=True):
        assert not close(old, new, 1e-3)
    folder = save_adapter(trained, tmp_path / "pool", decoder=model())
    after = read_adapter(model(), folder)
    assert jax.tree.structure(after) == jax.tree.structure(trained)
    for old, new in zip(jax.tree.leaves(trained), jax.tree.leaves(after), strict=True):
        assert (np.asarray(old) == np.asarray(new)).all()
    assert close(after.repair(model()).scores(ids()), trained.repair(model()).scores(ids()), 0)
    # The remedy where the file moved: the same class from elsewhere takes the saved parameters.
    again = load_adapter(model(), folder, selector.name)
    assert close(again.scores(ids()), trained.repair(model()).scores(ids()), 0)


def test_a_router_that_its_name_does_not_give_again_is_not_saved(tmp_path, mine):
    made = find_selector(f"{mine}:Router(width=3)", (model(), 3, KEY)).score
    with pytest.raises(ValueError, match=r"has parameters .*\(64, 3\).*carries its options"):
        save_adapter(pool(made), tmp_path / "pool", decoder=model())
    with pytest.raises(ValueError, match="no name to save"):
        save_adapter(pool(lambda inputs: module_scores(inputs)), tmp_path / "p", decoder=model())
    assert not (tmp_path / "pool").exists() and not (tmp_path / "p").exists()


def test_a_router_for_another_pool_is_refused(tmp_path):
    before = pool(LinearRouter(model(), 3, KEY))
    assert as_selection(before.selector).name == "linear_router"
    folder = save_adapter(before, tmp_path / "pool", decoder=model())
    settings = json.loads((folder / "pool.json").read_text())
    settings["prompts"].pop()
    (folder / "pool.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"selector.safetensors holds .*3.*linear_router has .*2"):
        load_adapter(model(), folder)

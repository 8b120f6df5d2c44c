"""A prompt or prefix begins as what it was told to: against plain forward passes and copies."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idp_jax import load_model
from idp_jax.config import Init, Teacher, Train
from idp_jax.data.batch import Batch
from idp_jax.recover import Pool, PrefixAdapter, SoftPrompt
from idp_jax.recover.methods import METHODS, parameter_count, trained
from idp_jax.recover.starts import Start, first_embeddings
from idp_jax.training import next_token
from idp_jax.training.step import TrainState, make_train_step
from tests.helpers import close, keep, quantize_decoder, tiny_decoder, tiny_ids, write_folder

KEY = jax.random.key(3)
MODELS = {
    "llama": lambda: tiny_decoder("llama"),
    "opt": lambda: tiny_decoder("opt"),
    "opt-projected": lambda: tiny_decoder("opt", embedding_dim=32),
}


def begin(method: str, model, words, *, teacher=None, frozen: int = 0):
    """An adapter as the settings of a run make it, of the tokens `words`."""
    words = jnp.asarray(words, jnp.int32)
    init = Init(
        tokens="text", model="compressed" if teacher is None else "teacher", frozen_tokens=frozen
    )
    settings = Train(
        model="m",
        out=Path("o"),
        method=method,
        prompt_length=len(words),
        init=init,
        teacher=Teacher(model=None if teacher is None else "t"),
    )
    (run,) = METHODS[method].runs(settings)
    assert (run.text, run.teacher) == ((len(words),), teacher is not None)
    return run.init(model, Start(KEY, (words,), teacher))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", MODELS)
def test_a_start_from_text_is_that_text_before_the_input(name, method):
    model = quantize_decoder(MODELS[name](), 4)
    bos, ids = model.config.bos_token_id, tiny_ids(model, batch=3, time=9)
    words = [bos, 40, 41, 40, 7]
    found = begin(method, model, words).repair(model)(ids)
    before = jnp.broadcast_to(jnp.asarray(words), (3, 5))
    expected = model(jnp.concatenate([before, ids], 1))[:, 5:]
    assert close(found, expected, 1e-5 * float(np.abs(expected).max()))
    assert not close(found, model(ids), 0.1)


@pytest.mark.parametrize("name", MODELS)
def test_the_dense_models_first_token_is_intactkv(name):
    """Source: "IntactKV: Improving Large Language Model Quantization by Keeping Pivot Tokens".

    There the keys and values of the first token are computed by the dense model and kept; the
    compressed model reads all that follows.
    """
    dense = MODELS[name]()
    model = quantize_decoder(dense, 3)
    bos, ids = dense.config.bos_token_id, tiny_ids(dense, batch=2, time=9)
    found = begin("prefix", model, [bos], teacher=dense).repair(model)(ids)
    _, pivot = keep(dense, jnp.full((2, 1), bos, jnp.int32))
    expected = model(ids, past=pivot)
    assert close(found, expected, 1e-5)
    assert not close(found, begin("prefix", model, [bos]).repair(model)(ids), 0.1)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_intactkv_is_what_transformers_gives(tmp_path, name):
    """Two models of one shape, the first one's keys and values before the second's input."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    ours, theirs = [], []
    for seed in (0, 1):
        model = tiny_decoder(name, seed=seed)
        folder = write_folder(model, tmp_path / f"model{seed}")
        theirs.append(transformers.AutoModelForCausalLM.from_pretrained(folder).eval())
        ours.append(load_model(folder))
    words, ids = [[ours[0].config.bos_token_id, 30, 31]], np.asarray(tiny_ids(ours[0], batch=1))
    with torch.no_grad():
        past = theirs[0](torch.tensor(words), use_cache=True).past_key_values
        expected = theirs[1](torch.tensor(ids), past_key_values=past).logits.numpy()
    found = begin("prefix", ours[1], words[0], teacher=ours[0]).repair(ours[1])(ids)
    assert close(found, expected, 1e-4)


def test_every_kind_of_start_is_what_it_says():
    model, start = tiny_decoder("llama"), Start(KEY, (jnp.asarray([9, 9, 4]),))
    table = np.asarray(model.embedding[...])
    made = lambda kind, n=3: np.asarray(first_embeddings(model, n, start, kind))
    assert (made("text") == table[[9, 9, 4]]).all()
    assert (made("zeros") == 0).all()
    words = made("vocabulary")
    assert (words == np.asarray(SoftPrompt.init(model, 3, KEY).embeddings[...])).all()
    noise = made("random", 100)
    assert noise.std() == pytest.approx(table.std(), rel=0.05)
    assert noise.mean() == pytest.approx(table.mean(), abs=0.05 * float(table.std()))
    assert not (noise[:, None] == table[None]).all(-1).any()


def test_a_teacher_that_is_another_model_is_refused():
    model = tiny_decoder("llama")
    with pytest.raises(ValueError, match=r"teacher\.model t has num_layers 3, the model has 2"):
        begin("prefix", model, [5], teacher=tiny_decoder("llama", num_layers=3))


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_frozen_tokens_stay_bit_for_bit(method, decay):
    model = tiny_decoder("llama", num_layers=1)
    adapter = begin(method, model, [5, 6, 7, 8], frozen=2)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=decay))
    with jax.numpy_dtype_promotion("standard"):
        step = make_train_step(optimizer, next_token)
        state = TrainState.start(adapter, optimizer)
        for seed in range(3):
            batch = Batch(tiny_ids(model, seed=seed))
            state, values = step(state, model, batch)
    rows = lambda x: np.moveaxis(np.asarray(x), 0 if method == "prompt" else 1, 0)
    for before, after in zip(jax.tree.leaves(adapter), jax.tree.leaves(state.adapter), strict=True):
        assert (rows(before)[:2].view("i4") == rows(after)[:2].view("i4")).all()
        assert (rows(before)[2:] != rows(after)[2:]).any()
    assert values["gradient_norm"] > 0


def test_frozen_tokens_are_no_trained_parameters():
    model = tiny_decoder("llama")
    assert parameter_count(begin("prompt", model, [5, 6, 7], frozen=1)) == 2 * 64
    assert parameter_count(begin("prefix", model, [5, 6, 7], frozen=1)) == 2 * 2 * 2 * 32
    assert parameter_count(PrefixAdapter.init(model, 3, KEY)) == 2 * 2 * 3 * 32


def test_a_pool_is_trained_where_its_prompts_are():
    model = tiny_decoder("llama")
    words = first_embeddings(model, 3, Start(KEY))
    pool = Pool([SoftPrompt(words, 1), SoftPrompt(words)], "first")
    assert parameter_count(pool) == 5 * 64
    parts = trained(pool)
    assert jax.tree.structure(parts) == jax.tree.structure(pool)
    assert [leaf.ravel().tolist() for leaf in jax.tree.leaves(parts)] == [[0, 1, 1], [1, 1, 1]]

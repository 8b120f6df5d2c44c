"""LoRA by rule: every layer has its own rank and scale, and what fills up stays 0."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idp_jax.config import ConfigError
from idp_jax.formats import load_adapter, load_model, save_adapter
from idp_jax.formats.adapters import read_adapter
from idp_jax.models.names import module_names
from idp_jax.recover import LoraAdapter, MaskedLora
from idp_jax.recover.methods import parameter_count
from idp_jax.weights import Dense
from tests.formats.test_peft import deprecated, same, their_logits
from tests.helpers import close, hf_config, quantize_decoder, tiny_decoder, tiny_ids, write_folder

KEY = jax.random.key(0)
RULES = (r"layers\.0\..*(q|up)_proj rank=5 alpha=3", r"layers\.1\..*v_proj skip", "o_proj rank=1")


pytestmark = pytest.mark.usefixtures("optax_promotes")


def ruled(model, kind=LoraAdapter, **settings) -> LoraAdapter:
    """An adapter by rules, B drawn at random where there is an update."""
    lora = kind.init(model, 3, KEY, alpha=6.0, rules=RULES, **settings)
    rng, b = np.random.default_rng(0), {}
    for name, ranks in lora.ranks:
        drawn = rng.normal(0, 0.3, lora.b[name].shape).astype(np.float32)
        used = np.arange(drawn.shape[1]) < np.asarray(ranks)[:, None]
        b[name] = jnp.asarray(np.where(used[..., None], drawn, np.float32(0)))
    a = {name: value[...] for name, value in lora.a.items()}
    return kind(a, b, dict(lora.alphas), ranks=dict(lora.ranks))


def test_the_first_rule_that_matches_gives_rank_and_alpha():
    lora = ruled(tiny_decoder("llama"))
    assert dict(lora.ranks) == {"q": (5, 3), "v": (3, 0), "o": (1, 1), "up": (5, 0)}
    assert lora.scales("q") == (3 / 5, 2.0) and lora.scales("o") == (6.0, 6.0)
    # [64, 64] of q and o, [64, 32] of v, [64, 96] of up.
    assert parameter_count(lora) == 8 * 128 + 3 * 96 + 2 * 128 + 5 * 160
    stabilised = ruled(tiny_decoder("llama"), rank_stabilized=True)
    assert np.allclose(stabilised.scales("q"), (3 / 5**0.5, 6 / 3**0.5))


def test_all_names_every_matrix():
    for model in (tiny_decoder("llama"), tiny_decoder("opt")):
        lora = LoraAdapter.init(model, 2, KEY, targets=("all",))
        assert set(lora.a) == set(model.layers.weight_names)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (("gates rank=4",), r"--lora\.rules 'gates rank=4': no such matrix; names are like model"),
        (("q rank=4", "q_proj skip"), "every matrix it matches has an earlier rule"),
        (("q bits=4",), 'is not "REGEX SETTING=VALUE .* settings: rank, alpha'),
        (("q rank=0",), r"'q rank=0': --lora\.rank 0 must be at least 1"),
        (("q rank=x",), "'q rank=x': rank: "),
    ],
)
def test_rules_that_cannot_be_used(rules, message):
    with pytest.raises(ConfigError, match=message) as error:
        LoraAdapter.init(tiny_decoder("llama"), 3, KEY, rules=rules)
    assert "\n" not in str(error.value)


def test_nothing_to_update_is_refused():
    with pytest.raises(ValueError, match="at least one matrix"):
        LoraAdapter.init(tiny_decoder("llama"), 3, KEY, rules=("q_proj skip", "v_proj skip"))


@pytest.mark.parametrize("kind", [LoraAdapter, MaskedLora])
def test_every_layer_is_the_merged_matrix_of_its_own_scale(kind):
    model = pruned(tiny_decoder("llama"))
    lora, dense = ruled(model, kind), {}
    for name in model.layers.weight_names:
        kernel = np.asarray(getattr(model.layers, name).kernel[...], np.float64)
        if name in lora.a:
            a, b = (np.asarray(part[name][...], np.float64) for part in (lora.a, lora.b))
            update = a @ b * np.asarray(lora.scales(name))[:, None, None]
            kernel = kernel + (update * (kernel != 0) if lora.masked else update)
        dense[name] = Dense(jnp.asarray(kernel, jnp.float32))
    expected = model.with_layers(model.layers.replace(**dense))(tiny_ids(model))
    assert close(lora.repair(model)(tiny_ids(model)), expected, 1e-4)
    assert not close(expected, model(tiny_ids(model)), 0.05)


def pruned(model):
    """A model whose matrices keep two of every four inputs."""
    layers = {}
    for name in model.layers.weight_names:
        weight = getattr(model.layers, name)
        kernel = np.array(weight.kernel[...])
        kernel[:, np.arange(kernel.shape[1]) % 4 >= 2] = 0
        bias = None if weight.bias is None else weight.bias[...]
        layers[name] = Dense(jnp.asarray(kernel), bias)
    return model.with_layers(model.layers.replace(**layers))


@pytest.mark.parametrize("kind", [LoraAdapter, MaskedLora])
def test_what_fills_up_stays_zero_in_training(kind):
    model = pruned(tiny_decoder("llama"))
    lora, ids = ruled(model, kind), tiny_ids(model)
    optimizer = optax.adamw(0.05, weight_decay=0.1)

    @jax.jit
    def step(lora, state):
        loss = lambda lora: jnp.square(lora.repair(model).decoder.hidden(ids)).mean()
        update, state = optimizer.update(jax.grad(loss)(lora), state, lora)
        return optax.apply_updates(lora, update), state

    state, before = optimizer.init(lora), lora
    for _ in range(3):
        lora, state = step(lora, state)
    for name, ranks in lora.ranks:
        for layer, rank in enumerate(ranks):
            a, b = np.asarray(lora.a[name][...])[layer], np.asarray(lora.b[name][...])[layer]
            assert (a[:, rank:] == 0).all() and (b[rank:] == 0).all()
            assert (
                not rank or (a[:, :rank] != np.asarray(before.a[name][...])[layer, :, :rank]).all()
            )


def test_a_masked_update_of_a_quantised_matrix_is_refused():
    model = quantize_decoder(tiny_decoder("llama"), 4)
    with pytest.raises(ValueError, match=r"q is quantised.*without --lora\.masked"):
        MaskedLora.init(model, 2, KEY).repair(model)


@pytest.mark.parametrize("kind", [LoraAdapter, MaskedLora])
def test_round_trip(tmp_path, kind):
    model = tiny_decoder("llama")
    lora = ruled(model, kind)
    folder = save_adapter(lora, tmp_path / "adapter", decoder=model)
    found = read_adapter(model, folder)
    assert type(found) is kind and same(found, lora)


@deprecated
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_computes_the_same_and_what_it_saves_is_read(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = tiny_decoder("llama")
    base = write_folder(model, tmp_path / "base")
    hf_config(model.config).save_pretrained(base)
    lora, ids = ruled(model), np.asarray(tiny_ids(model))
    ours = save_adapter(lora, tmp_path / "ours", decoder=model)
    theirs = AutoModelForCausalLM.from_pretrained(base).eval()
    tuned = peft.PeftModel.from_pretrained(theirs, ours).eval()
    modules = {module for (_, name), module in module_names(model.config).items() if name in lora.a}
    assert {n.split("model.", 2)[-1] for n, m in tuned.named_modules() if hasattr(m, "lora_A")}
    assert len(modules) == 8
    expected = np.asarray(lora.repair(model)(ids))
    assert np.abs(their_logits(tuned, ids) - expected).max() <= 3e-4
    tuned.save_pretrained(tmp_path / "again")
    found = load_adapter(load_model(base), tmp_path / "again")
    assert np.abs(np.asarray(found(ids)) - expected).max() <= 3e-4


def test_peft_refuses_a_masked_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_decoder("llama")
    folder = save_adapter(ruled(model, MaskedLora), tmp_path / "masked", decoder=model)
    with pytest.raises((KeyError, ValueError)):
        peft.PeftConfig.from_pretrained(folder)

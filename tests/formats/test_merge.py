"""A merged model computes what it computes with the adapter beside it, and keeps its zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax import load_model
from idp_jax.cli import main
from idp_jax.config import Merge
from idp_jax.formats import save_adapter
from idp_jax.formats.adapters import read_adapter
from idp_jax.formats.merge import merge
from idp_jax.recover import LoraAdapter, MaskedLora, NormsAndBiases, PrefixAdapter
from idp_jax.weights import Lora
from tests.formats.test_peft import deprecated, their_logits
from tests.helpers import close, hf_config, quantize_decoder, tiny_decoder, tiny_ids, write_folder
from tests.recover.test_adapters import random_lora
from tests.recover.test_lora_rules import pruned, ruled

KEY = jax.random.key(0)


def norms(model, biases="all") -> NormsAndBiases:
    """Norms and biases far from the model's own."""
    rng = np.random.default_rng(0)
    found = NormsAndBiases.init(model, biases=biases)
    noise = lambda x: x + jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32)
    return NormsAndBiases({path: noise(value[...]) for path, value in found.values.items()})


def masked(model) -> MaskedLora:
    plain = random_lora(model, ("q", "v", "up", "down"))
    return MaskedLora(dict(plain.a), dict(plain.b), plain.alpha)


def biased(model) -> LoraAdapter:
    """A LoRA with biases, and a head of its own."""
    plain = random_lora(model, ("q", "up"))
    bias = {"q": jnp.ones((2, 64), "float32"), "up": jnp.ones((2, 96), "float32")}
    head = {"head.kernel": model.embedding[...].T * 1.1}
    return LoraAdapter(dict(plain.a), dict(plain.b), 5.0, bias=bias, replaced=head)


CASES = {
    "lora": ("llama", lambda m: m, lambda m: random_lora(m, ("q", "o", "gate"))),
    "lora-by-rules": ("llama", lambda m: m, ruled),
    "masked": ("llama", pruned, masked),
    "masked-opt": ("opt", pruned, masked),
    "biases": ("llama", lambda m: m, biased),
    "biases-opt": ("opt", lambda m: m, biased),
    "norms": ("llama", pruned, norms),
    "norms-opt": ("opt", pruned, norms),
}


def merged_of(tmp_path, model, adapter, **settings):
    """The folders of a model and of it merged with an adapter."""
    base = write_folder(model, tmp_path / "base")
    folder = save_adapter(adapter, tmp_path / "adapter", decoder=model)
    out = tmp_path / "merged"
    return base, merge(Merge(model=str(base), adapter=folder, out=out, **settings))


@deprecated
@pytest.mark.parametrize(("architecture", "change", "make"), CASES.values(), ids=CASES)
def test_the_merged_logits_are_those_beside(tmp_path, architecture, change, make):
    model = change(tiny_decoder(architecture))
    adapter, ids = make(model), tiny_ids(model)
    _, out = merged_of(tmp_path, model, adapter)
    expected = np.asarray(adapter.repair(model)(ids))
    size = np.abs(expected).max()
    found = load_model(out)
    assert not isinstance(found.layers.q, Lora)
    assert close(found(ids), expected, 1e-5 * size) and not close(model(ids), expected, 0.05)
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    assert np.abs(their_logits(theirs, np.asarray(ids)) - expected).max() <= 3e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_masked_lora_keeps_every_zero(tmp_path, dtype):
    model = pruned(tiny_decoder("llama"))
    _, out = merged_of(tmp_path, model, masked(model), dtype=dtype)
    found = load_model(out, dtype="auto")
    for name in model.layers.weight_names:
        before, after = (np.asarray(getattr(m.layers, name).dense()) for m in (model, found))
        zeros = before == 0
        assert zeros.mean() == 0.5 and (after[zeros].view(np.uint32) == 0).all()
        quads = (after != 0).reshape(2, -1, 4, after.shape[-1]).sum(2)
        assert quads.max() == 2
        assert (name in ("q", "v", "up", "down")) == bool(np.abs(after - before).max() > 0.05)


def test_a_plain_lora_fills_zeros_only_where_that_is_asked(tmp_path):
    model = pruned(tiny_decoder("llama"))
    lora, ids = random_lora(model, ("q",)), tiny_ids(model)
    with pytest.raises(ValueError, match=r"q_proj is pruned .*50% zeros.*--dense") as error:
        merged_of(tmp_path, model, lora)
    assert "\n" not in str(error.value) and not (tmp_path / "merged").exists()
    out = merge(
        Merge(
            model=str(tmp_path / "base"),
            adapter=tmp_path / "adapter",
            out=tmp_path / "merged",
            dense=True,
        )
    )
    assert close(load_model(out)(ids), lora.repair(model)(ids), 1e-4)


def quantised(tmp_path):
    model = quantize_decoder(tiny_decoder("llama"), 4)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    settings["checkpoint_format"] = "gptq_v2"
    return model, write_folder(model, tmp_path / "base", {**settings, "sym": False})


def test_a_grid_is_not_broken(tmp_path):
    model, base = quantised(tmp_path)
    folder = save_adapter(random_lora(model, ("v",)), tmp_path / "lora", decoder=model)
    message = r"layers\.0\.self_attn\.v_proj is quantised to 4 bits.*--adapter.*--to dense"
    with pytest.raises(ValueError, match=message) as error:
        merge(Merge(model=str(base), adapter=folder, out=tmp_path / "out", dense=True))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_norms_go_into_a_quantised_model(tmp_path):
    """Norms have no grid: the matrices stay packed as they were."""
    model, base = quantised(tmp_path)
    model = load_model(base)
    adapter, ids = norms(model, "existing"), tiny_ids(model)
    folder = save_adapter(adapter, tmp_path / "norms", decoder=model)
    found = load_model(merge(Merge(model=str(base), adapter=folder, out=tmp_path / "out")))
    assert found.layers.q.bits == 4
    assert close(found(ids), adapter.repair(model)(ids), 1e-4)


def test_a_prefix_is_not_merged(tmp_path):
    model = tiny_decoder("llama")
    with pytest.raises(ValueError, match="PrefixAdapter stands before the input"):
        merged_of(tmp_path, model, PrefixAdapter.init(model, 3, KEY))


def test_the_command_writes_once_and_replaces_when_asked(tmp_path, capsys):
    model = tiny_decoder("llama")
    base = write_folder(model, tmp_path / "base")
    folder = save_adapter(random_lora(model, ("q",)), tmp_path / "lora", decoder=model)
    command = ["merge", str(base), "--adapter", str(folder), "--out", str(tmp_path / "out")]
    main(command)
    with pytest.raises(SystemExit):
        main(command)
    assert "exists; give another folder, or --overwrite" in capsys.readouterr().err
    main([*command, "--overwrite"])
    assert (tmp_path / "out" / "config.json").is_file()


@deprecated
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("biases", ["none", "existing", "all"])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_peft_reads_norms_and_biases(tmp_path, architecture, biases):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = tiny_decoder(architecture)
    base = write_folder(model, tmp_path / "base")
    hf_config(model.config).save_pretrained(base)
    adapter, ids = norms(model, biases), np.asarray(tiny_ids(model))
    expected = np.asarray(adapter.repair(model)(ids))
    folder = save_adapter(adapter, tmp_path / "ours", decoder=model)
    assert close(read_adapter(model, folder).repair(model)(ids), expected, 1e-5)
    theirs = AutoModelForCausalLM.from_pretrained(base).eval()
    tuned = peft.PeftModel.from_pretrained(theirs, folder).eval()
    assert np.abs(their_logits(tuned, ids) - expected).max() <= 3e-4
    if biases != "none":
        return  # PEFT saves LN_TUNING's norms alone, and not what it read beside them
    tuned.save_pretrained(tmp_path / "theirs")
    assert close(read_adapter(model, tmp_path / "theirs").repair(model)(ids), expected, 1e-5)

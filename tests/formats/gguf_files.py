"""Writes small GGUF files as llama.cpp's converter would, key by key."""

from typing import Any

import gguf
import numpy as np

from idp_jax.models.config import RopeConfig
from tests.helpers import tiny_decoder, tiny_tokenizer

_NAMES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
_TYPES = {
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    str: gguf.GGUFValueType.STRING,
    list: gguf.GGUFValueType.ARRAY,
}


def tiny_model(**overrides):
    """A LLaMA model for a file: GGUF keeps float32 numbers, so its own are powers of two."""
    fixed = {"vocab_size": 262, "rope": RopeConfig(500.0, "default"), "norm_epsilon": 2.0**-17}
    return tiny_decoder("llama", **fixed, **overrides)


def tokenizer_fields() -> dict[str, Any]:
    """The tokenizer of `tests.helpers`, with three merges and no `pre`."""
    vocabulary = tiny_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = ["h e", "l l", "he ll"]
    tokens += [merge.replace(" ", "") for merge in merges]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def model_fields(config) -> dict[str, Any]:
    """The metadata of a decoder."""
    return {
        "llama.context_length": config.max_positions,
        "llama.embedding_length": config.hidden_dim,
        "llama.block_count": config.num_layers,
        "llama.feed_forward_length": config.ffw_dim,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope.theta,
    }


def write_file(
    path,
    model,
    fields: dict[str, Any] | None = None,
    *,
    kind=gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    tensors: tuple[str, ...] = (),
    weights: bool = True,
) -> None:
    """Writes a decoder with its tokenizer.

    Args:
        fields: changes of the metadata; None leaves a key out.
        kind: of the matrices.
        tensors: more of them, of ones.
        weights: False for the metadata alone.
    """
    writer = gguf.GGUFWriter(path, architecture)
    changed = model_fields(model.config) | tokenizer_fields() | (fields or {})
    for key, value in changed.items():
        if value is not None:
            writer.add_key_value(key, value, _TYPES[type(value)])
    if weights:
        _add_tensors(writer, model, kind)
    for name in tensors:
        writer.add_tensor(name, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensors(writer, model, kind) -> None:
    config = model.config

    def add(name, values):
        values = np.asarray(values, np.float32)
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", model.embedding[...])
    add("output_norm.weight", model.final_norm.scale[...])
    if model.head is not None:
        add("output.weight", model.head.dense().T)
    for layer in range(config.num_layers):
        prefix = f"blk.{layer}."
        add(prefix + "attn_norm.weight", model.layers.attention_norm.scale[layer])
        add(prefix + "ffn_norm.weight", model.layers.mlp_norm.scale[layer])
        for name in model.layers.weight_names:
            matrix = np.asarray(getattr(model.layers, name).dense()[layer]).T
            heads = {"q": config.num_heads, "k": config.num_kv_heads}.get(name)
            matrix = matrix if heads is None else _interleaved(matrix, heads)
            add(f"{prefix}{_NAMES[name]}.weight", matrix)


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Half-split rows of q or k in the order of llama.cpp: row i of a head beside row i + H / 2."""
    head_dim = rows.shape[0] // heads
    order = [i + half for i in range(head_dim // 2) for half in (0, head_dim // 2)]
    return np.ascontiguousarray(rows.reshape(heads, head_dim, -1)[:, order].reshape(rows.shape))

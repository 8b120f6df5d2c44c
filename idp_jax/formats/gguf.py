"""Reads GGUF files: weights dequantised, configuration and tokenizer from the metadata.

The `gguf` package knows every block type. What is left to us is naming: GGUF keeps LLaMA's q and k
rows in the interleaved RoPE order, which is turned back to Hugging Face's half-split order here.

Source: the GGUF specification (ggml/docs/gguf.md) and llama.cpp's HF converter.
"""

from pathlib import Path
from typing import Any

import numpy as np

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
_IGNORED = {"rope_freqs.weight"}  # llama3 scaling, which the metadata below refuses anyway


def _open(path: Path):
    import gguf

    try:
        return gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(f"{path} is not a readable GGUF file ({error}); fetch it again") from error


def _fields(reader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def _hf_name(name: str, path: Path) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _INNER:
        return f"model.layers.{parts[1]}.{_INNER[parts[2]]}.{kind}"
    raise ValueError(f"{path} holds a tensor {name!r} that a LLaMA model does not have")


def _half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from the interleaved to the half-split RoPE order; [heads * H, ...]."""
    shape = rows.shape
    return rows.reshape(heads, -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def open_file(path: Path):
    """Opens a GGUF file of a LLaMA model.

    Returns:
        The transformers configuration, the tensor names in Hugging Face's spelling, and a function
        that reads one of them (float32, [out, in]).

    Raises:
        ValueError: not a GGUF file, damaged, or of another architecture.
    """
    import gguf

    reader = _open(path)
    config = read_config(path, _fields(reader), {t.name for t in reader.tensors})
    tensors = {_hf_name(t.name, path): t for t in reader.tensors if t.name not in _IGNORED}
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        matrix = name.split(".")[-2]
        return _half_split(values, heads[matrix]) if matrix in heads else values

    return config, frozenset(tensors), read


def read_config(path: Path, fields: dict[str, Any], tensor_names: set[str]):
    """The LLaMA configuration that a GGUF file's metadata describes."""
    from transformers import LlamaConfig

    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{path} holds a {architecture!r} model; only llama GGUF files are supported"
        )
    get = lambda key: fields[f"llama.{key}"]
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or _IGNORED & tensor_names:
        raise ValueError(f"{path} scales RoPE by {scaling!r}, which GGUF loading does not support")
    hidden, heads = get("embedding_length"), get("attention.head_count")
    return LlamaConfig(
        vocab_size=fields.get("llama.vocab_size") or len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=fields.get("llama.rope.dimension_count", hidden // heads),
        max_position_embeddings=get("context_length"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": fields.get("llama.rope.freq_base", 10000.0),
        },
        tie_word_embeddings="output.weight" not in tensor_names,
        attention_bias="blk.0.attn_q.bias" in tensor_names,
        mlp_bias="blk.0.ffn_up.bias" in tensor_names,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
        architectures=["LlamaForCausalLM"],
    )


def load_tokenizer(path: Path):
    """The tokenizer in a GGUF file's metadata, as a transformers fast tokenizer.

    Raises:
        ValueError: the vocabulary is not byte-level BPE and torch, which transformers needs for
            the others, is missing.
    """
    fields = _fields(_open(path))
    if fields.get("tokenizer.ggml.model") == "gpt2":
        return _byte_level_bpe(fields)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise ValueError(
            f"the {fields.get('tokenizer.ggml.model')!r} tokenizer of {path} needs torch to be "
            "read; install torch, or put the model's tokenizer.json into a folder with its weights"
        ) from error


def _byte_level_bpe(fields: dict[str, Any]):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, control = fields["tokenizer.ggml.tokens"], 3
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if kind == control
    ]
    tokenizer.add_special_tokens(special)
    named = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            named[f"{role}_token"] = tokens[index]
    template = fields.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **named,
    )

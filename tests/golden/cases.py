"""The grid of model variants that are compared with transformers, stored and live.

Every case changes the computed function: read wrongly, it moves the logits by far more than the
tolerance. Widths are so small that no folder exceeds 60 KB.
"""

import numpy as np

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OPT = {
    "model_type": "opt",
    "vocab_size": 96,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "do_layer_norm_before": True,
    "dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


def _rope(kind: str, **numbers: float) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers}}


_LLAMA3_ROPE = _rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
) | {"max_position_embeddings": 128}

# Name -> (what differs from the architecture's base, dtype of the file, bytes of a shard or None).
CASES: dict[str, tuple[dict, str, int | None]] = {
    "llama-gqa": (
        {**_LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "float16",
        None,
    ),
    "llama-biases": (
        {
            **_LLAMA,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 12,
            "tie_word_embeddings": True,
            "rms_norm_eps": 0.05,
        },
        "bfloat16",
        None,
    ),
    "llama-linear": (
        {**_LLAMA, **_rope("linear", factor=4.0), "num_key_value_heads": 1},
        "float16",
        None,
    ),
    # 14 positions are in use, more than the 8 of the configuration, so that the base is stretched.
    "llama-dynamic": (
        {**_LLAMA, **_rope("dynamic", factor=4.0), "max_position_embeddings": 8},
        "float16",
        None,
    ),
    # Widths of 16 and 32 positions put one frequency in each of llama3's three ranges.
    "llama-llama3": (
        {**_LLAMA, **_LLAMA3_ROPE, "head_dim": 16, "intermediate_size": 16, "hidden_act": "gelu"},
        "float16",
        None,
    ),
    "llama-sharded": (
        {**_LLAMA, "num_hidden_layers": 3, "num_key_value_heads": 2, "intermediate_size": 8},
        "float16",
        12_000,
    ),
    "opt-pre-norm": (_OPT, "float16", None),
    "opt-post-norm": (
        {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 24},
        "float16",
        None,
    ),
    "opt-no-bias": ({**_OPT, "enable_bias": False, "tie_word_embeddings": False}, "float16", None),
    "opt-no-affine": (
        {**_OPT, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
        "bfloat16",
        None,
    ),
}

# Only compared live: combinations of the above, and what is rarer.
LIVE_CASES: dict[str, dict] = {
    "llama-one-head": {
        **_LLAMA,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "attention_bias": True,
    },
    "llama-tied-llama3": {**_LLAMA, **_LLAMA3_ROPE, "tie_word_embeddings": True, "mlp_bias": True},
    # A sequence within the configured length, which dynamic scaling leaves alone.
    "llama-dynamic-short": {**_LLAMA, **_rope("dynamic", factor=2.0), "head_dim": 16},
    "opt-untied-projected": {**_OPT, "word_embed_proj_dim": 40, "tie_word_embeddings": False},
    "opt-post-norm-plain": {**_OPT, "do_layer_norm_before": False, "enable_bias": False},
    "opt-final-norm-removed": {**_OPT, "_remove_final_layer_norm": True},
}


def batch(length: int = 14) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int32 [3, T]: an unpadded row, a right-padded and a left-padded one."""
    rng = np.random.default_rng(7)
    ids = rng.integers(3, 96, (3, length)).astype(np.int32)
    mask = np.ones((3, length), np.int32)
    mask[1, -5:] = 0
    mask[2, :4] = 0
    return ids, mask

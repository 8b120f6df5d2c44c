"""A configuration is read whole, or refused with the key that is wrong."""

import json

import pytest

from idp_jax.formats.source import open_config
from idp_jax.models.config import from_hf, token_ids
from tests.helpers import hf_config, tiny_config

SIZES = {
    "llama": (
        *("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings"),
    ),
    "opt": (
        *("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads"),
        *("ffn_dim", "word_embed_proj_dim", "max_position_embeddings"),
    ),
}


def read(folder, architecture, **changes):
    """What is read of a tiny model's config.json with some keys changed."""
    content = hf_config(tiny_config(architecture)).to_dict() | changes
    (folder / "config.json").write_text(json.dumps(content))
    return from_hf(open_config(folder))


@pytest.mark.parametrize("value", [0, -1, 2**31, 10**30, 1.5, "64", [64], True])
@pytest.mark.parametrize(
    ("architecture", "key"), [(name, key) for name, keys in SIZES.items() for key in keys]
)
def test_a_size_that_is_none(tmp_path, architecture, key, value):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, architecture, **{key: value})
    message = str(caught.value)
    # What transformers refuses itself (a division by 0 heads), it says in words of its own.
    assert key in message or "config.json cannot be used" in message
    assert "\n" not in message


@pytest.mark.parametrize("value", [None, 0, "yes", 1.0])
@pytest.mark.parametrize(
    ("architecture", "key"),
    [("llama", "attention_bias"), ("llama", "tie_word_embeddings"), ("opt", "enable_bias")],
)
def test_a_flag_that_is_none(tmp_path, architecture, key, value):
    with pytest.raises(ValueError, match=key):
        read(tmp_path, architecture, **{key: value})


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), None, "1e4", [1e4]])
@pytest.mark.parametrize("key", ["rope_theta", "factor"])
def test_a_rotation_that_is_none(tmp_path, key, value):
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0} | {key: value}
    with pytest.raises(ValueError, match=rf"{key}|config\.json"):
        read(tmp_path, "llama", rope_parameters=rope)


@pytest.mark.parametrize("value", [-1e-5, float("nan"), float("inf")])
def test_a_norm_that_is_none(tmp_path, value):
    with pytest.raises(ValueError, match="rms_norm_eps"):
        read(tmp_path, "llama", rms_norm_eps=value)


def test_rope_turns_pairs(tmp_path):
    with pytest.raises(ValueError, match="head_dim 1 is odd"):
        read(tmp_path, "llama", num_attention_heads=64, num_key_value_heads=64, head_dim=1)


def test_tokens_may_lie_outside_the_vocabulary(tmp_path):
    config = read(tmp_path, "llama", eos_token_id=[2, 100_000], pad_token_id=-1)
    assert config.eos_token_ids == (2, 100_000) and config.pad_token_id == -1
    assert token_ids(None, "eos") == () and token_ids([3, 4], "eos") == (3, 4)

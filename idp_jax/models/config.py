"""What a decoder needs to know of a Hugging Face `config.json`; what it cannot do is refused.

The invariant: every key of the configuration that changes the function computed is either honoured
here or refused by name. Numbers come from the configuration (class defaults included, through
transformers), never from a default of ours.
"""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

Activation = Literal["silu", "relu", "gelu"]

_CORRECT = "correct config.json"
_LARGEST_NUMBER = 3e38  # of float32
_LARGEST_SIZE = 2**31 - 1  # sizes and positions are int32
_IGNORED_ROPE_KEYS = {"rope_type", "type", "rope_theta"}
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: base, kind of scaling, and what that kind needs of `rope_parameters`."""

    theta: float
    kind: str
    parameters: tuple[tuple[str, float], ...] = ()

    def __getitem__(self, key: str) -> float:
        return dict(self.parameters)[key]


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the variants of a decoder.

    `embedding_dim` differs from `hidden_dim` where the word embedding is projected (OPT-350m); a
    soft prompt has `embedding_dim`. `rope` is None where positions are learned (OPT).
    """

    architecture: Literal["llama", "opt"]
    vocab_size: int
    num_layers: int
    hidden_dim: int
    embedding_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffw_dim: int
    max_positions: int
    activation: Activation
    norm_epsilon: float
    norm_before: bool
    final_norm: bool
    norm_affine: bool
    attention_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    rope: RopeConfig | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


def from_hf(config: Any) -> ModelConfig:
    """Reads a transformers configuration object.

    Args:
        config: what `AutoConfig.from_pretrained` returns.

    Raises:
        ValueError: the architecture, or a value of a key that changes the function, is not
            supported.
    """
    readers = {"llama": _from_llama, "opt": _from_opt}
    if config.model_type not in readers:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported; supported: {', '.join(readers)}"
        )
    model_config = readers[config.model_type](config)
    if model_config.num_heads % model_config.num_kv_heads:
        raise ValueError(
            f"num_attention_heads {model_config.num_heads} is not a multiple of "
            f"num_key_value_heads {model_config.num_kv_heads}; correct config.json"
        )
    return model_config


def _size(config: Any, key: str) -> int:
    value = getattr(config, key, None)
    if isinstance(value, Integral) and not isinstance(value, bool):
        if 0 < int(value) <= _LARGEST_SIZE:
            return int(value)
    raise ValueError(f"{key} must be a whole number above 0, not {value!r:.100}; {_CORRECT}")


def _flag(config: Any, key: str) -> bool:
    value = getattr(config, key, None)
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, not {value!r:.100}; {_CORRECT}")
    return value


def _number(value: Any, key: str, least: float = math.nextafter(0.0, 1.0)) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if known and least <= value <= _LARGEST_NUMBER:
        return float(value)
    raise ValueError(f"{key} must be a positive number, not {value!r:.100}; {_CORRECT}")


def _activation(config: Any, key: str) -> Activation:
    known: dict[str, Activation] = {
        "silu": "silu",
        "swish": "silu",
        "relu": "relu",
        "gelu": "gelu",
    }
    name = getattr(config, key, None)
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"activation {name!r:.100} is not supported; supported: {', '.join(known)}"
        )
    return known[name]


def token_ids(value: Any, key: str) -> tuple[int, ...]:
    """One token or several, as a JSON file gives them; none for null.

    They may lie outside the vocabulary: such a token is never met.

    Raises:
        ValueError: no whole numbers; `key` is named.
    """
    tokens = [] if value is None else value if isinstance(value, list | tuple) else [value]
    wrong = [t for t in tokens if not isinstance(t, Integral) or isinstance(t, bool)]
    if wrong:
        raise ValueError(f"{key} must be token numbers, not {wrong[0]!r:.100}; correct the file")
    return tuple(int(token) for token in tokens)


def _token(config: Any, key: str) -> int | None:
    value = getattr(config, key, None)
    return None if value is None else token_ids([value], key)[0]


def _rope(config: Any) -> RopeConfig:
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        raise ValueError(f"rope_parameters must be an object, not {parameters!r:.100}; {_CORRECT}")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise ValueError(
            f"rope_type {kind!r:.100} is not supported; supported: {', '.join(_ROPE_KEYS)}"
        )
    # A partial rotation, or a key this kind does not define, would change the function unnoticed.
    extra = {k: v for k, v in parameters.items() if k not in _ROPE_KEYS[kind] | _IGNORED_ROPE_KEYS}
    if extra.pop("partial_rotary_factor", 1.0) != 1.0 or extra.keys() - {
        "original_max_position_embeddings"
    }:
        raise ValueError(
            f"rope_parameters {parameters!r:.200} has keys that rope_type {kind!r} does not support"
        )
    missing = (_ROPE_KEYS[kind] | {"rope_theta"}) - parameters.keys()
    if missing:
        raise ValueError(f"rope_parameters lacks {sorted(missing)} for rope_type {kind!r}")
    numbers = tuple((key, _number(parameters[key], key)) for key in sorted(_ROPE_KEYS[kind]))
    return RopeConfig(_number(parameters["rope_theta"], "rope_theta"), kind, numbers)


def _from_llama(config: Any) -> ModelConfig:
    head_dim = _size(config, "head_dim")
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd, and RoPE turns pairs; {_CORRECT}")
    return ModelConfig(
        architecture="llama",
        vocab_size=_size(config, "vocab_size"),
        num_layers=_size(config, "num_hidden_layers"),
        hidden_dim=_size(config, "hidden_size"),
        embedding_dim=_size(config, "hidden_size"),
        num_heads=_size(config, "num_attention_heads"),
        num_kv_heads=_size(config, "num_key_value_heads"),
        head_dim=head_dim,
        ffw_dim=_size(config, "intermediate_size"),
        max_positions=_size(config, "max_position_embeddings"),
        activation=_activation(config, "hidden_act"),
        norm_epsilon=_number(config.rms_norm_eps, "rms_norm_eps", 0.0),
        norm_before=True,
        final_norm=True,
        norm_affine=True,
        attention_bias=_flag(config, "attention_bias"),
        mlp_bias=_flag(config, "mlp_bias"),
        tied_embeddings=_flag(config, "tie_word_embeddings"),
        rope=_rope(config),
        bos_token_id=_token(config, "bos_token_id"),
        eos_token_ids=token_ids(config.eos_token_id, "eos_token_id"),
        pad_token_id=_token(config, "pad_token_id"),
    )


def _from_opt(config: Any) -> ModelConfig:
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    if hidden % heads:
        raise ValueError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; {_CORRECT}"
        )
    before = _flag(config, "do_layer_norm_before")
    return ModelConfig(
        architecture="opt",
        vocab_size=_size(config, "vocab_size"),
        num_layers=_size(config, "num_hidden_layers"),
        hidden_dim=hidden,
        embedding_dim=_size(config, "word_embed_proj_dim"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffw_dim=_size(config, "ffn_dim"),
        max_positions=_size(config, "max_position_embeddings"),
        activation=_activation(config, "activation_function"),
        norm_epsilon=1e-5,  # torch's LayerNorm default; OPT's config has no key for it
        norm_before=before,
        final_norm=before and not _flag(config, "_remove_final_layer_norm"),
        norm_affine=_flag(config, "layer_norm_elementwise_affine"),
        attention_bias=_flag(config, "enable_bias"),
        mlp_bias=_flag(config, "enable_bias"),
        tied_embeddings=_flag(config, "tie_word_embeddings"),
        rope=None,
        bos_token_id=_token(config, "bos_token_id"),
        eos_token_ids=token_ids(config.eos_token_id, "eos_token_id"),
        pad_token_id=_token(config, "pad_token_id"),
    )

"""What a decoder needs to know of a Hugging Face `config.json`; what it cannot do is refused.

The invariant: every key of the configuration that changes the function computed is either honoured
here or refused by name. Numbers come from the configuration (class defaults included, through
transformers), never from a default of ours.
"""

from dataclasses import dataclass
from typing import Any, Literal

Activation = Literal["silu", "relu", "gelu"]

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


def _activation(name: str) -> Activation:
    known: dict[str, Activation] = {
        "silu": "silu",
        "swish": "silu",
        "relu": "relu",
        "gelu": "gelu",
    }
    if name not in known:
        raise ValueError(f"activation {name!r} is not supported; supported: {', '.join(known)}")
    return known[name]


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _rope(config: Any) -> RopeConfig:
    parameters = dict(config.rope_parameters)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise ValueError(f"rope_type {kind!r} is not supported; supported: {', '.join(_ROPE_KEYS)}")
    # A partial rotation, or a key this kind does not define, would change the function unnoticed.
    extra = {k: v for k, v in parameters.items() if k not in _ROPE_KEYS[kind] | _IGNORED_ROPE_KEYS}
    if extra.pop("partial_rotary_factor", 1.0) != 1.0 or extra.keys() - {
        "original_max_position_embeddings"
    }:
        raise ValueError(
            f"rope_parameters {parameters} has keys that rope_type {kind!r} does not support"
        )
    missing = _ROPE_KEYS[kind] - parameters.keys()
    if missing:
        raise ValueError(f"rope_parameters lacks {sorted(missing)} for rope_type {kind!r}")
    numbers = tuple((key, float(parameters[key])) for key in sorted(_ROPE_KEYS[kind]))
    return RopeConfig(float(parameters["rope_theta"]), kind, numbers)


def _from_llama(config: Any) -> ModelConfig:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelConfig(
        architecture="llama",
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        hidden_dim=config.hidden_size,
        embedding_dim=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        ffw_dim=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        activation=_activation(config.hidden_act),
        norm_epsilon=config.rms_norm_eps,
        norm_before=True,
        final_norm=True,
        norm_affine=True,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        tied_embeddings=config.tie_word_embeddings,
        rope=_rope(config),
        bos_token_id=config.bos_token_id,
        eos_token_ids=_token_ids(config.eos_token_id),
        pad_token_id=config.pad_token_id,
    )


def _from_opt(config: Any) -> ModelConfig:
    return ModelConfig(
        architecture="opt",
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        hidden_dim=config.hidden_size,
        embedding_dim=config.word_embed_proj_dim,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        ffw_dim=config.ffn_dim,
        max_positions=config.max_position_embeddings,
        activation=_activation(config.activation_function),
        norm_epsilon=1e-5,  # torch's LayerNorm default; OPT's config has no key for it
        norm_before=config.do_layer_norm_before,
        final_norm=config.do_layer_norm_before and not config._remove_final_layer_norm,
        norm_affine=config.layer_norm_elementwise_affine,
        attention_bias=config.enable_bias,
        mlp_bias=config.enable_bias,
        tied_embeddings=config.tie_word_embeddings,
        rope=None,
        bos_token_id=config.bos_token_id,
        eos_token_ids=_token_ids(config.eos_token_id),
        pad_token_id=config.pad_token_id,
    )

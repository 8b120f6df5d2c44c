"""The trainable parts: soft prompt, prefix, LoRA, and a pool of prompts.

An adapter is a module of its own; the frozen model is never touched. `repair(decoder)` is a pure,
differentiable function, so training
differentiates it with respect to the adapter and nothing else can change.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from idp_jax.models.cache import KV
from idp_jax.models.decoder import Decoder
from idp_jax.recover.repaired import Repaired, encode_prompts
from idp_jax.recover.selectors import Selector, attention_scores
from idp_jax.weights import Lora


def parameter_count(adapter: nnx.Module) -> int:
    """The number of numbers that an adapter adds to the model."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(adapter))


class SoftPrompt(nnx.Module):
    """Prompt tuning: `embeddings` [P, E] stand before the input's.

    Source: "The Power of Scale for Parameter-Efficient Prompt Tuning".
    """

    def __init__(self, embeddings: jax.Array):
        self.embeddings = nnx.Param(embeddings)

    @classmethod
    def init(cls, decoder: Decoder, length: int, key: jax.Array) -> "SoftPrompt":
        """A prompt of `length` rows of the vocabulary's embedding, drawn without repetition."""
        config = decoder.config
        if not 0 <= length <= min(config.max_positions, config.vocab_size):
            raise ValueError(
                f"prompt length {length} is out of range; it must lie between 0 and "
                f"{config.max_positions}"
            )
        rows = jax.random.choice(key, config.vocab_size, (length,), replace=False)
        return cls(decoder.embedding[...][rows].astype(jnp.float32))

    @property
    def length(self) -> int:
        """The number of prompt tokens P."""
        return self.embeddings.shape[0]

    def repair(self, decoder: Decoder) -> Repaired:
        """The model with this prompt before every input."""
        if not self.length:
            return Repaired(decoder)
        return Repaired(decoder, encode_prompts(decoder, [self.embeddings[...]]))


class PrefixAdapter(nnx.Module):
    """Prefix tuning without a reparameterisation: keys (after RoPE) and values [L, P, K, H] of
    every layer.

    Source: "Prefix-Tuning: Optimizing Continuous Prompts for Generation".
    """

    def __init__(self, k: jax.Array, v: jax.Array):
        self.k = nnx.Param(k)
        self.v = nnx.Param(v)

    @classmethod
    def init(cls, decoder: Decoder, length: int, key: jax.Array) -> "PrefixAdapter":
        """Starts from the keys and values of a real prompt of `length` vocabulary rows."""
        prompt = SoftPrompt.init(decoder, length, key)
        kv = encode_prompts(decoder, [prompt.embeddings[...]])
        return cls(kv.k[:, 0].astype(jnp.float32), kv.v[:, 0].astype(jnp.float32))

    def repair(self, decoder: Decoder) -> Repaired:
        """The model with this prefix before every input; the input starts at position P."""
        length = self.k.shape[1]
        dtype = decoder.embedding.dtype
        k, v = self.k[...][:, None].astype(dtype), self.v[...][:, None].astype(dtype)
        return Repaired(
            decoder, KV(k, v, jnp.ones((1, length), bool), jnp.full((1,), length, jnp.int32))
        )


class LoraAdapter(nnx.Module):
    """Low-rank updates beside some matrices of every layer.

    Source: "LoRA: Low-Rank Adaptation of Large Language Models".

    Attributes:
        a: by matrix name, [L, I, r]; b: [L, r, O].
        alpha: the update is scaled by alpha / r.
    """

    def __init__(self, a: dict[str, jax.Array], b: dict[str, jax.Array], alpha: float):
        self.a = nnx.Dict({name: nnx.Param(value) for name, value in a.items()})
        self.b = nnx.Dict({name: nnx.Param(value) for name, value in b.items()})
        self.alpha = alpha

    @classmethod
    def init(
        cls,
        decoder: Decoder,
        rank: int,
        key: jax.Array,
        *,
        alpha: float = 16.0,
        targets: tuple[str, ...] = ("q", "v"),
    ) -> "LoraAdapter":
        """A uniform in +-1/sqrt(I) and B zero, as PEFT starts; so the model is unchanged at
        first.
        """
        known = decoder.layers.weight_names
        unknown = [name for name in targets if name not in known]
        if unknown:
            raise ValueError(
                f"no matrix {unknown[0]!r} for LoRA; this model has {', '.join(known)}"
            )
        if not targets:
            raise ValueError(f"LoRA needs at least one matrix; this model has {', '.join(known)}")
        if rank < 1:
            raise ValueError(f"LoRA rank {rank} must be at least 1")
        a, b = {}, {}
        for name, subkey in zip(targets, jax.random.split(key, len(targets)), strict=True):
            inputs, outputs = matrix_shape(decoder, name)
            layers = decoder.config.num_layers
            bound = inputs**-0.5
            a[name] = jax.random.uniform(subkey, (layers, inputs, rank), jnp.float32, -bound, bound)
            b[name] = jnp.zeros((layers, rank, outputs), jnp.float32)
        return cls(a, b, alpha)

    @property
    def rank(self) -> int:
        """The rank r."""
        return next(iter(self.a.values())).shape[-1]

    def repair(self, decoder: Decoder) -> Repaired:
        """The model with the updates beside its frozen matrices (not merged)."""
        dtype = decoder.embedding.dtype
        with_updates = {
            name: Lora(
                getattr(decoder.layers, name),
                self.a[name][...].astype(dtype),
                self.b[name][...].astype(dtype),
                self.alpha / self.rank,
            )
            for name in self.a
        }
        return Repaired(decoder.with_layers(decoder.layers.replace(**with_updates)))


class Pool(nnx.Module):
    """Inference-time dynamic prompting: several soft prompts, one chosen per input.

    Source: arXiv 2310.00867; what is ours of it is said in `selectors`.
    """

    def __init__(self, prompts: list[SoftPrompt], selector: Selector = attention_scores):
        self.prompts = nnx.List(prompts)
        self.selector = selector

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of every prompt."""
        return [prompt.length for prompt in self.prompts]

    def repair(self, decoder: Decoder) -> Repaired:
        """The model with the pool's prefixes stored, one row each."""
        prefix = encode_prompts(decoder, [prompt.embeddings[...] for prompt in self.prompts])
        return Repaired(decoder, prefix, self.selector)


def matrix_shape(decoder: Decoder, name: str) -> tuple[int, int]:
    """(inputs, outputs) of a matrix of the blocks."""
    c = decoder.config
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "q": (c.hidden_dim, queries),
        "k": (c.hidden_dim, keys),
        "v": (c.hidden_dim, keys),
        "o": (queries, c.hidden_dim),
        "gate": (c.hidden_dim, c.ffw_dim),
        "up": (c.hidden_dim, c.ffw_dim),
        "down": (c.ffw_dim, c.hidden_dim),
    }[name]

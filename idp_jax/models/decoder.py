"""The decoder: embeddings, one scan over the stacked layers, the final norm and the head.

Compile time does not grow with depth, because the layers are one loop (but where a CPU decodes, see
`storage.layers_apart`). Everything that stands before an input (a soft prompt's prefix, a pool's
choice, a decoding cache) is a `KV`; the decoder attends to it and to the input, and knows nothing
else of prompts.
"""

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from idp_jax.kernels.devices import platform
from idp_jax.models.attention import KEPT, Context
from idp_jax.models.block import Block, scan_layers
from idp_jax.models.cache import KV
from idp_jax.models.config import ModelConfig
from idp_jax.models.embedding import rows_of
from idp_jax.models.head import Head
from idp_jax.models.inputs import token_arrays
from idp_jax.models.layers import Norm, rope_frequencies, rotation, seen_tokens, visibility
from idp_jax.sharding import constrain
from idp_jax.weights import Dense
from idp_jax.weights.dense import Array

Remat = Literal["none", "dots", "layer"]
# What the axes of the residual stream mean, and of what is kept of it for the backward pass.
_STREAM = ("batch", "time", "embed_activation")
_KEPT_STREAM = ("batch", "kept_time", "embed_activation")
OPT_POSITION_OFFSET = 2  # the first two rows of OPT's position table are never used


class Decoder(nnx.Module):
    """A LLaMA or OPT language model.

    Attributes:
        embedding: [V, E]; E = `config.embedding_dim`.
        positions: [max_positions + 2, D], or None with rotary positions.
        project_in, project_out: weights E -> D and D -> E, or None where E = D.
        layers: a `Block` whose arrays carry all layers on a leading axis.
        head: weight E -> V, or None where it is tied to the embedding.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: Array,
        layers: Block,
        final_norm: Norm | None,
        head: Dense | None = None,
        positions: Array | None = None,
        project_in: Dense | None = None,
        project_out: Dense | None = None,
    ):
        self.config = config
        self.embedding = nnx.Param(embedding)
        self.positions = None if positions is None else nnx.Param(positions)
        self.project_in = project_in
        self.project_out = project_out
        self.layers = layers
        self.final_norm = final_norm
        self.head = head

    def __call__(self, input_ids, attention_mask=None, *, past: KV | None = None) -> jax.Array:
        """Next-token logits.

        Args:
            input_ids: int [B, T]; or what a tokenizer returns, which has the mask too.
            attention_mask: int [B, T], 1 for text and 0 for padding on either side; default all 1.
            past: keys and values that stand before the input.

        Returns:
            float32 [B, T, V]; rows of padding hold no meaning.

        Raises:
            ValueError: an id lies outside the vocabulary, the input is longer than learned
                positions allow, or its rows have different lengths.
        """
        input_ids, mask = token_arrays(input_ids, attention_mask)
        self.check(input_ids, past)
        return _logits(self, input_ids, mask, past)

    def check(self, input_ids, past: KV | None = None, segments=None) -> None:
        """Refuses ids outside the vocabulary and inputs beyond the learned positions.

        Args:
            segments: int [B, T] or None: the document of each token, which each have the positions
                to themselves.

        Raises:
            ValueError: with the offending value.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [B, T], got shape {tuple(input_ids.shape)}")
        # Inside a jit nothing is known of the values.
        known = input_ids.size and not isinstance(input_ids, Tracer)
        low, high = (int(input_ids.min()), int(input_ids.max())) if known else (0, 0)
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(
                f"token id {bad} is outside the vocabulary of {self.config.vocab_size}; "
                "use the tokenizer that belongs to this model"
            )
        tokens = input_ids.shape[1]
        if segments is not None and not isinstance(segments, Tracer):
            tokens = _longest(np.asarray(segments))
        self._check_length(tokens, past)

    def _check_length(self, tokens: int, past: KV | None) -> None:
        """Refuses `tokens` behind `past` where they end beyond the learned positions."""
        end = tokens + (0 if past is None else past.length)
        if self.config.rope is None and end > self.config.max_positions:
            raise ValueError(
                f"{end} tokens (prompt included) exceed the {self.config.max_positions} learned "
                "positions; shorten the input"
            )

    def embed(self, input_ids) -> jax.Array:
        """Word embeddings [B, T, E]."""
        with jax.named_scope("embed"):
            return rows_of(self.embedding[...], input_ids)

    def start(self, embeddings, attention_mask=None, past: KV | None = None, segments=None):
        """The residual stream that enters layer 0, and the context that all layers share.

        Args:
            embeddings: [B, T, E] word or prompt embeddings.
            attention_mask: int [B, T] or None, see `layers.visibility`.
            segments: int [B, T] or None: the document of each token. Documents see the past and
                themselves, and each begins at the position behind the past.

        Returns:
            h [B, T, D], the `Context`, and the position of the token after each row's last, [B].

        Raises:
            ValueError: without a mask or segments, more tokens (prompt included) than learned
                positions. With them, how far a text goes is known on the device only: there a row
                that goes beyond the positions is not a number.
        """
        with jax.named_scope("embed"):
            return self._start(embeddings, attention_mask, past, segments)

    def _start(self, embeddings, attention_mask, past: KV | None, segments):
        plain = attention_mask is None
        if plain and segments is None:
            self._check_length(embeddings.shape[1], past)
        if plain:
            # A row of plain text is like any other: one serves all.
            rows = 1 if segments is None else embeddings.shape[0]
            attention_mask = jnp.ones((rows, embeddings.shape[1]), jnp.int32)
        visible = visibility(attention_mask, segments)
        first = jnp.zeros((1,), jnp.int32) if past is None else past.next_position
        # A token's position is the number of tokens it sees before itself, whatever the padding.
        seen = seen_tokens(attention_mask, segments)
        positions = first[:, None] + jnp.maximum(seen - 1, 0)
        h = embeddings
        if self.project_in is not None:
            h = self.project_in(h)
        turns = None
        if self.positions is not None:
            # Plain indexing would give a token beyond the table its last row without a word.
            rows = self.positions[...].at[positions + OPT_POSITION_OFFSET]
            h = h + rows.get(mode="fill", fill_value=jnp.nan).astype(h.dtype)
        else:
            turns = rotation(positions, self._frequencies(positions))
        context = Context(visible, turns, segments, plain)
        h = constrain(h, *_STREAM)
        return h, context, first + seen.max(-1)

    def _frequencies(self, positions: jax.Array) -> jax.Array:
        config = self.config
        assert config.rope is not None
        return rope_frequencies(
            config.rope, config.head_dim, config.max_positions, positions.max() + 1
        )

    @overload
    def hidden(
        self,
        input_ids=...,
        attention_mask=...,
        *,
        embeddings=...,
        past: KV | None = ...,
        segments=...,
        keep: Literal[True],
        remat: Remat | None = ...,
        layers: tuple[Block, ...] | None = ...,
    ) -> tuple[jax.Array, KV]: ...

    @overload
    def hidden(
        self,
        input_ids=...,
        attention_mask=...,
        *,
        embeddings=...,
        past: KV | None = ...,
        segments=...,
        keep: Literal[False] = ...,
        remat: Remat | None = ...,
        layers: tuple[Block, ...] | None = ...,
    ) -> jax.Array: ...

    def hidden(
        self,
        input_ids=None,
        attention_mask=None,
        *,
        embeddings=None,
        past: KV | None = None,
        segments=None,
        keep: bool = False,
        remat: Remat | None = None,
        layers: tuple[Block, ...] | None = None,
    ):
        """The last hidden state, ready for `logits`.

        Args:
            input_ids: int [B, T], or give `embeddings` [B, T, E].
            segments: int [B, T], the document of each token; see `start`.
            keep: also return this input's keys and values (static).
            remat: what the backward pass makes again: "none" of the activations, all but the
                results of matrices ("dots"), or a "layer" from its input alone, instead of
                keeping what their matrices gave (static); by default `default_remat`.
            layers: the model's own, one by one; see `storage.layers_apart`.

        Returns:
            [B, T, E], and with `keep` a pair of it and the `KV` of the input alone.

        Raises:
            ValueError: as `start`; or segments are to be kept, which one text cannot follow.
        """
        if keep and segments is not None:
            raise ValueError("keys and values of several documents are no past; keep one document")
        embeddings = self.embed(input_ids) if embeddings is None else embeddings
        h, context, next_position = self.start(embeddings, attention_mask, past, segments)

        def layer(h, xs):
            block, stored = xs
            h, kv = block(constrain(h, *_STREAM), context, stored)
            return h, (kv if keep else None)

        kept, remat = layer, remat or default_remat()
        if remat != "none":
            policy = None
            if remat == "dots":
                policy = jax.checkpoint_policies.save_only_these_names(KEPT)
            kept = jax.checkpoint(layer, prevent_cse=False, policy=policy)

        def step(h, xs):
            # Of what alone is kept of a layer, all devices that share a matrix keep a part.
            return kept(constrain(h, *_KEPT_STREAM) if remat == "layer" else h, xs)

        stored = None if past is None else (past.k, past.v, past.layer_masks())
        with jax.named_scope("layers"):
            h, kv = scan_layers(step, h, layers or self.layers, stored)
        h = self.finish(constrain(h, *_STREAM))
        if not keep:
            return h
        mask = jnp.ones(h.shape[:2], bool) if attention_mask is None else attention_mask > 0
        next_position = jnp.broadcast_to(next_position, (h.shape[0],))
        return h, KV(kv[0], kv[1], mask, next_position)

    def finish(self, h: jax.Array) -> jax.Array:
        """The final norm and projection: [B, T, D] -> [B, T, E]."""
        with jax.named_scope("head"):
            if self.final_norm is not None:
                h = self.final_norm(h)
            return h if self.project_out is None else self.project_out(h)

    def output_head(self) -> Head:
        """What `logits` multiplies by, which may be used without the model."""
        if self.head is None:
            return Head(self.embedding[...], turned=True)
        return Head(self.head.kernel[...], turned=False)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., E]."""
        return self.output_head()(hidden)

    def with_layers(self, layers: Block) -> "Decoder":
        """The same model with other layers (a LoRA attached, a block compressed)."""
        copy = jax.tree.map(lambda x: x, self)
        copy.layers = layers
        return copy

    def logical_axes(self) -> dict[str, Any]:
        """What the axes of the parameters mean, see `sharding.declared_axes`."""
        axes: dict[str, Any] = {
            "embedding": ("vocab", "embed"),
            "positions": (None, "embed_activation"),
        }
        # The word embedding's width is whole where it is not the residual stream's.
        outer = {
            "head": ("embed", "vocab"),
            "project_in": (None, "embed"),
            "project_out": ("embed", None),
        }
        for name, meaning in outer.items():
            weight = getattr(self, name)
            if weight is not None:
                axes[name] = weight.logical_axes(*meaning)
        for name in ("layers", "final_norm"):
            part = getattr(self, name)
            if part is not None:
                axes[name] = part.logical_axes()
        return axes


def default_remat() -> Remat:
    """What pays: on accelerators, to make layers again, so that larger batches have room."""
    return "dots" if platform() == "cpu" else "layer"


def _longest(segments: np.ndarray) -> int:
    """The most tokens that a document has in a row of [B, T]."""
    counts = [np.unique(row, return_counts=True)[1].max(initial=0) for row in segments]
    return int(max(counts, default=0))


@jax.jit
def _logits(model: Decoder, input_ids, attention_mask, past) -> jax.Array:
    return model.logits(model.hidden(input_ids, attention_mask, past=past))

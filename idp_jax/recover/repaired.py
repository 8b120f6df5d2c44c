"""A model with its repair beside it, called like the model.

By causality the keys and values of a prompt do not depend on the input, so they are computed once,
here, and stored: serving a pool is
choosing one of M stored rows per input. Prompts never see each other, and the input follows its
prompt directly.
"""

import jax
import jax.numpy as jnp
from flax import struct

from idp_jax.models.cache import KV
from idp_jax.models.decoder import Decoder
from idp_jax.models.inputs import token_arrays
from idp_jax.recover.selectors import Selector, attention_scores, layer0_inputs


class Repaired(struct.PyTreeNode):
    """A decoder (a LoRA already attached) and what stands before every input.

    Attributes:
        decoder: the model.
        prefix: None; or stored keys and values with one row; or a pool with one row per prompt.
        selector: how a pool's row is chosen, see `selectors`.
    """

    decoder: Decoder
    prefix: KV | None = None
    selector: Selector = struct.field(pytree_node=False, default=attention_scores)

    @staticmethod
    def of(model: "Decoder | Repaired") -> "Repaired":
        """A bare model as a Repaired without a repair; a Repaired as it is."""
        return model if isinstance(model, Repaired) else Repaired(model)

    def choose(self, input_ids, attention_mask=None) -> jax.Array | None:
        """The pool's prompt for every row, int32 [B]; None where there is nothing to choose.

        Only tokens whose mask is 1 count, so that answers under test, marked as branches, do not
        choose their own prompt.
        """
        if self.prefix is None or self.prefix.batch == 1:
            return None
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        scores = self.selector(layer0_inputs(self.decoder, self.prefix, input_ids, mask))
        return jnp.argmax(scores, -1).astype(jnp.int32)

    def past(self, input_ids, attention_mask=None) -> KV | None:
        """The stored keys and values for every row of the input (one shared row where there is no
        choice).
        """
        index = self.choose(input_ids, attention_mask)
        return self.prefix if index is None or self.prefix is None else self.prefix.rows(index)

    def __call__(self, input_ids, attention_mask=None) -> jax.Array:
        """Next-token logits, float32 [B, T, V]; arguments and errors as of `Decoder.__call__`."""
        input_ids, mask = token_arrays(input_ids, attention_mask)
        self.decoder.check(input_ids, self.prefix)
        return _logits(self, input_ids, mask)


@jax.jit
def _logits(repaired: Repaired, input_ids, attention_mask) -> jax.Array:
    past = repaired.past(input_ids, attention_mask)
    return repaired.decoder.logits(repaired.decoder.hidden(input_ids, attention_mask, past=past))


@jax.jit
def encode_prompts(decoder: Decoder, prompts: list[jax.Array]) -> KV:
    """Runs soft prompts [n_i, E] through the model, apart from each other, and keeps their keys and
    values.

    Prompts of several lengths are padded on the left to the longest, N. With rotary positions all
    end at position N - 1 (only
    distances matter, so this equals training alone). Learned positions are kept as trained, 0 to
    n_i - 1, and the input starts at n_i.

    Returns:
        A KV with one row per prompt.
    """
    longest = max(prompt.shape[0] for prompt in prompts)
    empty = [longest - prompt.shape[0] for prompt in prompts]
    embeddings = jnp.stack(
        [jnp.pad(p, [(n, 0), (0, 0)]) for p, n in zip(prompts, empty, strict=True)]
    ).astype(decoder.embedding.dtype)
    mask = jnp.arange(longest)[None] >= jnp.asarray(empty)[:, None]
    config = decoder.config
    first = jnp.asarray(empty if config.rope is not None else [0] * len(empty), jnp.int32)
    shape = (config.num_layers, len(prompts), 0, config.num_kv_heads, config.head_dim)
    nothing = jnp.zeros(shape, embeddings.dtype)
    before = KV(nothing, nothing, jnp.zeros((len(prompts), 0), bool), first)
    return decoder.hidden(
        None, mask.astype(jnp.int32), embeddings=embeddings, past=before, keep=True
    )[1]

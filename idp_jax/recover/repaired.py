"""A model with its repair beside it, called like the model.

By causality the keys and values of a prompt do not depend on the input, so they are computed once,
here, and stored: serving a pool is choosing one of M stored rows per input. Prompts never see each
other, and the input follows its prompt directly.
"""

import jax
import jax.numpy as jnp
from flax import struct

from idp_jax.models.cache import KV
from idp_jax.models.decoder import Decoder
from idp_jax.models.inputs import token_arrays
from idp_jax.recover.selection import Selection, as_selection
from idp_jax.recover.selectors import ScoreInputs, Selector, layer0_inputs
from idp_jax.sharding import batch_parts, constrain


class Repaired(struct.PyTreeNode):
    """A decoder (a LoRA already attached) and what stands before every input.

    Attributes:
        decoder: the model.
        prefix: None; or stored keys and values with one row; or a pool with one row per prompt.
        prompt_embeddings: [M, P, E] of a pool's prompts, for its selector; None where the prefix
            did not come from embeddings.
        selector: what scores a pool's prompts; see `with_selector`.
        copied: whether the prefix' rows are copies of one, see `copies_of_batch` (static).
    """

    decoder: Decoder
    prefix: KV | None = None
    prompt_embeddings: jax.Array | None = None
    selector: Selection | None = None
    copied: bool = struct.field(pytree_node=False, default=False)

    @staticmethod
    def of(model: "Decoder | Repaired") -> "Repaired":
        """A bare model as a Repaired without a repair; a Repaired as it is."""
        return model if isinstance(model, Repaired) else Repaired(model)

    @property
    def choices(self) -> int:
        """How many prompts there are to choose from: 1 where there is no choice, 0 without any."""
        if self.prefix is None:
            return 0
        return 1 if self.copied else self.prefix.batch

    def with_selector(self, selector: str | Selector) -> "Repaired":
        """The same pool with another selector: a name, a function or an nnx module.

        Raises:
            ValueError: as `selection.find_selector`.
        """
        return self.replace(selector=as_selection(selector))

    def scores(self, input_ids, attention_mask=None) -> jax.Array | None:
        """The selector's scores [B, M]; None where there is nothing to choose.

        Only tokens whose mask is 1 count, so that answers under test, marked as branches, do not
        choose their own prompt.
        """
        inputs = self.selector_inputs(input_ids, attention_mask)
        return None if inputs is None or self.selector is None else self.selector(inputs)

    def selector_inputs(self, input_ids, attention_mask=None) -> ScoreInputs | None:
        """What the selector may look at; None as in `scores`.

        Raises:
            ValueError: there is something to choose, and no selector.
        """
        if self.prefix is None or self.choices == 1:
            return None
        if self.selector is None:
            raise ValueError(f"a pool of {self.choices} prompts needs a selector")
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        return layer0_inputs(self.decoder, self.prefix, input_ids, mask, self.prompt_embeddings)

    def choose(self, input_ids, attention_mask=None) -> jax.Array | None:
        """The prompt with the largest score for every row, int32 [B]; None as in `scores`.

        Where a score is not a number, or none is finite from below, it is M, which no prompt has:
        see `KV.rows`.
        """
        scores = self.scores(input_ids, attention_mask)
        if scores is None:
            return None
        some = scores.max(-1).astype(jnp.float32) > -jnp.inf  # false of NaN, too
        return jnp.where(some, jnp.argmax(scores, -1), scores.shape[-1]).astype(jnp.int32)

    def past(self, input_ids, attention_mask=None) -> KV | None:
        """The stored keys and values for every row; one shared row where there is no choice."""
        index = self.choose(input_ids, attention_mask)
        return self.prefix if index is None or self.prefix is None else self.prefix.rows(index)

    def serve(self, input_ids, attention_mask=None) -> tuple[KV | None, dict[str, jax.Array]]:
        """What stands before every row in training, and what its choice adds to the loss.

        Returns:
            As `past`, and float32 scalars by name, which `with_penalties` adds to the loss.
        """
        return self.past(input_ids, attention_mask), {}

    def __call__(self, input_ids, attention_mask=None) -> jax.Array:
        """Next-token logits, float32 [B, T, V]; arguments and errors as of `Decoder.__call__`."""
        input_ids, mask = token_arrays(input_ids, attention_mask)
        self.decoder.check(input_ids, self.prefix)
        return _logits(self, input_ids, mask)


_NOTES = ("usage_entropy",)


def with_penalties(loss: jax.Array, penalties: dict[str, jax.Array]) -> jax.Array:
    """A loss and what `Repaired.serve` adds to it; a note among that is told, not added."""
    return sum((value for name, value in penalties.items() if name not in _NOTES), loss)


@jax.jit
def _logits(repaired: Repaired, input_ids, attention_mask) -> jax.Array:
    past = repaired.past(input_ids, attention_mask)
    return repaired.decoder.logits(repaired.decoder.hidden(input_ids, attention_mask, past=past))


def stack_prompts(prompts: list[jax.Array]) -> jax.Array:
    """Prompts [n_i, E], padded on the left to the longest, as one array [M, P, E]."""
    longest = max(prompt.shape[0] for prompt in prompts)
    return jnp.stack([jnp.pad(p, [(longest - p.shape[0], 0), (0, 0)]) for p in prompts])


def copies_of_batch(x: jax.Array) -> jax.Array:
    """A copy of x for each part that the mesh cuts a batch into, [R, ...], where that part lies.

    What is differentiated with respect to its own copy is summed over the devices once, behind
    everything that was made of the copies, and not wherever a batch meets it: a prompt's own
    gradient is small, that of its keys and values in all layers is not.
    """
    parts = batch_parts(jax.sharding.get_abstract_mesh())
    return constrain(jnp.broadcast_to(x, (parts, *x.shape)), "batch", *[None] * x.ndim)


@jax.jit
def encode_prompts(decoder: Decoder, prompts: list[jax.Array]) -> KV:
    """Runs soft prompts [n_i, E] through the model, apart from each other.

    Prompts of several lengths are padded on the left to the longest, N. With rotary positions all
    end at position N - 1 (only distances matter, so this equals training alone). Learned positions
    are kept as trained, 0 to n_i - 1, and the input starts at n_i.

    Returns:
        Their keys and values, one row per prompt.
    """
    embeddings = stack_prompts(prompts)
    empty = [embeddings.shape[1] - prompt.shape[0] for prompt in prompts]
    return encode_rows(decoder, embeddings, empty)


def encode_rows(decoder: Decoder, embeddings: jax.Array, empty: list[int]) -> KV:
    """As `encode_prompts`, of prompts [M, N, E] whose first tokens, `empty` many, are none."""
    embeddings = embeddings.astype(decoder.embedding.dtype)
    longest = embeddings.shape[1]
    mask = jnp.arange(longest)[None] >= jnp.asarray(empty)[:, None]
    config = decoder.config
    first = jnp.asarray(empty if config.rope is not None else [0] * len(empty), jnp.int32)
    shape = (config.num_layers, len(empty), 0, config.num_kv_heads, config.head_dim)
    nothing = jnp.zeros(shape, embeddings.dtype)
    before = KV(nothing, nothing, jnp.zeros((len(empty), 0), bool), first)
    return decoder.hidden(
        None, mask.astype(jnp.int32), embeddings=embeddings, past=before, keep=True
    )[1]

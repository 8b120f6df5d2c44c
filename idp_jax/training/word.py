"""What a teacher says of the next token at every position, in three forms, and how far one is off.

Each form measures the forward KL divergence KL(q || p) of the teacher's distribution q = softmax(t)
and the student's p = softmax(s), both at temperature T and times T^2, so that the gradient's size
does not depend on it (Hinton et al. 2015, arXiv:1503.02531):

- `Full`: over the whole vocabulary. d/ds = p - q.
- `TopK`: over the teacher's K likeliest tokens and one cell more, all others together, with the
  masses r_q and r_p. It is never above the KL (data processing), and d/ds is p - q for the K tokens
  and p (1 - r_q / r_p) for the others: right for each of the K and for the others' sum, but among
  the others the student keeps its own proportions. Truncation that renormalises the K has another
  optimum, one where the student is as sure as the teacher's head alone.
- `Sampled`: N tokens drawn from q itself (importance sampling whose proposal is the target, so that
  every weight is 1 / N; "Sparse Logit Sampling", arXiv:2503.16870, section 4). d/ds is p less the
  share of each token among the N, whose mean is q: no bias. The N draws of a position lie at equal
  steps of q's cumulative distribution behind one random offset (systematic sampling): every token
  still has N q draws on average, with less variance than N independent ones. The teacher's entropy,
  kept beside them, makes the value a divergence as well.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from idp_jax.models.head import Head
from idp_jax.training.chunks import join, split

_NONE = -1e30  # a logit that counts for nothing; finite, so that no gradient is inf * 0


class Full(struct.PyTreeNode):
    """The teacher's logits, float32 [..., V]."""

    logits: jax.Array
    temperature: float = struct.field(pytree_node=False, default=1.0)

    def divergence(self, logits: jax.Array) -> jax.Array:
        """KL(teacher || student) times T^2, [...]; `logits` are the student's, [..., V]."""
        theirs = jax.nn.log_softmax(self.logits / jnp.float32(self.temperature))
        ours = jax.nn.log_softmax(logits / jnp.float32(self.temperature))
        found = (jnp.exp(theirs) * (theirs - ours)).sum(-1)
        return found * jnp.float32(self.temperature**2)


class TopK(struct.PyTreeNode):
    """The K likeliest tokens and the rest.

    Attributes:
        ids: integers [..., K].
        logprobs: float32 [..., K], of these tokens at the temperature.
        rest: float32 [...], log of the others' probability.
    """

    FIELDS: ClassVar = {"ids": 3, "logprobs": 3, "rest": 2}  # axes of a batch's

    ids: jax.Array
    logprobs: jax.Array
    rest: jax.Array
    temperature: float = struct.field(pytree_node=False, default=1.0)

    @classmethod
    def of(cls, logits: jax.Array, tokens: int, temperature: float, uniform) -> "TopK":
        """What is kept of logits [..., V]; nothing is drawn.

        A token that is kept has the probability that it has among all.
        """
        del uniform
        likelihood = jax.nn.log_softmax(logits / jnp.float32(temperature))
        kept, ids = jax.lax.top_k(likelihood, tokens)
        return cls(ids, kept, _rest(likelihood, ids), temperature)

    def divergence(self, logits: jax.Array) -> jax.Array:
        """As `Full.divergence`, over K + 1 cells."""
        ids = self.ids.astype(jnp.int32)
        ours = jax.nn.log_softmax(logits / jnp.float32(self.temperature))
        kept = jnp.take_along_axis(ours, ids, -1)
        found = (jnp.exp(self.logprobs) * (self.logprobs - kept)).sum(-1)
        # The rest is summed, not 1 less the K: that would lose it where it is small.
        found = found + jnp.exp(self.rest) * (self.rest - _rest(ours, ids))
        return found * jnp.float32(self.temperature**2)


class Sampled(struct.PyTreeNode):
    """N tokens that the teacher drew.

    Attributes:
        ids: integers [..., N]; a token may come several times.
        entropy: float32 [...], nats, of the distribution that they were drawn from.
    """

    FIELDS: ClassVar = {"ids": 3, "entropy": 2}  # axes of a batch's

    ids: jax.Array
    entropy: jax.Array
    temperature: float = struct.field(pytree_node=False, default=1.0)

    @classmethod
    def of(cls, logits: jax.Array, tokens: int, temperature: float, uniform) -> "Sampled":
        """Draws from logits [..., V] with one `uniform` number of [0, 1) a position, [...]."""
        likelihood = jax.nn.log_softmax(logits / jnp.float32(temperature))
        probability = jnp.exp(likelihood)
        entropy = -(probability * likelihood).sum(-1)
        below = jnp.cumsum(probability, -1)
        below = below / below[..., -1:]
        steps = jnp.arange(tokens, dtype=jnp.float32)
        places = (uniform[..., None] + steps) / jnp.float32(tokens)
        flat = below.reshape(-1, below.shape[-1]), places.reshape(-1, tokens)
        search = jax.vmap(lambda sums, found: jnp.searchsorted(sums, found, side="right"))
        ids = jnp.minimum(search(*flat), logits.shape[-1] - 1)  # a place may be rounded up to 1
        return cls(ids.reshape(places.shape).astype(jnp.int32), entropy, temperature)

    def divergence(self, logits: jax.Array) -> jax.Array:
        """An estimate of `Full.divergence` whose mean, and whose gradient's, is right."""
        ours = jax.nn.log_softmax(logits / jnp.float32(self.temperature))
        chosen = jnp.take_along_axis(ours, self.ids.astype(jnp.int32), -1)
        return -(chosen.mean(-1) + self.entropy) * jnp.float32(self.temperature**2)


FORMS = {"topk": TopK, "sampled": Sampled}


class Word(struct.PyTreeNode):
    """A teacher's word on a batch, as `Batch.teacher` carries it.

    Attributes:
        hidden: its last hidden states [B, T, E], or None where nothing needs them.
        head: what makes logits of them, or None where `kept` says it all.
        kept: its word in a short form, arrays [B, T, ...], or None for the full one.
        temperature: both models' logits are divided by it.
    """

    hidden: jax.Array | None = None
    head: Head | None = None
    kept: TopK | Sampled | None = None
    temperature: float = struct.field(pytree_node=False, default=1.0)


def shorten(hidden: jax.Array, head: Head, form: str, tokens: int, temperature: float, uniform):
    """A `TopK` or `Sampled` of hidden states [B, T, E], never with all logits at once.

    Args:
        uniform: float32 [B, T] of [0, 1), which `sampled` draws by.
    """
    kind, time = FORMS[form], hidden.shape[1]

    def one(xs):
        states, uniform = xs
        return kind.of(head(states), tokens, temperature, uniform)

    return join(jax.lax.map(one, split((hidden, uniform), *hidden.shape[:2])), time)


def _rest(likelihood: jax.Array, ids: jax.Array) -> jax.Array:
    """Log of the probability of all tokens but `ids`."""
    others = jnp.put_along_axis(likelihood, ids, jnp.float32(_NONE), -1, inplace=False)
    return jax.nn.logsumexp(others, -1)

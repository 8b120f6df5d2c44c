"""From hidden states to the log-probabilities of given tokens, without ever holding all logits.

A vocabulary row is large (50,000 floats a token), so logits are made a few hundred positions at a
time and reduced at once.
"""

import math

import jax
import jax.numpy as jnp

from idp_jax.models import Decoder

POSITIONS_AT_ONCE = 256  # 50 MB of float32 logits at a vocabulary of 50,000


def token_scores(decoder: Decoder, hidden: jax.Array, targets: jax.Array):
    """Log-probabilities of one token per position, and whether it is the likeliest (traceable).

    Args:
        hidden: [..., E] last hidden states.
        targets: int32 [...], the token that should follow each.

    Returns:
        float32 [...] log-probabilities (natural log), and bool [...].
    """
    shape = targets.shape
    count = math.prod(shape)
    chunks = max(1, math.ceil(count / POSITIONS_AT_ONCE))
    width = math.ceil(count / chunks)
    spare = chunks * width - count
    hidden = jnp.pad(hidden.reshape(count, -1), [(0, spare), (0, 0)])
    targets = jnp.pad(targets.reshape(count), [(0, spare)])

    def score(xs):
        logits = decoder.logits(xs[0])
        chosen = jnp.take_along_axis(logits, xs[1][:, None], -1)[:, 0]
        logprob = chosen - jax.nn.logsumexp(logits, -1)
        return logprob, logits.argmax(-1).astype(jnp.int32) == xs[1]

    split = (hidden.reshape(chunks, width, -1), targets.reshape(chunks, width))
    logprob, greedy = jax.lax.map(score, split)
    return logprob.reshape(-1)[:count].reshape(shape), greedy.reshape(-1)[:count].reshape(shape)

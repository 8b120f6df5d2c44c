"""Selectors that follow from a trained pool and training text; nothing of them is trained.

The invariant: before `fitted` they hold zeros of their final shapes, so that a saved one is found
again by its name and options.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from idp_jax.models.decoder import Decoder
from idp_jax.recover.selectors.attention import ATTENTION
from idp_jax.recover.selectors.inputs import ScoreInputs
from idp_jax.recover.selectors.predictions import likelihood_scores
from idp_jax.recover.selectors.routers import unit

_ROWS = 8  # windows that are scored at a time
_LEAST = 1e-12  # spread of a score that says nothing


class NearestTexts(nnx.Module):
    """Votes of the training texts that are most like the input, each for the prompt it liked best.

    Texts are compared by the cosine of their mean embeddings, less the mean over all; each vote
    weighs 1 + cosine. Source: RoSPr (arXiv 2210.03029), which takes the prompt of the nearest
    training instance.

    Args:
        texts: how many training texts are kept at most, [texts, E].
        neighbours: how many of them vote.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: int,
        key: jax.Array,
        *,
        texts: int = 256,
        neighbours: int = 8,
    ):
        if not 1 <= neighbours <= texts:
            raise ValueError(f"nearest_texts: neighbours {neighbours} of {texts} texts; give fewer")
        self.neighbours = neighbours
        self.embeddings = nnx.Param(jnp.zeros((texts, decoder.config.embedding_dim), jnp.float32))
        self.best = nnx.Param(jnp.zeros((texts, prompts), jnp.float32))

    def __call__(self, inputs: ScoreInputs) -> jax.Array:
        """Scores [B, M]: weighted shares of the votes."""
        known, best = self.embeddings[...], self.best[...]
        held = best.sum(-1)  # 1, or 0 where there were fewer texts
        centre = (known * held[:, None]).sum(0) / jnp.maximum(held.sum(), 1.0)
        near = unit(inputs.mean_embedding() - centre) @ unit(known - centre).T
        cosine, place = jax.lax.top_k(jnp.where(held > 0, near, -1.0), self.neighbours)
        return ((1.0 + cosine)[..., None] * best[place]).sum(1) / self.neighbours

    def fitted(self, repaired: Any, windows: np.ndarray) -> "NearestTexts":
        """Keeps texts with the prompt behind which each is likeliest."""
        texts = self.embeddings.shape[0]
        look = lambda inputs: (inputs.mean_embedding(), likelihood_scores(inputs))
        means, likelihoods = _over(repaired, windows[:texts], look)
        best = jax.nn.one_hot(jnp.argmax(likelihoods, -1), likelihoods.shape[-1])
        fill = lambda x: jnp.pad(x, [(0, texts - len(x)), (0, 0)])
        return _with(self, embeddings=fill(means), best=fill(best))


class Calibrated(nnx.Module):
    """What an input pays to a prompt beyond all of them, in units of itself over training text.

    An attention score less its mean over the prompts; then less the mean of that over training
    text, by its spread there. What is the same for every input, such as a prompt's length, its sink
    or its distance, falls out, so that prompts are chosen for what an input pays more than inputs
    do on average.

    Args:
        score: one of the attention scores by name.
        options: of that score, such as layer.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: int,
        key: jax.Array,
        *,
        score: str = "free_energy",
        layer: int = 0,
    ):
        if score not in ATTENTION:
            raise ValueError(f"calibrated: no score {score!r}; there are {', '.join(ATTENTION)}")
        self.score, self.layer = score, layer
        self.mean = nnx.Param(jnp.zeros((prompts,), jnp.float32))
        self.spread = nnx.Param(jnp.ones((prompts,), jnp.float32))

    def _relative(self, inputs: ScoreInputs) -> jax.Array:
        # Inputs differ most in what they pay to all prompts alike (a short one pays more); by
        # spreads of each prompt's own, this would choose, too.
        scores = ATTENTION[self.score](inputs, layer=self.layer)
        return scores - scores.mean(-1, keepdims=True)

    def __call__(self, inputs: ScoreInputs) -> jax.Array:
        """Scores [B, M]."""
        return (self._relative(inputs) - self.mean[...]) / self.spread[...]

    def fitted(self, repaired: Any, windows: np.ndarray) -> "Calibrated":
        """Takes mean and spread of every prompt's relative score over the windows."""
        (scores,) = _over(repaired, windows, lambda inputs: (self._relative(inputs),))
        return _with(self, mean=scores.mean(0), spread=jnp.maximum(scores.std(0), _LEAST))


def _over(repaired: Any, windows: np.ndarray, look) -> list[jax.Array]:
    """What `look` gives of the windows, [N, ...] each, a few rows at a time."""
    see = jax.jit(lambda repaired, ids: look(repaired.selector_inputs(ids)))
    parts = [windows[start : start + _ROWS] for start in range(0, len(windows), _ROWS)]
    found = [see(repaired, jnp.asarray(part, jnp.int32)) for part in parts]
    return [jnp.concatenate(column) for column in zip(*found, strict=True)]


def _with(module, **values: jax.Array):
    """A copy with other values of its parameters."""
    copy = jax.tree.map(lambda x: x, module)
    for name, value in values.items():
        setattr(copy, name, nnx.Param(value))
    return copy

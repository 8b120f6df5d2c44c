"""Selectors that follow from a trained pool and text."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.recover.selectors.attention import ATTENTION
from idp_jax.recover.selectors.fitted import Calibrated
from tests.helpers import tiny_decoder


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scored:
    """Stands for a model beside a pool: the scores [N, M] of each input, which is its number."""

    scores: jax.Array

    def selector_inputs(self, ids):
        return self.scores[ids[:, 0]]


def test_what_an_input_pays_to_every_prompt_alike_does_not_choose(monkeypatch):
    """Else a kind of text that pays more to all gets the prompt whose score varies most."""
    monkeypatch.setitem(ATTENTION, "mean_logit", lambda inputs, layer: inputs)
    rng = np.random.default_rng(0)
    scores = rng.normal((3.0, 0.0, -1.0), (0.5, 1.0, 2.0), (64, 3))
    paid = jnp.asarray(scores + rng.normal(size=(64, 1)), jnp.float32)
    selector = Calibrated(tiny_decoder("llama"), 3, jax.random.key(0), score="mean_logit")
    selector = selector.fitted(Scored(paid), np.arange(64)[:, None])
    found = selector(paid)
    relative = scores - scores.mean(-1, keepdims=True)
    wanted = (relative - relative.mean(0)) / relative.std(0)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    np.testing.assert_allclose(selector(paid + 100.0), found, atol=1e-3)

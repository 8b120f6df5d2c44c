"""What a pool's prompts are scored by: functions and modules from an input to [B, M].

A selector takes `ScoreInputs` and returns one score per row and prompt; which prompt the scores
choose is settled elsewhere (`Repaired.choose`: the largest, ties to the lowest index). It is a
plain function, or an nnx module whose parameters are saved with the pool. No prompt's score is
touched by another's keys, except where a softmax goes over all of them.
"""

from collections.abc import Callable
from functools import partial

from idp_jax.recover.selectors.attention import (
    ATTENTION,
    attention_scores,
    contribution_scores,
    free_energy_scores,
)
from idp_jax.recover.selectors.controls import fixed_scores, random_scores
from idp_jax.recover.selectors.fitted import Calibrated, NearestTexts
from idp_jax.recover.selectors.inputs import ScoreInputs, Selector, layer0_inputs
from idp_jax.recover.selectors.predictions import certainty_scores, likelihood_scores
from idp_jax.recover.selectors.routers import CosineKeys, LinearRouter, MLPRouter

SELECTORS: dict[str, Callable] = {
    **ATTENTION,
    "input_likelihood": likelihood_scores,
    "certainty": certainty_scores,
    "linear_router": LinearRouter,
    "mlp_router": MLPRouter,
    "cosine_keys": CosineKeys,
    "nearest_texts": NearestTexts,
    "calibrated": Calibrated,
    "random": random_scores,
    "fixed": fixed_scores,
    "first": partial(fixed_scores, index=0),
}

__all__ = [
    "SELECTORS",
    "Calibrated",
    "CosineKeys",
    "LinearRouter",
    "MLPRouter",
    "NearestTexts",
    "ScoreInputs",
    "Selector",
    "attention_scores",
    "certainty_scores",
    "contribution_scores",
    "fixed_scores",
    "free_energy_scores",
    "layer0_inputs",
    "likelihood_scores",
    "random_scores",
]

"""The loop has the devices' next step ready: it neither waits for a loss first, nor for text."""

import threading

import jax
import numpy as np
import pytest

from idp_jax.config import Optimizer
from idp_jax.data.ahead import Ahead
from idp_jax.data.stream import TrainingText
from idp_jax.recover import SoftPrompt
from idp_jax.training import fit, loop, next_token
from idp_jax.training.step import make_optimizer
from tests.helpers import tiny_decoder

LENGTH, STEPS = 16, 7
pytestmark = pytest.mark.usefixtures("optax_promotes")


class Loss:
    """The loss of a step that is done only when another one has been begun."""

    def __init__(self):
        self.done = threading.Event()

    def is_ready(self) -> bool:
        return self.done.is_set()

    def __float__(self) -> float:
        assert self.done.wait(20), "the loss is waited for, and no other step has been begun"
        return 1.0


class Step:
    """A step whose devices take their time."""

    def __init__(self):
        self.losses = []

    def compiled(self, state, decoder, batch):
        return None

    def __call__(self, state, decoder, batch):
        for loss in self.losses:
            loss.done.set()
        self.losses.append(Loss())
        if len(self.losses) == STEPS:  # none comes behind the last
            self.losses[-1].done.set()
        return state, {"loss": self.losses[-1]}


def test_a_step_is_begun_before_the_loss_of_the_last_is_there(monkeypatch):
    step = Step()
    monkeypatch.setattr(loop, "make_train_step", lambda *rest, **options: step)
    windows = np.random.default_rng(1).integers(0, 90, (24, LENGTH)).astype(np.int32)
    text = TrainingText("", None, LENGTH, windows[-4:], windows[:-4], 0, 0)
    model, told = tiny_decoder("llama", num_layers=1), []
    batches = Ahead(text.batches(2))
    fit(
        SoftPrompt.init(model, 2, jax.random.key(5)),
        model,
        next_token,
        make_optimizer(Optimizer(), 0.05, STEPS),
        batches,
        text.validation_batches(2),
        steps=STEPS,
        evaluate_every=STEPS,
        progress=lambda number, steps, note: told.append(number) if "loss" in note else None,
    )
    batches.close()
    assert told == list(range(1, STEPS + 1)) and len(step.losses) == STEPS

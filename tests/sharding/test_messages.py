"""What a step sends between devices, read off the program that XLA made of it."""

import jax
import numpy as np
import optax
import pytest

from idp_jax.data.batch import Batch
from idp_jax.pods.hlo import count
from idp_jax.recover import PrefixAdapter, SoftPrompt
from idp_jax.sharding import make_mesh, shard, shard_batch
from idp_jax.training.objectives import next_token
from idp_jax.training.step import TrainState, make_train_step
from tests.helpers import tiny_decoder


def _stepped(adapter, model, tokens, mesh=None):
    """A step's outcome, and its program."""
    optimizer = optax.sgd(0.1)
    step = make_train_step(optimizer, next_token)
    state = TrainState.start(shard(adapter, mesh), optimizer)
    state = jax.tree.map(lambda x: x if x.committed else shard(x, mesh), state)
    arguments = state, shard(model, mesh), shard_batch(Batch(tokens), mesh)
    program = step.compiled(*arguments)
    state, metrics = program(*arguments)
    return state.adapter, metrics, program


@pytest.mark.parametrize("architecture, rows", [("llama", 16), ("opt", 8)])
@pytest.mark.parametrize("kind", [SoftPrompt, PrefixAdapter])
def test_of_a_prompt_only_its_own_gradient_is_sent(kind, architecture, rows):
    model = tiny_decoder(architecture)
    adapter = kind.init(model, 5, jax.random.key(1))
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, model.config.vocab_size, (rows, 16)).astype(np.int32)
    alone, wanted, _ = _stepped(adapter, model, tokens)
    mesh = make_mesh({"data": 8})
    with jax.set_mesh(mesh):
        shared, found, program = _stepped(adapter, model, tokens, mesh)
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    sent = sum(message.bytes * message.count for message in count(program.as_text()).collectives)
    own = sum(x.size * 4 for x in jax.tree.leaves(adapter))
    assert own <= sent < 1.1 * own + 2000

"""The calibration text on its way through the model, one block at a time.

The matrices of a stage (q, k, v | o | gate, up | down) read the same input. `Flow` stands before a
stage, gives the Hessian of that input, and goes on with the matrices that the stage was compressed
to: so a block costs one forward pass, and every Hessian is measured on what the matrix will really
see. The invariant: going through a finished block gives the same bits as having compressed it.
"""

from functools import partial
from typing import Any, cast

import jax
import numpy as np

from idp_jax.compression.cores.hessian import accumulate, empty_state
from idp_jax.models.block import Block
from idp_jax.models.decoder import Decoder
from idp_jax.sharding import batch_parts, constrain, shard, shard_batch

# What the MLPs' inner activations of all text may take; above, they are computed a second time
# when they are needed a second time.
KEPT_BYTES = 2**28


@jax.jit
def _start(entry: Decoder, embeddings):
    return entry.start(embeddings)[:2]


def _without_embedding(model: Decoder) -> Decoder:
    """What leads from embeddings to the first layer."""
    nothing = np.zeros((0, model.config.embedding_dim), np.float32)
    positions = None if model.positions is None else model.positions[...]
    return Decoder(
        model.config,
        embedding=nothing,
        layers=cast(Block, None),
        final_norm=None,
        positions=positions,
        project_in=model.project_in,
    )


@jax.jit
def _attention_input(block: Block, h):
    return block.attention_input(h)


@jax.jit
def _attention_output(block: Block, h, context):
    return block.attention_output(block.attention_input(h), context)[0]


@partial(jax.jit, donate_argnums=(1, 2))
def _mlp_input(block: Block, h, attended):
    return block.mlp_input(h, attended)


@jax.jit
def _mlp_hidden(block: Block, x):
    return block.mlp_hidden(x)


@partial(jax.jit, donate_argnums=1)
def _output(block: Block, h, hidden):
    return block.output(h, hidden)


@partial(jax.jit, donate_argnums=0)
def _accumulate(state, x):
    state = accumulate(state, x.reshape(-1, x.shape[-1]))
    return state._replace(hessian=constrain(state.hessian, None, None))


# Micro-batches that were queued would hold their intermediate results at the same time.
_one_at_a_time = jax.block_until_ready


class Flow:
    """The residual streams of all text, in micro-batches, before some stage of some block.

    Args:
        model: whose embeddings, and positions, the text enters by; its layers are not read.
        tokens: int [samples, T].
        batch_size: windows of a micro-batch, on each device that the text is cut over.
        mesh: where the text is cut over `data`.

    Raises:
        ValueError: a token outside the vocabulary, or windows beyond the learned positions.
    """

    def __init__(self, model: Decoder, tokens: np.ndarray, batch_size: int, mesh=None):
        model.check(tokens)
        # The embedding stays on the host: a micro-batch needs some of its rows.
        embedding = np.asarray(model.embedding[...])
        entry = shard(_without_embedding(model), mesh)
        self._streams: list[jax.Array] = []
        # All windows are full: what a context holds depends on their number alone.
        self._contexts: dict[int, Any] = {}
        self._kept: list[jax.Array] = []
        batch_size *= batch_parts(mesh)
        for first in range(0, len(tokens), batch_size):
            embeddings = shard_batch(embedding[tokens[first : first + batch_size]], mesh)
            h, context = _start(entry, embeddings)
            self._streams.append(h)
            self._contexts.setdefault(h.shape[0], context)

    @property
    def dtype(self) -> str:
        """Of the activations."""
        return self._streams[0].dtype.name

    def enter(self, stage: int, block: Block) -> None:
        """Goes from the stage before to this one, through the block's matrices as they now are."""
        if stage == 1:
            self._kept = []
            for h in self._streams:
                attended = _attention_output(block, h, self._contexts[h.shape[0]])
                self._kept.append(_one_at_a_time(attended))
        # What was kept before is given up one by one.
        for i, x in enumerate(self._kept):
            if stage == 2:
                both = _mlp_input(block, self._streams[i], x)
                self._streams[i], self._kept[i] = _one_at_a_time(both)
            elif stage == 3 and self._keeps_hidden(block):
                self._kept[i] = _one_at_a_time(_mlp_hidden(block, x))

    def hessian(self, stage: int, block: Block) -> jax.Array:
        """2/n X^T X of what the matrices of a stage read, float32 [I, I]."""
        state = None
        for x in self._streams if stage == 0 else self._kept:
            x = self._read(stage, block, x)
            state = empty_state(x.shape[-1]) if state is None else state
            state = _accumulate(state, x)
            _one_at_a_time(state)
        assert state is not None
        return state.hessian

    def leave(self, block: Block) -> None:
        """Goes from the last stage to the next block."""
        for i, h in enumerate(self._streams):
            hidden = self._read(3, block, self._kept[i])
            self._streams[i] = _one_at_a_time(_output(block, h, hidden))
        self._kept = []

    def _read(self, stage: int, block: Block, x: jax.Array) -> jax.Array:
        if stage == 0:
            return _attention_input(block, x)
        if stage == 3 and not self._keeps_hidden(block):
            return _mlp_hidden(block, x)
        return x

    def _keeps_hidden(self, block: Block) -> bool:
        tokens = sum(h.shape[0] * h.shape[1] for h in self._streams)
        size = tokens * block.config.ffw_dim * self._streams[0].dtype.itemsize
        return size <= KEPT_BYTES


def pass_through(flow: Flow, block: Block) -> None:
    """Takes the text through a finished block."""
    for stage in (1, 2, 3):
        flow.enter(stage, block)
    flow.leave(block)

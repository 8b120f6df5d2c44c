"""Low rank from calibration, without training: what brings a matrix' outputs nearest to the dense.

Source: "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank
Approximation", arXiv 2410.21271. The invariant: every matrix is corrected for the inputs that it
will see, behind the corrections of all matrices before it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from idp_jax.models.block import Block, Context, layer_slice
from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import matrices, stages
from idp_jax.models.storage import restore
from idp_jax.recover.lora import LoraAdapter
from idp_jax.weights import Lora

_HIGHEST = jax.lax.Precision.HIGHEST
_MICRO_BATCH = 4  # windows


class Eigenspace(NamedTuple):
    """The inputs' second moments X^T X = Q diag(l) Q^T.

    Directions that the inputs hardly have (below the rounding of the largest) are left out.

    Attributes:
        vectors: Q, float32 [I, I].
        root, inverse: sqrt(l) and 1 / sqrt(l), float32 [I]; 0 where left out.
    """

    vectors: jax.Array
    root: jax.Array
    inverse: jax.Array


@jax.jit
def eigenspace(moment: jax.Array) -> Eigenspace:
    """Of X^T X, up to a factor, float32 [I, I]."""
    values, vectors = jnp.linalg.eigh(moment)
    kept = values > values.max() * jnp.float32(len(values) * jnp.finfo(jnp.float32).eps)
    root = jnp.sqrt(jnp.where(kept, values, jnp.ones((), jnp.float32)))
    nothing = jnp.zeros((), jnp.float32)
    return Eigenspace(vectors, jnp.where(kept, root, nothing), jnp.where(kept, 1 / root, nothing))


@partial(jax.jit, static_argnames="rank")
def low_rank(difference: jax.Array, space: Eigenspace, rank: int) -> tuple[jax.Array, jax.Array]:
    """The a [I, r] and b [r, O] that make ||X (D - a b)||_F smallest.

    That norm is ||diag(sqrt(l)) Q^T (D - a b)||_F, which the truncated singular value decomposition
    makes smallest; it is then taken back into the inputs' space.

    Args:
        difference: D, float32 [I, O].
        space: of the inputs.
        rank: r; what the matrix does not have is filled up with zeros.
    """
    inputs, outputs = difference.shape
    vectors, root, inverse = space
    projected = root[:, None] * jnp.matmul(vectors.T, difference, precision=_HIGHEST)
    left, sizes, right = jnp.linalg.svd(projected, full_matrices=False)
    there = min(rank, inputs, outputs)
    a = jnp.matmul(vectors, inverse[:, None] * left[:, :there], precision=_HIGHEST)
    b = sizes[:there, None] * right[:there]
    # As large as each other, as training likes them.
    lengths = jnp.linalg.norm(a, axis=0), jnp.linalg.norm(b, axis=1)
    both = (lengths[0] > 0) & (lengths[1] > 0)
    balance = jnp.sqrt(jnp.where(both, lengths[1], 1.0) / jnp.where(both, lengths[0], 1.0))
    fill = (0, rank - there)
    return jnp.pad(a * balance, ((0, 0), fill)), jnp.pad(b / balance[:, None], (fill, (0, 0)))


class _Stream(NamedTuple):
    """A micro-batch before a stage: the residual [B, T, D], what the stage reads, the context."""

    h: jax.Array
    x: jax.Array
    context: Context


def with_eora(
    adapter: LoraAdapter,
    decoder: Decoder,
    teacher: Decoder,
    windows: jax.Array,
    segments: jax.Array | None = None,
) -> LoraAdapter:
    """The adapter with these updates, of its ranks and scales.

    Args:
        decoder: the compressed model.
        teacher: the uncompressed one.
        windows: int32 [N, T], text.
        segments: int32 [N, T], the document of each token where documents are kept apart.

    Raises:
        ValueError: the models have different sizes, or a token is outside the vocabulary.
    """
    if _sizes(teacher) != _sizes(decoder):
        raise ValueError(
            "EoRA takes the difference of the teacher's matrices and the model's, which have other "
            "sizes; give the model that this one was compressed from as --teacher.model"
        )
    decoder.check(windows, segments=segments)
    decoder, teacher = restore(decoder), restore(teacher)
    starts = range(0, len(windows), _MICRO_BATCH)
    cuts = [slice(first, first + _MICRO_BATCH) for first in starts]
    apart = [None if segments is None else segments[cut] for cut in cuts]
    streams = [_enter(decoder, windows[cut], own) for cut, own in zip(cuts, apart, strict=True)]
    found = {name: [] for name in adapter.a}
    for layer in range(decoder.config.num_layers):
        block = layer_slice(decoder.layers, layer)
        target = layer_slice(teacher.layers, layer)
        for number, stage in enumerate(stages(decoder.config)):
            streams = [_go_on(number, block, stream) for stream in streams]
            names = [matrix.name for matrix in stage if matrix.name in found]
            space = eigenspace(_moment(streams)) if names else None
            for name in names:
                rank = dict(adapter.ranks)[name][layer]
                weight, width = getattr(block, name), adapter.a[name].shape[-1]
                a, b = _update(getattr(target, name), weight, space, rank, width)
                found[name].append((a, b / jnp.float32(adapter.scales(name)[layer])))
                dtype = decoder.embedding.dtype
                beside = Lora(weight, a.astype(dtype), b.astype(dtype), 1.0)
                block = block.replace(**{name: beside})
        streams = [_go_on(len(stages(decoder.config)), block, stream) for stream in streams]
    a, b = (
        {name: jnp.stack([pair[part] for pair in pairs]) for name, pairs in found.items()}
        for part in (0, 1)
    )
    return type(adapter)(a, b, dict(adapter.alphas), ranks=dict(adapter.ranks))


def _sizes(model: Decoder) -> tuple:
    return model.config.num_layers, matrices(model.config)


@jax.jit
def _enter(decoder: Decoder, tokens: jax.Array, segments: jax.Array | None) -> _Stream:
    h, context, _ = decoder.start(decoder.embed(tokens), segments=segments)
    return _Stream(h, h, context)


@partial(jax.jit, static_argnames="stage")
def _go_on(stage: int, block: Block, stream: _Stream) -> _Stream:
    """From before a stage to before the next, through the matrices between; the fifth ends it."""
    h, x, context = stream
    if stage == 0:
        x = block.attention_input(h)
    elif stage == 1:
        x = block.attention_output(x, context)[0]
    elif stage == 2:
        h, x = block.mlp_input(h, x)
    elif stage == 3:
        x = block.mlp_hidden(x)
    else:
        h = block.output(h, x)
    return _Stream(h, x, context)


def _moment(streams: list[_Stream]) -> jax.Array:
    width = streams[0].x.shape[-1]
    moment = jnp.zeros((width, width), jnp.float32)
    for stream in streams:
        # Queued, the products of all text would be in memory at once.
        moment = jax.block_until_ready(_accumulate(moment, stream.x))
    return moment


@partial(jax.jit, donate_argnums=0)
def _accumulate(moment: jax.Array, x: jax.Array) -> jax.Array:
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return moment + jnp.matmul(x.T, x, precision=_HIGHEST)


def _update(target, weight, space, rank: int, width: int) -> tuple[jax.Array, jax.Array]:
    """One matrix' a [I, width] and b [width, O], of which `rank` columns and rows are not 0."""
    difference = target.dense(jnp.float32) - weight.dense(jnp.float32)
    a, b = low_rank(difference, space, rank)
    return jnp.pad(a, ((0, 0), (0, width - rank))), jnp.pad(b, ((0, width - rank), (0, 0)))

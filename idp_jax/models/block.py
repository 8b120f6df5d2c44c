"""One transformer block, written as the four stages that compression needs.

Within a stage all matrices read the same input (`matrices.py` has the table), so a Hessian is
shared by a stage. The forward pass is the composition of the stages and nothing else: what is
calibrated is what runs.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from idp_jax.kernels.stack import select_layer
from idp_jax.models.attention import KEPT, Context, attention
from idp_jax.models.config import ModelConfig
from idp_jax.models.layers import Norm, rotate
from idp_jax.models.matrices import matrices, stages
from idp_jax.sharding import constrain
from idp_jax.weights import is_compressed, products

_Layers = TypeVar("_Layers")  # a block, or one of its weights
_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class Block(nnx.Module):
    """Attention and MLP of one layer (or of all of them, stacked, before `scan_layers`).

    Its matrices, those that `matrices(config)` lists, are modules of `idp_jax.weights`.
    """

    q: Any
    k: Any
    v: Any
    o: Any
    gate: Any = None  # gated MLPs only
    up: Any
    down: Any

    def __init__(self, weights: dict, attention_norm: Norm, mlp_norm: Norm, config: ModelConfig):
        for matrix in matrices(config):
            setattr(self, matrix.name, weights[matrix.name])
        self.attention_norm = attention_norm
        self.mlp_norm = mlp_norm
        self.config = config

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The matrices of this block, in the order in which they are used."""
        return tuple(matrix.name for matrix in matrices(self.config))

    def logical_axes(self) -> dict[str, Any]:
        """What the axes of the parameters mean, see `sharding.declared_axes`."""
        norms = {"attention_norm": self.attention_norm, "mlp_norm": self.mlp_norm}
        return {name: norm.logical_axes() for name, norm in norms.items()} | {
            matrix.name: getattr(self, matrix.name).logical_axes(*matrix.axes)
            for matrix in matrices(self.config)
        }

    def replace(self, **weights) -> "Block":
        """The same block with some of its weights exchanged."""
        named = {name: getattr(self, name) for name in self.weight_names}
        return Block({**named, **weights}, self.attention_norm, self.mlp_norm, self.config)

    def attention_input(self, h: jax.Array) -> jax.Array:
        """What q, k and v read: [B, T, D] -> [B, T, D]."""
        return self.attention_norm(h) if self.config.norm_before else h

    def heads(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [B, T, N, H], rotated keys and values [B, T, K, H]."""
        config = self.config
        split = lambda y, heads: y.reshape(*x.shape[:2], heads, config.head_dim)
        q, k, v = self._stage(0, x)
        q = split(q, config.num_heads)
        k, v = split(k, config.num_kv_heads), split(v, config.num_kv_heads)
        if context.rotation is not None:
            q, k = rotate(q, *context.rotation), rotate(k, *context.rotation)
        return _kept(q), _kept(k), _kept(v)

    def attention_output(self, x, context: Context, past=None):
        """What o reads, [B, T, N * H], and this input's keys and values [B, T, K, H].

        Args:
            past: what this layer attends to before the input, as `attention` takes it.
        """
        q, k, v = self.heads(x, context)
        return attention(q, k, v, context, past), (k, v)

    def mlp_input(self, h: jax.Array, attended: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Adds the attention to the residual; returns it and what gate and up read."""
        h = h + _kept(*self._stage(1, attended))
        if self.config.norm_before:
            return h, self.mlp_norm(h)
        h = self.attention_norm(h)
        return h, h

    def mlp_hidden(self, x: jax.Array) -> jax.Array:
        """What down reads: [B, T, F]."""
        activation = _ACTIVATIONS[self.config.activation]
        *gate, up = map(_kept, self._stage(2, x))
        return activation(gate[0]) * up if gate else activation(up)

    def output(self, h: jax.Array, hidden: jax.Array) -> jax.Array:
        """Adds the MLP to the residual: [B, T, D]."""
        (update,) = self._stage(3, hidden)
        h = h + update
        return h if self.config.norm_before else self.mlp_norm(h)

    def _stage(self, number: int, x: jax.Array) -> list[jax.Array]:
        """What each matrix of a stage gives for x, which all of them read."""
        members = stages(self.config)[number]
        weights = [getattr(self, matrix.name) for matrix in members]
        return products(x, weights, [matrix.axes for matrix in members])

    def __call__(self, h, context: Context, past=None):
        """The whole block: the new residual stream [B, T, D], and keys and values [B, T, K, H]."""
        with jax.named_scope("attention"):
            attended, kv = self.attention_output(self.attention_input(h), context, past)
            h, x = self.mlp_input(h, attended)
        with jax.named_scope("mlp"):
            h = self.output(h, self.mlp_hidden(x))
        return constrain(h, "batch", "time", "embed_activation"), kv


def _kept(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, KEPT)


def layer_slice(layers: _Layers, index) -> _Layers:
    """Layer `index` of stacked layers."""
    return jax.tree.map(lambda x: x[index], layers)


def scan_layers(
    step: Callable, carry: Any, layers: Block | tuple[Block, ...], others: Any
) -> tuple[Any, Any]:
    """`lax.scan` over stacked layers.

    `lax.scan` cuts a layer's slice out of every array that it is given. XLA fuses that into its own
    products, but copies it for a kernel, which it cannot look into. So the arrays that kernels read
    are no part of the scan: the loop's body closes over the whole stacks, and each layer's block
    holds them with the number of its layer (see kernels/stack.py).

    Args:
        step: of (carry, (one layer's block, its part of `others`)).
        layers: stacked; or one by one, in a tuple, which makes one program of all layers without a
            loop: no slices are cut, and compiling takes longer.
        others: arrays with a leading axis of layers.
    """
    if isinstance(layers, tuple):
        kept = []
        for number, block in enumerate(layers):
            carry, found = step(carry, (block, layer_slice(others, number)))
            kept.append(found)
        return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *kept)
    leaves, tree = jax.tree.flatten(layers, is_leaf=is_compressed)
    whole = [leaf if is_compressed(leaf) else None for leaf in leaves]
    cut = [None if is_compressed(leaf) else leaf for leaf in leaves]
    numbers = jnp.arange(jax.tree.leaves(layers)[0].shape[0], dtype=jnp.int32)

    def one_layer(carry, xs):
        number, slices, other = xs
        pairs = zip(whole, slices, strict=True)
        here = [s if w is None else select_layer(w, number) for w, s in pairs]
        return step(carry, (jax.tree.unflatten(tree, here), other))

    return jax.lax.scan(one_layer, carry, (numbers, cut, others))


def stack_layers(blocks: list) -> "Block":
    """Blocks of one kind as one, their arrays stacked on a leading axis."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *blocks)

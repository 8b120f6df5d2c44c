"""Selectors with parameters that are trained jointly with their pool."""

import jax
import jax.numpy as jnp
from flax import nnx

from idp_jax.models.decoder import Decoder
from idp_jax.recover.selectors.inputs import ScoreInputs

_TINY = 1e-6  # below any length of an embedding


class LinearRouter(nnx.Module):
    """A linear map from the input's mean embedding to a score per prompt, trained with the pool.

    Source: "SMoP: Towards Efficient and Effective Prompt Tuning with Sparse Mixture-of-Prompts".
    """

    def __init__(self, decoder: Decoder, prompts: int, key: jax.Array):
        width = decoder.config.embedding_dim
        self.weight = nnx.Param(jax.random.normal(key, (width, prompts), jnp.float32) * width**-0.5)
        self.bias = nnx.Param(jnp.zeros((prompts,), jnp.float32))

    def __call__(self, inputs: ScoreInputs) -> jax.Array:
        """Scores [B, M]."""
        return inputs.mean_embedding() @ self.weight[...] + self.bias[...]


class MLPRouter(nnx.Module):
    """Two layers on the input's mean hidden state, as it enters a layer of the model.

    The input stands alone there: one pass through the layers before it serves all prompts. The
    state is scaled to unit mean square, because residual streams grow with depth.
    Source: "Mixture of Prompts" (MoPs, AAAI 2025), whose gate reads a middle layer.
    """

    def __init__(
        self, decoder: Decoder, prompts: int, key: jax.Array, *, layer: int = 0, width: int = 64
    ):
        config = decoder.config
        if not 0 <= layer < config.num_layers:
            raise ValueError(
                f"mlp_router's layer {layer} is none of the model's {config.num_layers}; give 0 to "
                f"{config.num_layers - 1}"
            )
        first, second = jax.random.split(key)
        size = config.hidden_dim
        self.layer = layer
        self.inner = nnx.Param(jax.random.normal(first, (size, width), jnp.float32) * size**-0.5)
        self.inner_bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.outer = nnx.Param(
            jax.random.normal(second, (width, prompts), jnp.float32) * width**-0.5
        )
        self.outer_bias = nnx.Param(jnp.zeros((prompts,), jnp.float32))

    def __call__(self, inputs: ScoreInputs) -> jax.Array:
        """Scores [B, M]."""
        state = inputs.mean_hidden(self.layer)
        state = state * jax.lax.rsqrt(jnp.square(state).mean(-1, keepdims=True) + _TINY)
        inner = jax.nn.gelu(state @ self.inner[...] + self.inner_bias[...])
        return inner @ self.outer[...] + self.outer_bias[...]


class CosineKeys(nnx.Module):
    """The cosine of the input's mean embedding and a trained key of each prompt.

    In joint training the keys of the prompts that serve are pulled towards what they serve: to the
    loss comes `pull` times 1 - the mean cosine. Source: "Learning to Prompt for Continual Learning"
    (L2P, CVPR 2022).
    """

    def __init__(self, decoder: Decoder, prompts: int, key: jax.Array, *, pull: float = 0.5):
        self.pull = float(pull)
        shape = (prompts, decoder.config.embedding_dim)
        self.keys = nnx.Param(jax.random.normal(key, shape, jnp.float32) * shape[1] ** -0.5)

    def __call__(self, inputs: ScoreInputs) -> jax.Array:
        """Scores [B, M], between -1 and 1."""
        return unit(inputs.mean_embedding()) @ unit(self.keys[...]).T

    def penalties(self, inputs: ScoreInputs, load: jax.Array) -> dict[str, jax.Array]:
        """The pull of the keys towards the inputs that they serve."""
        near = (jax.lax.stop_gradient(load) * self(inputs)).sum(-1).mean()
        return {"pull": self.pull * (1.0 - near)}


def unit(x: jax.Array) -> jax.Array:
    """Rows of length 1."""
    return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + _TINY**2)

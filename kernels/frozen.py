"""Products with frozen weights as JAX differentiates them.

Every kernel brings a value and a gradient with respect to x, and this joins them. Invariant: the
weight gets no gradient, and only the weight, as it is stored, is kept for the backward pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Product = Callable[[jax.Array, Any, Any], jax.Array]
"""Of (x [M, I], weight, interpret), or the upstream gradient [M, O] in place of x."""


def frozen_product(value: Product, gradient: Product) -> Product:
    """The product [M, O] that `value` computes, whose gradient in x [M, I] `gradient` computes."""
    product = jax.custom_vjp(value, nondiff_argnums=(2,))

    def forward(x, weight, interpret):
        return product(x, weight, interpret), weight

    def backward(interpret, weight, upstream):
        return gradient(upstream, weight, interpret), None

    product.defvjp(forward, backward)
    return product


def gradient_of(multiply: Callable[[jax.Array, Any], jax.Array]) -> Product:
    """The gradient [M, I] that JAX derives for a product (x [M, I], weight) -> [M, O]."""

    def gradient(upstream: jax.Array, weight, interpret) -> jax.Array:
        del interpret
        # The product is linear in x, so its gradient is the same at any x: zeros stand for it.
        like = jnp.zeros((upstream.shape[0], weight.inputs), upstream.dtype)
        return jax.vjp(lambda x: multiply(x, weight), like)[1](upstream)[0]

    return gradient


def checked(product: Product, unsupported: Callable[[jax.Array, Any], str | None]) -> Product:
    """The product, or a ValueError with what `unsupported(x, weight)` says against it."""

    def served(x, weight, interpret):
        reason = unsupported(x, weight)
        if reason:
            raise ValueError(reason)
        return product(x, weight, interpret)

    return served

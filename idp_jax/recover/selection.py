"""Selectors as parts of a pool: found by name, held in a pytree, written to files by name.

The invariant: a `Selection` of a plain function has no leaves and compares by function and options,
so that a jitted call compiles once however often the selector is looked up.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from idp_jax.models.decoder import Decoder
from idp_jax.recover.lookup import Found, lookup, reference_to
from idp_jax.recover.selectors import SELECTORS, ScoreInputs, Selector

_LONGEST = 200  # characters of what a selector's own error says


class Selection(nnx.Module):
    """A selector with its name and options, as a pytree.

    Attributes:
        score: a function, in the static part of the tree, or a module, whose parameters are leaves.
        options: keyword arguments of a function, as sorted pairs.
        name: what `find_selector` finds it by, or None for one that has no name (a lambda).
    """

    def __init__(self, score: Callable, options: dict[str, Any], name: str | None):
        self.score = score
        self.options = tuple(sorted(options.items()))
        self.name = name

    def __call__(self, inputs: ScoreInputs) -> jax.Array:
        """Scores [B, M].

        Raises:
            ValueError: the selector fails, or gives an array of another shape, or no real numbers.
        """
        name = self.name or self.score
        try:
            scores = self.score(inputs, **dict(self.options))
        except (ValueError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # whatever code of a user's, or options of a wrong type, raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"selector {name} fails on an input: {reason[:_LONGEST]}") from error
        wanted = (inputs.real.shape[0], inputs.prompt_mask.shape[0])
        if getattr(scores, "shape", None) != wanted:
            found = getattr(scores, "shape", type(scores).__name__)
            raise ValueError(
                f"selector {name} gives scores {found}; it must give {wanted}, one for each row "
                "and prompt"
            )
        if jnp.issubdtype(scores.dtype, jnp.complexfloating):
            raise ValueError(f"selector {name} gives {scores.dtype}; scores must be real numbers")
        return scores


def find_selector(name: str, start: tuple[Decoder, int, jax.Array] | None = None) -> Selection:
    """A selector by its name.

    Args:
        name: one of `SELECTORS`, `package.module:name` or `path/file.py:name`, with options in
            brackets if need be, such as `fixed(index=2)`.
        start: what a class is called with to make a module with parameters: the model, the number
            of prompts and a random key.

    Raises:
        ValueError: there is none, it is not a selector, or it is a class and `start` is not given.
    """
    found = lookup(name, SELECTORS, "selector")
    if not isinstance(found.target, type):
        _check_call(found, 1)
        function, options = _plain(found.target)
        return Selection(function, {**options, **found.options}, found.name)
    _check_call(found, 3)
    if start is None:
        raise ValueError(
            f"selector {name} has parameters, which a name alone does not give; train a pool with "
            "it (--pool.training joint), and load that pool's folder"
        )
    return Selection(found.target(*start, **found.options), {}, found.name)


def check_selector(name: str, *, joint: bool) -> None:
    """Refuses a name that a pool cannot be trained with.

    Args:
        joint: whether the selector is trained together with the prompts.

    Raises:
        ValueError: as `find_selector`, or the selector is made in the other way of training.
    """
    found = lookup(name, SELECTORS, "selector")
    if not isinstance(found.target, type):
        _check_call(found, 1)
        return
    _check_call(found, 3)
    follows = hasattr(found.target, "fitted")
    if joint and follows:
        raise ValueError(
            f"selector {name} follows from prompts that are trained; give --pool.training apart or "
            "clusters, or another --selector"
        )
    if not joint and not follows:
        raise ValueError(
            f"selector {name} has parameters, which prompts that are trained apart do not train; "
            "give --pool.training joint"
        )


def as_selection(given: "str | Selector | Selection") -> Selection:
    """A selector of any form as a `Selection`: a name, a function or a module.

    Raises:
        ValueError: it cannot be called, or a function's arguments hold arrays.
    """
    if isinstance(given, Selection):
        return given
    if isinstance(given, str):
        return find_selector(given)
    if not callable(given):
        raise ValueError(f"a selector must be a name, a function or a module, not {given!r}")
    function, options = _plain(given)
    return Selection(function, options, _name_of(function, options))


def _plain(function: Callable) -> tuple[Callable, dict[str, Any]]:
    """A function and its options; a `partial`, which compares by identity, is taken apart."""
    if not isinstance(function, functools.partial) or function.args:
        return function, {}
    try:
        hash(tuple(function.keywords.values()))
    except TypeError as error:
        raise ValueError(
            f"the options of selector {function} must be plain values; parameters belong into an "
            "nnx module"
        ) from error
    return function.func, function.keywords


def _name_of(score: Callable, options: dict[str, Any]) -> str | None:
    target = type(score) if isinstance(score, nnx.Module) else score
    for name, known in SELECTORS.items():
        if _plain(known) == (target, options):
            return name
    if not hasattr(target, "__qualname__"):
        return None
    known = [name for name, function in SELECTORS.items() if function is target]
    name = known[0] if known else reference_to(target)
    if name is None or not options:
        return name
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})"


def _check_call(found: Found, arguments: int) -> None:
    """Refuses a function or class that cannot be called as a selector is."""
    try:
        signature = inspect.signature(found.target)
    except (TypeError, ValueError):  # a built-in that does not tell
        return
    try:
        signature.bind(*[None] * arguments, **found.options)
    except TypeError as error:
        takes = "(decoder, prompts, key)" if arguments == 3 else "(inputs)"
        raise ValueError(
            f"selector {found.name} must be called as {takes} and its options: {error}"
        ) from error

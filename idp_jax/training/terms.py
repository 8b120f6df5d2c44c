"""The terms that an objective may be made of, by name, and how `--objective` spells their sum.

A term over logits is a function (logits float32 [B, W, V], `Positions`) -> [B, W] of one chunk of
positions; one over hidden states is a function (hidden [B, T, E], teacher's hidden [B, T, E],
weight float32 [B, T], which sums to 1) -> scalar.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from idp_jax.config import ConfigError
from idp_jax.recover.lookup import lookup

_TERM = re.compile(r"(?:([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*\*\s*)?([^*\s][^*]*)")
_PLUS = re.compile(r"(?<![0-9.][eE])\+(?![^(]*\))")  # not in 1e+3, nor within brackets


_TAKEN = ("loss", "gradient_norm", "learning_rate")  # by `training.step`


class Positions(NamedTuple):
    """What is known of a chunk of positions beside the student's logits.

    Attributes:
        targets: int32 [B, W], the token that follows each.
        teacher: a `word.Full`, `word.TopK` or `word.Sampled` of them, or None.
    """

    targets: jax.Array
    teacher: Any


class Term(NamedTuple):
    """One summand of an objective.

    Attributes:
        name: what its value is logged under.
        weight: what it is multiplied by.
        function: of logits, or of hidden states.
        of_hidden: which of the two.
        needs_teacher: whether it cannot be told without one; None where nobody knows.
    """

    name: str
    weight: float
    function: Callable
    of_hidden: bool = False
    needs_teacher: bool | None = None


def cross_entropy(logits: jax.Array, positions: Positions) -> jax.Array:
    """Of the next token, in nats."""
    chosen = jnp.take_along_axis(logits, positions.targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - chosen


def divergence(logits: jax.Array, positions: Positions) -> jax.Array:
    """KL(teacher || student) in nats, exact or estimated: as the form of the teacher's word has it.

    One term for all forms: what is kept of the teacher's word decides what can be computed, and two
    settings could contradict each other.
    """
    return positions.teacher.divergence(logits)


def hidden_mse(hidden: jax.Array, theirs: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean squared difference of the last hidden states (RILQ, arXiv:2412.01129)."""
    gap = hidden.astype(jnp.float32) - theirs.astype(jnp.float32)
    return (jnp.square(gap).mean(-1) * weight).sum()


def cka_distance(hidden: jax.Array, theirs: jax.Array, weight: jax.Array) -> jax.Array:
    """1 - linear CKA of the last hidden states of a batch (arXiv:1905.00414, eq. 3)."""
    root = jnp.sqrt(weight)[..., None]

    def centred(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        mean = jnp.einsum("bte,bt->e", x, weight, precision="highest")
        return (x - mean) * root

    def gram(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.linalg.norm(jnp.einsum("bte,btf->ef", x, y, precision="highest"))

    x, y = centred(hidden), centred(theirs)
    size = jnp.maximum(gram(x, x) * gram(y, y), jnp.finfo(jnp.float32).tiny)
    return 1 - jnp.square(gram(x, y)) / size


LOGIT_TERMS: dict[str, Callable] = {"ce": cross_entropy, "kl": divergence}
HIDDEN_TERMS: dict[str, Callable] = {"hidden_mse": hidden_mse, "cka": cka_distance}


def parse(text: str) -> tuple[Term, ...]:
    """The terms of an objective such as "kl + 0.5*ce".

    A term of one's own over logits is file.py:name or package.module:name, options in brackets.

    Raises:
        ConfigError: it is no sum of known terms, or names one twice.
    """
    terms = tuple(_term(part.strip(), text) for part in _PLUS.split(text))
    names = [term.name for term in terms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--objective {text!r} names {twice} twice; give it one weight")
    return terms


def _term(part: str, text: str) -> Term:
    matched = _TERM.fullmatch(part)
    known = LOGIT_TERMS | HIDDEN_TERMS
    if matched is None:
        raise ConfigError(
            f"--objective {text!r} is no sum of terms; give one such as 'kl + 0.5*ce', of "
            f"{', '.join(known)} or file.py:name"
        )
    try:
        weight = float(matched[1] or 1)
    except ValueError:
        weight = 0.0
    if not 0 < weight < math.inf:
        raise ConfigError(
            f"--objective {text!r}: the weight of {matched[2]} must be a number above 0"
        )
    try:
        found = lookup(matched[2], known, "term")
    except ValueError as error:
        raise ConfigError(f"--objective {text!r}: {error}") from error
    function = partial(found.target, **found.options) if found.options else found.target
    path = matched[2].partition("(")[0].strip()
    if path not in known:  # one of the user's own
        name = path.rpartition(":")[2]
        if name in _TAKEN:
            raise ConfigError(
                f"--objective {text!r}: {name} is what a step logs beside the terms; give the "
                "function another name"
            )
        return Term(name, weight, function)
    return Term(path, weight, function, path in HIDDEN_TERMS, path != "ce")

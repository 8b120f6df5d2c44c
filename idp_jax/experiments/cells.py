"""Numbers as cells of tables.

The invariant: a number that has an interval is not shown without it.
"""

from idp_jax.evaluation.statistics import Estimate


def share(found: Estimate | None, sign: bool = False) -> str:
    """A part of a whole."""
    return between(found, 1, "+.3f" if sign else ".3f")


def percent(found: Estimate | None, sign: bool = False) -> str:
    """In percent, or with its sign in points."""
    return between(found, 100, "+.1f" if sign else ".1f")


def times(found: Estimate | None) -> str:
    """A ratio."""
    return between(found, 1, ".3f")


def between(found: Estimate | None, scale: float, form: str) -> str:
    """A number with its interval, where it has one."""
    if found is None:
        return ""
    value, low, high = (format(scale * x, form) for x in (found.value, found.low, found.high))
    bounded = abs(found.low) < float("inf") > abs(found.high)
    return f"{value} [{low}, {high}]" if bounded else value


def perplexity(value: float | None) -> str:
    """Two places of a perplexity."""
    return "" if value is None else f"{value:.2f}"

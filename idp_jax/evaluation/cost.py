"""What a computation costs: its multiplications, counted from its trace, and its time.

The compiler's own count takes the body of a loop once, and our layers are a loop.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def multiplications(function: Callable, *arguments: Any) -> int:
    """Multiplications in the matrix products of `function(*arguments)`, loops counted in full.

    Products whose result is not used count, too; a loop of unknown length counts once, and of
    branches the dearest.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contracted)
            total += math.prod(equation.outvars[0].aval.shape) * inner
            continue
        parts = [_count(part) for value in equation.params.values() for part in _jaxprs(value)]
        together = max if equation.primitive.name == "cond" else sum
        total += equation.params.get("length", 1) * together(parts) if parts else 0
    return total


def _jaxprs(value: Any) -> list[Any]:
    """The traces in a parameter of an equation, which holds one, several or none."""
    if isinstance(value, tuple | list):
        return [part for entry in value for part in _jaxprs(entry)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


def median_ms(function: Callable, *arguments: Any, repeats: int = 5) -> float:
    """The median time of a call in milliseconds, compilation left out."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)

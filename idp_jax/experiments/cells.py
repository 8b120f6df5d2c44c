"""Numbers as cells of tables, and tables as Markdown and LaTeX.

The invariant: a number that has an interval is not shown without it.
"""

import re
from collections.abc import Sequence

from idp_jax.evaluation.statistics import Estimate

_ESCAPED = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


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


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is left-aligned, the others right-aligned."""
    marks = ["---"] + ["---:"] * (len(heading) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in [heading, marks, *rows])


def latex(caption: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a table of the packages booktabs and graphicx, as wide as the text."""
    lines = [f"{' & '.join(map(escaped, line))} \\\\" for line in [heading, *rows]]
    return "\n".join(
        [
            r"\begin{table}[ht]",
            rf"\caption{{{escaped(caption)}}}",
            r"\resizebox{\textwidth}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * (len(heading) - 1)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
        ]
    )


def escaped(text: str) -> str:
    """Text as LaTeX shows it."""
    found = re.sub(r"[\\~^]|([&%$#_{}])", lambda m: _ESCAPED.get(m[0], f"\\{m[0]}"), text)
    return found.replace("[", "{[}").replace("]", "{]}")

"""Tables that commands print: no wider than a page, nothing cut off, nothing claimed by chance."""

import dataclasses
import io
import math

from rich.console import Console

from idp_jax.commands.tables import (
    accuracy_table,
    change_table,
    comparison_table,
    show,
    task_table,
    variant_table,
)
from idp_jax.evaluation import compare
from idp_jax.evaluation.statistics import perplexity_interval
from idp_jax.jobs import progress
from tests.evaluation.test_results import task, text, variant

LOSSES = (3.0, 3.2, 3.4, 3.1)


def shown(table, width=200) -> str:
    """What is printed into a terminal of that width."""
    out = io.StringIO()
    show(table, Console(file=out, width=width))
    return out.getvalue()


def measured(losses):
    """A perplexity with its interval."""
    found = perplexity_interval(losses)
    interval = None if found is None else (found.low, found.high)
    return dataclasses.replace(text(losses), interval=interval)


def test_tables_are_a_hundred_columns_and_whole():
    names = [f"a variant with a long name, number {i}" for i in range(9)]
    variants = [variant(name, perplexity=measured(LOSSES)) for name in names]
    pairs = [compare(variants[0], other) for other in variants[1:]]
    changes = change_table(pairs, "changes")
    for table in (comparison_table(variants, "all"), task_table(variants, "tasks"), changes):
        printed = shown(table)
        assert max(map(len, printed.splitlines())) <= 100 and "…" not in printed
    printed = shown(variant_table(variant("/a/very/long" * 20)), 60)
    assert max(map(len, printed.splitlines())) <= 60 and "…" not in printed


def test_a_table_has_groups_and_intervals_and_no_versions():
    printed = shown(variant_table(variant(perplexity=measured(LOSSES))))
    assert "g (group) acc" in printed and "mean accuracy" in printed
    low, high = measured(LOSSES).interval
    assert f"[{low:.3f}, {high:.3f}]" in printed and "version" not in printed
    assert "inf" in shown(variant_table(variant(perplexity=text((900.0, 901.0)))))


def test_one_window_and_one_item_are_no_finding():
    """However much lower: what one window says of others is nothing."""
    one = {"tasks": {"t": task([0.0])}, "perplexity": text((3.0,))}
    lower = {"tasks": {"t": task([1.0])}, "perplexity": text((2.0,))}
    pair = compare(variant("a", **one), variant("b", **lower))
    assert pair.perplexity_ratio.low == 0 and pair.perplexity_ratio.high == math.inf
    printed = shown(change_table([pair], "changes"))
    assert printed.count("unclear") == 2 and "lower" not in printed and "higher" not in printed


def test_a_direction_needs_an_interval_that_excludes_no_change():
    clear = compare(
        variant("a", perplexity=text(LOSSES)), variant("b", perplexity=text((2.0, 2.3, 2.2, 2.1)))
    )
    assert "lower" in shown(change_table([clear], "changes"))
    mixed = compare(
        variant("a", perplexity=text(LOSSES)), variant("b", perplexity=text((2.9, 3.4, 3.2, 3.2)))
    )
    assert "lower" not in shown(change_table([mixed], "changes"))


def test_names_in_brackets_are_no_markup():
    with progress.console.capture() as said:
        progress.console.print("written to runs/[bold]a[/b]", highlight=False)
    assert said.get() == "written to runs/[bold]a[/b]\n"


def test_accuracies_by_what_items_are_about():
    printed = shown(accuracy_table("bear", task((1.0, 0.0, 1.0))))
    rows = [line.replace("│", " ").split() for line in printed.splitlines() if "│" in line]
    assert [(row[0], row[-1]) for row in rows] == [("a", "2"), ("b", "1"), ("P1", "2"), ("P2", "1")]
    assert accuracy_table("piqa", task(labels={})) is None

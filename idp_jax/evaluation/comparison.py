"""Two results on the same items: how much they differ, and how sure we may be of it.

The invariant: only equal things are paired. Items are told apart by the harness's hash of them and
windows by a digest of their tokens, so results of other items are refused, not compared.
"""

from pathlib import Path

from idp_jax.config.groups import ConfigError
from idp_jax.evaluation.results import Comparison, Results, TaskScores, VariantResult, read
from idp_jax.evaluation.statistics import (
    Estimate,
    accuracy_interval,
    paired_difference,
    perplexity_ratio,
)


def compare(
    first: TaskScores | Results | str | Path,
    second: TaskScores | Results | str | Path,
    *,
    seed: int = 0,
) -> Comparison:
    """The paired comparison of two variants.

    Args:
        first, second: variants, what `evaluate` returns, or results (files of results) that hold
            one variant.
        seed: of the items that are drawn again.

    Raises:
        ConfigError: a file that cannot be read, several variants in it, or other items.
    """
    before, after = _variant(first, "first"), _variant(second, "second")
    tasks, items = {}, ([], [])
    _refuse(before, after, "tasks", sorted(before.tasks), sorted(after.tasks))
    for name in sorted(before.tasks):
        pair = before.tasks[name], after.tasks[name]
        for what in ("documents", "num_fewshot", "version"):
            facts = (getattr(task, what) for task in pair)
            _refuse(before, after, f"{what} of {name}", *facts)
        metric = pair[0].accuracy
        if metric is not None:
            scores = [task.samples[metric] for task in pair]
            tasks[name] = paired_difference(*scores, seed=seed)
            for all_items, added in zip(items, scores, strict=True):
                all_items += added
    overall = paired_difference(*items, seed=seed) if tasks else None
    return Comparison(before.name, after.name, tasks, overall, _ratio(before, after, seed))


def pooled_accuracy(variant: VariantResult) -> Estimate | None:
    """The share of right items of all tasks together, with its Wilson interval."""
    items = []
    for name in sorted(variant.tasks):
        task = variant.tasks[name]
        items += task.samples[task.accuracy] if task.accuracy else []
    return accuracy_interval(items) if items else None


def _variant(given: TaskScores | Results | str | Path, name: str) -> VariantResult:
    if isinstance(given, VariantResult):
        return given
    if isinstance(given, TaskScores):
        return VariantResult(name=name, role="dense", model=name, **vars(given))
    results = given if isinstance(given, Results) else read(given)
    if len(results.variants) != 1:
        origin = "these results" if isinstance(given, Results) else str(given)
        names = ", ".join(repr(variant.name) for variant in results.variants)
        raise ConfigError(f"{origin} hold {names}; name one: read(file).variant(name)")
    return results.variants[0]


def _refuse(before: VariantResult, after: VariantResult, what: str, first, second) -> None:
    if first != second:
        shown = "" if "documents" in what else f" ({first} and {second})"
        raise ConfigError(
            f"{before.name!r} and {after.name!r} cannot be compared: the {what} differ{shown}; "
            "evaluate both with the same tasks and limits"
        )


def _ratio(before: VariantResult, after: VariantResult, seed: int) -> Estimate | None:
    first, second = before.perplexity, after.perplexity
    if first is None or second is None or first.digest != second.digest:
        return None
    return perplexity_ratio(first.per_window_nll, second.per_window_nll, seed=seed)

"""Two results on the same items: how much they differ, and how sure we may be of it.

The invariant: only equal things are paired. Items are told apart by the harness's hash of them and
windows by a digest of their tokens, so results of other items are refused, not compared.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from idp_jax.config.groups import ConfigError
from idp_jax.evaluation import paired
from idp_jax.evaluation.paired import PooledTest, TaskTest
from idp_jax.evaluation.results import (
    LOWER_IS_BETTER,
    Comparison,
    Results,
    TaskResult,
    TaskScores,
    VariantResult,
)
from idp_jax.evaluation.samples import read_runs
from idp_jax.evaluation.statistics import (
    Blocks,
    Estimate,
    accuracy_interval,
    paired_blocks,
    paired_difference,
    perplexity_ratio,
)

MARGIN = 0.02  # two points
Run = TaskScores | Results | str | Path


def compare(
    first: Run,
    second: Run,
    *,
    metric: str | None = None,
    cluster: str | None = None,
    margin: float = MARGIN,
    seed: int = 0,
) -> Comparison:
    """The paired comparison of two variants, item by item.

    Args:
        first, second: variants, what `evaluate` returns, results that hold one variant, or what
            `read_runs` takes.
        metric: what is compared; by default each task's main metric, or else its first.
        cluster: a field of the documents (`relation`): items that share its value are drawn again
            together, and tested so.
        margin: the share of right items below which a difference does not matter.
        seed: of the items that are drawn again, and of the signs that are turned.

    Raises:
        ConfigError: a file that cannot be read, several variants in it, other items, or a metric or
            field that a task does not have.
    """
    before, after = _variant(first, "first"), _variant(second, "second")
    _refuse(before, after, "tasks", sorted(before.tasks), sorted(after.tasks))
    pairs = {
        name: _Pair(before, after, name, metric, cluster)
        for name in sorted(before.tasks)
        if before.tasks[name].samples or after.tasks[name].samples
    }
    right = [pair for pair in pairs.values() if pair.is_accuracy]
    tests = _task_tests(pairs, margin, seed)
    return Comparison(
        before.name,
        after.name,
        {name: pair.difference(seed) for name, pair in pairs.items()},
        _overall(right, cluster, seed),
        _ratio(before, after, seed),
        tests,
        pooled({name: pairs[name].blocks for name in _tested(pairs, tests)}, margin, seed),
        margin,
        cluster,
    )


def compare_each(firsts: Sequence[Run], seconds: Sequence[Run], **options) -> list[Comparison]:
    """The comparison of each of `seconds` with the one of `firsts` that stands at its place.

    Args:
        options: of `compare`.

    Raises:
        ConfigError: as `compare`.
        ValueError: lists of different lengths.
    """
    pairs = zip(firsts, seconds, strict=True)
    return [compare(first, second, **options) for first, second in pairs]


def averaged(seeds: Sequence[VariantResult], name: str) -> VariantResult:
    """Runs of one method with several seeds as one variant: every score is the mean over them.

    Items are then compared as before, by turned signs where they are no longer right or wrong. How
    much seeds differ is no part of the comparison: it is of these seeds. Tasks alone are kept.

    Raises:
        ConfigError: runs of other tasks or items.
    """
    first, tasks = seeds[0], {}
    for other in seeds[1:]:
        _refuse(first, other, "tasks", sorted(first.tasks), sorted(other.tasks))
    for task, own in first.tasks.items():
        orders = [_joined(first, seed, task) for seed in seeds]
        samples = {}
        for metric in own.samples:
            scores = [
                [seed.tasks[task].samples[metric][index] for index in order]
                for seed, order in zip(seeds, orders, strict=True)
            ]
            samples[metric] = [sum(item) / len(seeds) for item in zip(*scores, strict=True)]
        means = {metric: sum(values) / own.items for metric, values in samples.items()}
        changed = {"metrics": means, "interval": {}, "choices": None, "prompts": None}
        tasks[task] = replace(own, samples=samples, **changed)
    bare = {"groups": {}, "mean_accuracy": None, "perplexity": None, "latency": None}
    return replace(first, name=name, tasks=tasks, **bare)


def pooled_accuracy(variant: VariantResult) -> Estimate | None:
    """The share of right items of all tasks together, with its Wilson interval."""
    items = []
    for name in sorted(variant.tasks):
        task = variant.tasks[name]
        items += task.samples[task.accuracy] if task.accuracy else []
    return accuracy_interval(items) if items else None


class _Pair:
    """A metric of one task, of the same items in the same order."""

    def __init__(self, before, after, name: str, metric: str | None, cluster: str | None):
        first, second = before.tasks[name], after.tasks[name]
        for what in ("num_fewshot", "version"):
            facts = [getattr(task, what) for task in (first, second)]
            if None not in facts:  # samples of the harness do not say it
                _refuse(before, after, f"{what} of {name}", *facts)
        order = _joined(before, after, name)
        self.metric = metric or first.accuracy or next(iter(first.samples or second.samples))
        for variant in (before, after):
            if self.metric not in variant.tasks[name].samples:
                there = ", ".join(variant.tasks[name].samples)
                raise ConfigError(
                    f"{name} of {variant.name!r} has no {self.metric}; there is {there}"
                )
        self.first = first.samples[self.metric]
        self.second = [second.samples[self.metric][index] for index in order]
        self.clusters = None if cluster is None else _clusters(name, first, second, order, cluster)
        asked = metric is not None or first.accuracy is not None
        self.is_accuracy = asked and self.is_share
        self.blocks = paired_blocks(self.first, self.second, self.clusters)
        self.chance = first.chance if self.metric.startswith("acc") else None
        questions = first.questions, second.questions
        self.same_prompts = None if None in questions else questions[0] == questions[1]

    @property
    def is_binary(self) -> bool:
        return set(self.first) | set(self.second) <= {0.0, 1.0}

    @property
    def is_share(self) -> bool:
        """Whether points are what it is measured in."""
        scores = [*self.first, *self.second]
        return self.metric not in LOWER_IS_BETTER and min(scores) >= 0 and max(scores) <= 1

    def difference(self, seed: int) -> Estimate:
        return paired_difference(self.first, self.second, clusters=self.clusters, seed=seed)

    def at_chance(self, seed: int) -> bool:
        if self.chance is None:
            return False
        if self.clusters is None and set(self.first) <= {0.0, 1.0}:
            return accuracy_interval(self.first).low <= self.chance
        nothing = [0.0] * len(self.first)
        found = paired_difference(nothing, self.first, clusters=self.clusters, seed=seed)
        return found.low <= self.chance

    def test(self, margin: float, seed: int) -> TaskTest:
        """The tests of this task alone."""
        steps = list(zip(self.first, self.second, strict=True))
        losses, gains = steps.count((1.0, 0.0)), steps.count((0.0, 1.0))
        if self.is_binary and self.clusters is None:
            p_value = paired.mcnemar(losses, gains)
        else:
            p_value = paired.sign_flip([self.blocks], seed)
        items = len(self.first)
        return TaskTest(
            metric=self.metric,
            items=items,
            clusters=None if self.clusters is None else len(self.blocks.sums),
            first=sum(self.first) / items,
            second=sum(self.second) / items,
            losses=losses if self.is_binary else None,
            gains=gains if self.is_binary else None,
            p_value=p_value,
            adjusted=p_value,
            equivalence=paired.equivalence([self.blocks], margin) if self.is_share else None,
            smallest=paired.detectable([self.blocks]),
            chance=self.chance,
            at_chance=self.at_chance(seed),
            same_prompts=self.same_prompts,
            verdict="undecided",
        )


def _task_tests(pairs: dict[str, _Pair], margin: float, seed: int) -> dict[str, TaskTest]:
    """The tests of all tasks, with Holm's adjustment and what follows from it."""
    tests = {name: pair.test(margin, seed) for name, pair in pairs.items()}
    adjusted = paired.holm([test.p_value for test in tests.values()])
    shares = {name: t.equivalence for name, t in tests.items() if t.equivalence is not None}
    equal = dict(zip(shares, paired.holm(list(shares.values())), strict=True))
    found = {}
    for (name, test), p_value in zip(tests.items(), adjusted, strict=True):
        gain = pairs[name].blocks.mean * (-1 if test.metric in LOWER_IS_BETTER else 1)
        said = paired.verdict(gain, p_value, equal.get(name))
        changed = {"adjusted": p_value, "equivalence": equal.get(name), "verdict": said}
        found[name] = replace(test, **changed)
    return found


def _tested(pairs: dict[str, _Pair], tests: dict[str, TaskTest]) -> list[str]:
    """The tasks whose mean is tested: shares of right items, above chance."""
    return [name for name in pairs if pairs[name].is_accuracy and not tests[name].at_chance]


def pooled(tasks: dict[str, Blocks], margin: float, seed: int) -> PooledTest | None:
    """The test of the mean difference over tasks; None where there are none."""
    if not tasks:
        return None
    blocks = list(tasks.values())
    difference = paired.pooled_interval(blocks, seed)
    p_value, equal = paired.sign_flip(blocks, seed), paired.equivalence(blocks, margin)
    said = paired.verdict(difference.value, p_value, equal)
    smallest = paired.detectable(blocks)
    return PooledTest(list(tasks), difference, p_value, equal, smallest, said)


def _overall(pairs: Sequence[_Pair], cluster: str | None, seed: int) -> Estimate | None:
    """The difference over the items of all tasks together."""
    if not pairs:
        return None
    first = [score for pair in pairs for score in pair.first]
    second = [score for pair in pairs for score in pair.second]
    # A cluster is of one task.
    owners = [f"{n} {owner}" for n, pair in enumerate(pairs) for owner in pair.clusters or ()]
    clusters = None if cluster is None else owners
    return paired_difference(first, second, clusters=clusters, seed=seed)


def _joined(before: VariantResult, after: VariantResult, name: str) -> list[int]:
    """Where each item of the first stands in the second.

    A document that a task holds several times is told apart by the order.
    """
    keys = [_numbered(variant.tasks[name].documents) for variant in (before, after)]
    places = {key: index for index, key in enumerate(keys[1])}
    alone = [key for key in keys[0] if key not in places]
    others = [key for key in keys[1] if key not in set(keys[0])]
    if alone or others:
        lacking = [
            f"{len(found)} of {len(own)} are in {variant.name!r} alone ({found[0][0]} first)"
            for variant, own, found in zip((before, after), keys, (alone, others), strict=True)
            if found
        ]
        raise ConfigError(
            f"{before.name!r} and {after.name!r} cannot be compared: the documents of {name} "
            f"differ, {' and '.join(lacking)}; evaluate both with the same tasks and limits"
        )
    return [places[key] for key in keys[0]]


def _numbered(documents: Sequence[str]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    found = []
    for document in documents:
        found.append((document, seen[document]))
        seen[document] += 1
    return found


def _clusters(
    name: str, first: TaskResult, second: TaskResult, order: list[int], field: str
) -> list[str]:
    if field in first.labels:
        return first.labels[field]
    if field in second.labels:
        return [second.labels[field][index] for index in order]
    there = ", ".join(sorted(first.labels)) or "none"
    raise ConfigError(f"no field {field!r} groups the items of {name}; fields that do: {there}")


def _variant(given: Run, name: str) -> VariantResult:
    if isinstance(given, VariantResult):
        return given
    if isinstance(given, TaskScores):
        return VariantResult(name=name, role="dense", model=name, **vars(given))
    found = given.variants if isinstance(given, Results) else read_runs(given)
    if len(found) != 1:
        origin = "these results" if isinstance(given, Results) else str(given)
        names = ", ".join(repr(variant.name) for variant in found)
        raise ConfigError(
            f"{origin} hold {names}; name one: FILE:NAME, or read(file).variant(name)"
        )
    return found[0]


def _refuse(before: VariantResult, after: VariantResult, what: str, first, second) -> None:
    if first != second:
        choose = ", or choose those of both (--tasks)" if what == "tasks" else ""
        raise ConfigError(
            f"{before.name!r} and {after.name!r} cannot be compared: the {what} differ "
            f"({first} and {second}); evaluate both with the same tasks and limits{choose}"
        )


def _ratio(before: VariantResult, after: VariantResult, seed: int) -> Estimate | None:
    first, second = before.perplexity, after.perplexity
    if first is None or second is None or first.digest != second.digest:
        return None
    return perplexity_ratio(first.per_window_nll, second.per_window_nll, seed=seed)

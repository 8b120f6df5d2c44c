"""A grid of models, compressions, repairs and seeds as rows and contrasts: a function of results.

Everything is paired: an item's or a window's number is its mean over the seeds, and the same items
are subtracted. Two uncertainties are told apart, for neither stands for the other: over items
(bootstrap, drawn again within each task) and over seeds (Student). Tasks count alike in their mean,
however many items they have; those at chance, where even the uncompressed model shows nothing, are
no part of it.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from idp_jax.config import Reproduce
from idp_jax.config.choices import Role
from idp_jax.config.reproduce import DENSE, row_name
from idp_jax.evaluation import paired
from idp_jax.evaluation.comparison import MARGIN, pooled
from idp_jax.evaluation.grid_scores import (
    Key,
    Scores,
    at_chance_of,
    check_same,
    mean_of,
    scores_of,
)
from idp_jax.evaluation.paired import PooledTest
from idp_jax.evaluation.results import Results
from idp_jax.evaluation.statistics import (
    Blocks,
    Estimate,
    exponential,
    mean_interval,
    paired_blocks,
    paired_ratio,
    perplexity_ratio,
)


@dataclass(frozen=True)
class Contrast:
    """What the second of two variants gains over the first, on the same items and windows.

    Attributes:
        first, second: their names.
        seeds: those that have both.
        tasks: by task the difference of accuracy, with its interval over items.
        test: of the mean over tasks, for these seeds; p after Holm, over the repairs of a
            compressed model or over the controls of its pools.
        over_seeds: the mean with its interval over seeds.
        ratio, second_ratio: perplexity(second) / perplexity(first), of both texts.
    """

    first: str
    second: str
    seeds: list[int]
    tasks: dict[str, Estimate]
    test: PooledTest | None
    over_seeds: Estimate | None
    ratio: Estimate | None
    second_ratio: Estimate | None


@dataclass(frozen=True)
class Row:
    """One variant of a model, over its seeds.

    Attributes:
        model, compression: what it is of; None is the uncompressed model.
        name, role: as in the results.
        seeds: those that are there.
        parameters: that were added.
        tasks: by task the accuracy, with its interval over items.
        mean, over_seeds: the mean over tasks, with its interval over items and over seeds.
        perplexity, second_perplexity: exp of the mean loss over seeds.
        share: the part of the log-perplexity lost to compression that came back.
        choices, prompts: how often each prompt of a pool was chosen, all seeds together, and what
            the prompts are called.
        change: against the model without repair; of a compressed model, against the uncompressed.
    """

    model: str
    compression: str | None
    name: str
    role: Role
    seeds: list[int]
    parameters: int
    tasks: dict[str, Estimate]
    mean: Estimate | None
    over_seeds: Estimate | None
    perplexity: float | None
    second_perplexity: float | None
    share: Estimate | None
    choices: list[int] | None
    prompts: list[str]
    change: Contrast | None


@dataclass(frozen=True)
class Grid:
    """All rows, and what each pool gains over its controls.

    Attributes:
        contrasts: by model and compression.
        at_chance: by model the tasks on which it is no better than guessing.
        missing: the names of cells that are not finished.
    """

    rows: list[Row]
    contrasts: dict[tuple[str, str], list[Contrast]]
    at_chance: dict[str, list[str]]
    missing: list[str] = field(default_factory=list)


def aggregate(settings: Reproduce, found: dict[Key, Results]) -> Grid:
    """Puts the results of finished cells together.

    Args:
        found: by model, compression (None is the uncompressed model) and seed.

    Raises:
        ConfigError: cells that were scored on different items or windows.
    """
    grid = Grid([], {}, {})
    for model in settings.models:
        _add_model(settings, found, model, grid)
    for cell in settings.all_cells():
        if (cell.model, cell.compression, cell.seed) not in found:
            grid.missing.append(cell.name)
    return grid


def _add_model(settings: Reproduce, found: dict[Key, Results], model: str, grid: Grid) -> None:
    """The rows and contrasts of a model's cells."""
    beside = scores_of(settings, found, model, None)
    dense = beside.get(DENSE)
    grid.at_chance[model] = [] if dense is None else at_chance_of(dense)
    view = _View(model, dense, set(grid.at_chance[model]), settings.seed)
    grid.rows.extend(
        view.row(None, own, None if name == DENSE else dense) for name, own in beside.items()
    )
    for compression in settings.compressions:
        cells = scores_of(settings, found, model, compression)
        if not cells:
            continue
        bare = cells[compression]
        grid.rows.append(view.row(compression, bare, dense))
        rows = [view.row(compression, own, bare) for own in cells.values() if own is not bare]
        repairs = [row for row in rows if row.role == "repaired"]
        tested = _holm([row.change for row in repairs if row.change is not None])
        changes = {change.second: change for change in tested}
        grid.rows.extend(replace(row, change=changes.get(row.name, row.change)) for row in rows)
        pairs = [
            (cells[row_name(compression, pool, control)], cells[row_name(compression, pool)])
            for pool in settings.pools
            for control in settings.controls
        ]
        grid.contrasts[model, compression] = _holm([view.contrast(*pair) for pair in pairs])


def _holm(contrasts: list[Contrast]) -> list[Contrast]:
    """Tests that are looked at together, adjusted for their number."""
    tests = [each.test for each in contrasts if each.test is not None]
    adjusted = paired.holm([test.p_value for test in tests])
    equal = paired.holm([test.equivalence for test in tests])
    numbers, found = zip(adjusted, equal, strict=True), []
    for each in contrasts:
        test = each.test
        if test is not None:
            p_value, within = next(numbers)
            said = paired.verdict(test.difference.value, p_value, within)
            test = replace(test, p_value=p_value, equivalence=within, verdict=said)
        found.append(replace(each, test=test))
    return found


@dataclass(frozen=True)
class _View:
    """How a model's variants become rows and contrasts.

    Attributes:
        dense: the uncompressed model, where its cells are there.
        at_chance: tasks that are left out of means and tests.
        seed: of the items and windows that are drawn again.
    """

    model: str
    dense: Scores | None
    at_chance: set[str]
    seed: int

    def row(self, compression: str | None, own: Scores, first: Scores | None) -> Row:
        """A row; `first` is what it is compared with."""
        seeds = list(own.variants)
        texts = [float(np.mean(mean_of(text, seeds))) if text else None for text in own.texts]
        perplexities = [None if nll is None else exponential(nll) for nll in texts]
        chosen = [variant.choices for variant in own.variants.values() if variant.choices]
        blocks = {name: _blocks(mean_of(values, seeds)) for name, values in own.tasks.items()}
        tested = self._tested(own)
        return Row(
            model=self.model,
            compression=compression,
            name=own.first.name,
            role=own.first.role,
            seeds=seeds,
            parameters=own.first.extra_parameters,
            tasks={
                name: paired.pooled_interval([values], self.seed) for name, values in blocks.items()
            },
            mean=paired.pooled_interval([blocks[name] for name in tested], self.seed)
            if tested
            else None,
            over_seeds=self._over_seeds(own.tasks, tested, seeds),
            perplexity=perplexities[0],
            second_perplexity=perplexities[1],
            share=self._share(own, first),
            choices=np.sum(chosen, 0).tolist() if chosen else None,
            prompts=own.first.prompt_names,
            change=None if first is None or not first.seeds(own) else self.contrast(first, own),
        )

    def contrast(self, first: Scores, second: Scores) -> Contrast:
        """What the second gains over the first."""
        seeds, names = first.seeds(second), [name for name in first.tasks if name in second.tasks]
        for number in (0, 1):
            check_same(list(first.windows[number]), second.windows[number], second.first.name)
        gains: dict[str, dict[int, np.ndarray]] = {}
        for name in names if seeds else []:
            check_same(list(first.items[name]), second.items[name], second.first.name)
            before, after = first.tasks[name], second.tasks[name]
            gains[name] = {each: after[each] - before[each] for each in seeds}
        blocks = {name: _blocks(mean_of(by_seed, seeds)) for name, by_seed in gains.items()}
        tested = [name for name in blocks if name not in self.at_chance]
        ratios = [
            perplexity_ratio(mean_of(before, seeds), mean_of(after, seeds), seed=self.seed)
            if seeds and before and after
            else None
            for before, after in zip(first.texts, second.texts, strict=True)
        ]
        return Contrast(
            first=first.first.name,
            second=second.first.name,
            seeds=seeds,
            tasks={
                name: paired.pooled_interval([block], self.seed) for name, block in blocks.items()
            },
            test=pooled({name: blocks[name] for name in tested}, MARGIN, self.seed),
            over_seeds=self._over_seeds(gains, tested, seeds),
            ratio=ratios[0],
            second_ratio=ratios[1],
        )

    def _tested(self, scores: Scores) -> list[str]:
        return [name for name in scores.tasks if name not in self.at_chance]

    def _over_seeds(
        self, tasks: dict[str, dict[int, np.ndarray]], tested: list[str], seeds: list[int]
    ) -> Estimate | None:
        """The mean over tasks, with its interval over seeds."""
        if not tested or not seeds:
            return None
        means = [[tasks[name][seed].mean() for name in tested] for seed in seeds]
        return mean_interval(np.mean(means, 1).tolist())

    def _share(self, own: Scores, bare: Scores | None) -> Estimate | None:
        """The part of the log-perplexity lost to compression that a repair gave back."""
        dense = self.dense
        if bare is None or dense is None or bare is dense:
            return None
        losses = [scores.texts[0] for scores in (own, bare, dense)]
        seeds = [each for each in losses[0] if all(each in text for text in losses)]
        if not seeds:
            return None
        after, before, best = (np.asarray(mean_of(text, seeds)) for text in losses)
        return paired_ratio((before - after).tolist(), (before - best).tolist(), seed=self.seed)


def _blocks(values: list[float]) -> Blocks:
    """Items that stand for themselves."""
    return paired_blocks([0.0] * len(values), values)

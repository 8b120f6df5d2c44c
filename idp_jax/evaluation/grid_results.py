"""A grid of models, compressions, repairs and seeds as rows and contrasts: a function of results.

Everything is paired: an item's or a window's number is its mean over the seeds, and the same items
are subtracted. Two uncertainties are told apart, for neither stands for the other: over items
(bootstrap, drawn again within each task) and over seeds (Student). Tasks count alike in their mean,
however many items they have.
"""

from dataclasses import dataclass, field

import numpy as np

from idp_jax.config import ConfigError, Reproduce
from idp_jax.config.choices import Role
from idp_jax.config.experiment import SECOND
from idp_jax.config.reproduce import DENSE, row_name
from idp_jax.evaluation.results import Results, VariantResult
from idp_jax.evaluation.statistics import (
    Estimate,
    exponential,
    mean_interval,
    mean_of_means,
    paired_ratio,
    perplexity_ratio,
)

Key = tuple[str, str | None, int]  # model, compression or None, seed


@dataclass(frozen=True)
class Contrast:
    """What the second of two variants gains over the first, on the same items and windows.

    Attributes:
        first, second: their names.
        seeds: those that have both.
        tasks: by task the difference of accuracy, with its interval over items.
        mean: the mean over tasks.
        over_seeds: the same with its interval over seeds.
        ratio, second_ratio: perplexity(second) / perplexity(first), of both texts.
    """

    first: str
    second: str
    seeds: list[int]
    tasks: dict[str, Estimate]
    mean: Estimate | None
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
        missing: the names of cells that are not finished.
    """

    rows: list[Row]
    contrasts: dict[tuple[str, str], list[Contrast]]
    missing: list[str] = field(default_factory=list)


def aggregate(settings: Reproduce, found: dict[Key, Results]) -> Grid:
    """Puts the results of finished cells together.

    Args:
        found: by model, compression (None is the uncompressed model) and seed.

    Raises:
        ConfigError: cells that were scored on different items or windows.
    """
    rows: list[Row] = []
    contrasts: dict[tuple[str, str], list[Contrast]] = {}
    for model in settings.models:
        dense = _scores(settings, found, model, None)
        names = [row_name(None, name) for name in settings.dense]
        if DENSE in dense:
            rows.append(_row(settings, model, None, dense[DENSE], None))
            rows += [_row(settings, model, None, dense[name], dense[DENSE]) for name in names]
        for compression in settings.compressions:
            cells = _scores(settings, found, model, compression)
            for name, own in cells.items():
                first = dense.get(DENSE) if name == compression else cells[compression]
                rows.append(_row(settings, model, compression, own, first, dense.get(DENSE)))
            if cells:
                contrasts[model, compression] = [
                    contrast(cells[row_name(compression, pool, control)], own, settings.seed)
                    for pool in settings.pools
                    for control in settings.controls
                    for own in [cells[row_name(compression, pool)]]
                ]
    missing = [
        cell.name
        for cell in settings.all_cells()
        if (cell.model, cell.compression, cell.seed) not in found
    ]
    return Grid(rows, contrasts, missing)


@dataclass(frozen=True)
class Scores:
    """One variant over its seeds.

    Attributes:
        variants: by seed, as it was measured.
        tasks: by task that was asked for and seed, one score per item.
        items: by task the harness's hash of every item.
        texts: of the reported and of the second text by seed, the losses of its windows.
        windows: the digests of both texts.
    """

    variants: dict[int, VariantResult]
    tasks: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    items: dict[str, list[str]] = field(default_factory=dict)
    texts: tuple[dict[int, np.ndarray], dict[int, np.ndarray]] = field(
        default_factory=lambda: ({}, {})
    )
    windows: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))

    @property
    def first(self) -> VariantResult:
        """The variant of the first seed, for what all have in common."""
        return next(iter(self.variants.values()))

    def seeds(self, other: "Scores") -> list[int]:
        """The seeds that both have."""
        return [seed for seed in self.variants if seed in other.variants]


def _scores(
    settings: Reproduce, found: dict[Key, Results], model: str, compression: str | None
) -> dict[str, Scores]:
    """The variants of a model's cells by name, in their order."""
    made: dict[str, Scores] = {}
    for seed in settings.seeds:
        results = found.get((model, compression, seed))
        variants = {} if results is None else {each.name: each for each in results.variants}
        for name, variant in variants.items():
            main = name.removesuffix(SECOND)
            scores = made.setdefault(main, Scores({}))
            number = int(main != name)
            if not number:
                scores.variants[seed] = variant
                _add_tasks(scores, settings, seed, variant)
            if variant.perplexity is not None:
                scores.texts[number][seed] = np.asarray(variant.perplexity.per_window_nll)
                _same(scores.windows[number], [variant.perplexity.digest], name)
    return made


def _add_tasks(scores: Scores, settings: Reproduce, seed: int, variant: VariantResult) -> None:
    """The items of each task that was asked for; of a group those of all its parts."""
    for asked in filter(None, (name.strip() for name in settings.tasks.split(","))):
        parts = [
            task
            for name, task in sorted(variant.tasks.items())
            if name == asked or name.startswith(f"{asked}_")
        ]
        values: list[float] = []
        hashes: list[str] = []
        for task in parts:
            if task.accuracy is not None:
                values += task.samples[task.accuracy]
                hashes += task.documents
        if values:
            scores.tasks.setdefault(asked, {})[seed] = np.asarray(values)
            _same(scores.items.setdefault(asked, []), hashes, variant.name)


def _same(known: list[str], found: list[str], name: str) -> None:
    """Notes what was scored, and refuses anything else of the same name."""
    if known and known != found:
        raise ConfigError(
            f"{name!r} was scored on different items or windows in two cells; remove the older "
            "cell, and the same command makes it again"
        )
    known[:] = found


def _mean(by_seed: dict[int, np.ndarray], seeds: list[int]) -> list[float]:
    """Of every item or window the mean over seeds."""
    return np.mean([by_seed[seed] for seed in seeds], 0).tolist()


def contrast(first: Scores, second: Scores, seed: int) -> Contrast:
    """What the second gains over the first; `seed` is of the items that are drawn again."""
    seeds = first.seeds(second)
    for number in (0, 1):
        _same(list(first.windows[number]), second.windows[number], second.first.name)
    differences, by_seed = [], np.zeros(len(seeds))
    names = [name for name in first.tasks if name in second.tasks] if seeds else []
    for name in names:
        _same(list(first.items[name]), second.items[name], second.first.name)
        pairs = [second.tasks[name][each] - first.tasks[name][each] for each in seeds]
        differences.append(np.mean(pairs, 0).tolist())
        by_seed += np.mean(pairs, 1) / len(names)
    ratios = [
        perplexity_ratio(_mean(before, seeds), _mean(after, seeds), seed=seed)
        if seeds and before and after
        else None
        for before, after in zip(first.texts, second.texts, strict=True)
    ]
    return Contrast(
        first=first.first.name,
        second=second.first.name,
        seeds=seeds,
        tasks={
            name: mean_of_means([values], seed=seed)
            for name, values in zip(names, differences, strict=True)
        },
        mean=mean_of_means(differences, seed=seed) if names else None,
        over_seeds=mean_interval(by_seed.tolist()) if names else None,
        ratio=ratios[0],
        second_ratio=ratios[1],
    )


def _row(
    settings: Reproduce,
    model: str,
    compression: str | None,
    own: Scores,
    first: Scores | None,
    dense: Scores | None = None,
) -> Row:
    """A row.

    Args:
        first: what it is compared with.
        dense: the uncompressed model, where a share of what was lost is asked for.
    """
    seeds = list(own.variants)
    items = {name: _mean(by_seed, seeds) for name, by_seed in own.tasks.items()}
    each = [np.mean([by_seed[seed].mean() for by_seed in own.tasks.values()]) for seed in seeds]
    texts = [float(np.mean(_mean(text, seeds))) if text else None for text in own.texts]
    perplexities = [None if nll is None else exponential(nll) for nll in texts]
    chosen = [variant.choices for variant in own.variants.values() if variant.choices]
    paired = first is not None and bool(first.seeds(own))
    return Row(
        model=model,
        compression=compression,
        name=own.first.name,
        role=own.first.role,
        seeds=seeds,
        parameters=own.first.extra_parameters,
        tasks={name: mean_of_means([values], seed=settings.seed) for name, values in items.items()},
        mean=mean_of_means(list(items.values()), seed=settings.seed) if items else None,
        over_seeds=mean_interval([float(value) for value in each]) if items else None,
        perplexity=perplexities[0],
        second_perplexity=perplexities[1],
        share=_share(own, first, dense, settings.seed) if paired else None,
        choices=np.sum(chosen, 0).tolist() if chosen else None,
        prompts=own.first.prompt_names,
        change=contrast(first, own, settings.seed) if first is not None and paired else None,
    )


def _share(own: Scores, bare: Scores | None, dense: Scores | None, seed: int) -> Estimate | None:
    """The part of the log-perplexity lost to compression that a repair gave back."""
    if bare is None or dense is None or bare is dense:
        return None
    losses = [scores.texts[0] for scores in (own, bare, dense)]
    seeds = [each for each in losses[0] if all(each in text for text in losses)]
    if not seeds:
        return None
    after, before, best = (np.asarray(_mean(text, seeds)) for text in losses)
    return paired_ratio((before - after).tolist(), (before - best).tolist(), seed=seed)

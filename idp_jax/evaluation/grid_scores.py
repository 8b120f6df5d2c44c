"""What a grid's cells measured, variant by variant over the seeds: scores of the same items.

The invariant: what stands together here is of the same items and windows; anything else is refused.
"""

from dataclasses import dataclass, field

import numpy as np

from idp_jax.config import ConfigError, Reproduce
from idp_jax.config.experiment import SECOND
from idp_jax.evaluation.results import Results, VariantResult
from idp_jax.evaluation.statistics import accuracy_interval

Key = tuple[str, str | None, int]  # model, compression or None, seed


@dataclass(frozen=True)
class Scores:
    """One variant over its seeds.

    Attributes:
        variants: by seed, as it was measured.
        tasks: by task that was asked for and seed, one score per item.
        items: by task the harness's hash of every item.
        chance: by task the share of right answers of guessing, where it is known.
        texts: of the reported and of the second text by seed, the losses of its windows.
        windows: the digests of both texts.
    """

    variants: dict[int, VariantResult]
    tasks: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    items: dict[str, list[str]] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
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


def scores_of(
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
                check_same(scores.windows[number], [variant.perplexity.digest], name)
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
        guessed = [task.chance for task in parts if task.chance is not None]
        if values and len(guessed) == len(parts):
            weights = [len(task.documents) for task in parts]
            scores.chance[asked] = float(np.average(guessed, weights=weights))
        if values:
            scores.tasks.setdefault(asked, {})[seed] = np.asarray(values)
            check_same(scores.items.setdefault(asked, []), hashes, variant.name)


def check_same(known: list[str], found: list[str], name: str) -> None:
    """Notes what was scored, and refuses anything else of the same name."""
    if known and known != found:
        raise ConfigError(
            f"{name!r} was scored on different items or windows in two cells; remove the older "
            "cell, and the same command makes it again"
        )
    known[:] = found


def mean_of(by_seed: dict[int, np.ndarray], seeds: list[int]) -> list[float]:
    """Of every item or window the mean over seeds."""
    return np.mean([by_seed[seed] for seed in seeds], 0).tolist()


def at_chance_of(dense: Scores) -> list[str]:
    """The tasks where the uncompressed model's interval does not lie above guessing."""
    return [
        name
        for name, chance in dense.chance.items()
        if accuracy_interval(next(iter(dense.tasks[name].values())).tolist()).low <= chance
    ]

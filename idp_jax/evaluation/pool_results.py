"""What a pool study found, as one file of a typed and versioned schema; see `results`.

A measure is one kind of utility of the same items under every prompt, and a policy one way to take
a prompt for each. The invariant: all policies of a measure are judged on the same items against the
same references, so any two of its rows may be compared.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from idp_jax.evaluation import selection_statistics as selection
from idp_jax.evaluation.results import Part, is_results, read_as, write_finite
from idp_jax.evaluation.selection_statistics import Correlation, OracleNull, Tested, Usage
from idp_jax.evaluation.statistics import Estimate

SCHEMA = "idp-jax.pool-study/1"
Kind = Literal["control", "fixed", "selector", "other", "bound"]
is_study = partial(is_results, schema=SCHEMA)


@dataclass(frozen=True, kw_only=True)
class Policy(Part):
    """One way to serve every item.

    Attributes:
        kind: control (random, best fixed), fixed (one prompt for all), selector, other (no choice
            among the prompts: ensemble, no prompt, another adapter), or bound (the oracle).
        mean: utility over the items.
        gain: over a prompt at random (its exact expectation on every item).
        over_fixed: over the one prompt that was best on the other half of the items.
        regret: what the oracle has more.
        recovery: gain / the oracle's gain; None where that is 0.
        bins: the gain in each bin of the measure.
        values: the utility of every item.
        choices: the prompt of every item; None for kind other and for random.
        usage: of these.
        matching: what is gained by which item gets which prompt, and its permutation test.
        correlation: of the selector's scores with the utilities.
    """

    name: str
    kind: Kind
    mean: Estimate
    gain: Estimate
    over_fixed: Estimate
    regret: Estimate
    recovery: Estimate | None
    bins: list[float]
    values: list[float]
    choices: list[int] | None = None
    usage: Usage | None = None
    matching: Tested | None = None
    correlation: Correlation | None = None

    @property
    def short(self) -> str:
        """The name, without the folder of a user's file."""
        return Path(self.name).name if ".py:" in self.name else self.name


@dataclass(frozen=True)
class Agreement(Part):
    """Two selectors: the share of items they give the same prompt, and Cohen's kappa of it."""

    first: str
    second: str
    share: float
    kappa: float | None


@dataclass(frozen=True, kw_only=True)
class Measure(Part):
    """One kind of utility.

    Attributes:
        unit: of the utility.
        items: their number.
        bins: names of the bins that the policies' `bins` are of.
        utilities: of every item under every prompt, [items][prompts].
        oracle: its gain against that of noise.
        random_draws: mean utility of ten draws of random prompts.
        policies, agreements: in the order of tables.
    """

    name: str
    unit: str
    items: int
    bins: list[str]
    utilities: list[list[float]]
    oracle: OracleNull
    random_draws: list[float]
    policies: list[Policy]
    agreements: list[Agreement]

    def policy(self, name: str) -> Policy:
        """The policy of that name (KeyError where there is none)."""
        return {policy.name: policy for policy in self.policies}[name]


@dataclass(frozen=True)
class Cost(Part):
    """What a selector costs for one input.

    Attributes:
        passes: its multiplications as a share of those of the model's own pass of that input.
        ms: its median time.
        bytes: of its parameters.
    """

    passes: float
    ms: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Study(Part):
    """The whole file.

    Attributes:
        config, environment: of the command and the machine, as in `Results`.
        prompt_lengths: tokens of each prompt.
        cache_bytes: of the stored keys and values of the pool.
        cost_tokens: length of the input that costs were measured on, alone in its batch.
        pass_ms: median time of the model's own pass of it, behind one prompt.
        costs: by selector.
        measures: text, continuation, accuracy and margin, as far as they were asked for.
    """

    schema: str = SCHEMA
    config: dict[str, Any]
    environment: dict[str, Any]
    prompt_lengths: list[int]
    cache_bytes: int
    cost_tokens: int
    pass_ms: float
    costs: dict[str, Cost]
    measures: list[Measure]

    def measure(self, name: str) -> Measure:
        """The measure of that name (KeyError where there is none)."""
        return {measure.name: measure for measure in self.measures}[name]


def write(study: Study, path: str | Path) -> None:
    """Writes the file, which is complete or absent."""
    write_finite(asdict(study), path)


def read(path: str | Path) -> Study:
    """Reads the file; errors as of `results.read`."""
    return read_as(Study, SCHEMA, path)


@dataclass(frozen=True)
class Outcome:
    """How items fare.

    Attributes:
        values: [N, M] under every prompt, or [N] where nothing is chosen.
        parts: the same by bin, [..., S]; not a number where an item has nothing in that bin.
    """

    values: np.ndarray
    parts: np.ndarray

    def of(self, choices: np.ndarray) -> "Outcome":
        """Of the chosen prompts."""
        rows = np.arange(len(choices))
        return Outcome(
            selection.chosen_values(self.values, choices), self.parts[rows, choices.astype(int)]
        )

    def mean(self) -> "Outcome":
        """Of a prompt at random."""
        return Outcome(self.values.mean(1), self.parts.mean(1))


@dataclass(frozen=True)
class Asked:
    """A measure before it is judged; see `Measure`.

    Attributes:
        prompts: the outcome under every prompt.
        others: by name, outcomes of what chooses none of them.
        margins: [N, M]: where given, the utility is whether one is above 0.
    """

    name: str
    unit: str
    bins: list[str]
    prompts: Outcome
    others: dict[str, Outcome] = field(default_factory=dict)
    margins: np.ndarray | None = None


def judge(asked: Asked, scores: dict[str, np.ndarray], seed: int = 0) -> Measure:
    """Holds every policy against random, the best fixed prompt and the oracle.

    Args:
        scores: [N, M] by selector; the largest is chosen, ties go to the lowest index.
        seed: of resampled items, shuffles and the halves of the best fixed prompt.
    """
    utilities = selection.utility_matrix(asked.prompts.values)
    count, prompts = utilities.shape
    chosen = {name: np.argmax(found, 1) for name, found in scores.items()}
    add = partial(_policy, asked.prompts, seed)
    policies = [add("random", "control", asked.prompts.mean())]
    best = selection.best_fixed(utilities, seed)
    policies.append(add("best fixed", "control", asked.prompts.of(best), best))
    for number in range(prompts):
        always = np.full(count, number)
        policies.append(add(f"prompt {number}", "fixed", asked.prompts.of(always), always))
    for name, choices in chosen.items():
        found = asked.prompts.of(choices)
        policies.append(add(name, "selector", found, choices, scores[name]))
    policies += [add(name, "other", found) for name, found in asked.others.items()]
    oracle = utilities.argmax(1)
    policies.append(add("oracle", "bound", asked.prompts.of(oracle), oracle))
    null = (
        selection.oracle_null(utilities)
        if asked.margins is None
        else selection.oracle_null(asked.margins, threshold=0.0)
    )
    return Measure(
        name=asked.name,
        unit=asked.unit,
        items=count,
        bins=asked.bins,
        utilities=utilities.tolist(),
        oracle=null,
        random_draws=selection.random_draws(utilities, seed=seed),
        policies=policies,
        agreements=agreements(chosen),
    )


def agreements(chosen: dict[str, np.ndarray]) -> list[Agreement]:
    """Of every two selectors."""
    return [
        Agreement(first, second, *selection.agreement(chosen[first], chosen[second]))
        for first, second in combinations(chosen, 2)
    ]


def _policy(
    prompts: Outcome,
    seed: int,
    name: str,
    kind: Kind,
    found: Outcome,
    choices: np.ndarray | None = None,
    scores: np.ndarray | None = None,
) -> Policy:
    utilities, estimate = prompts.values, partial(selection.mean_estimate, seed=seed)
    fixed = selection.chosen_values(utilities, selection.best_fixed(utilities, seed))
    return Policy(
        name=name,
        kind=kind,
        mean=estimate(found.values),
        gain=estimate(found.values - utilities.mean(1)),
        over_fixed=estimate(found.values - fixed),
        regret=estimate(utilities.max(1) - found.values),
        recovery=selection.recovery(utilities, found.values, seed),
        bins=_by_bin(found.parts - prompts.mean().parts),
        values=found.values.tolist(),
        choices=None if choices is None else choices.tolist(),
        usage=None if choices is None else selection.usage(choices, utilities.shape[1]),
        matching=None
        if choices is None or kind != "selector"
        else selection.matching(utilities, choices, seed),
        correlation=None if scores is None else selection.within_item(utilities, scores, seed),
    )


def _by_bin(parts: np.ndarray) -> list[float]:
    """The mean of each bin over the items that have something in it; 0 of an empty bin."""
    known = np.isfinite(parts)
    total = np.where(known, parts, 0.0).sum(0)
    return (total / np.maximum(known.sum(0), 1)).tolist()


def length_bins(lengths: Sequence[int], most: int = 4) -> tuple[list[str], np.ndarray]:
    """Items by the length of their input, in about equal numbers: names, and bool [N, S]."""
    sizes = np.asarray(lengths)
    edges = np.unique(np.quantile(sizes, np.linspace(0, 1, most + 1)[1:], method="lower"))
    index = np.searchsorted(edges, sizes)
    lows = [int(sizes[index == n].min()) for n in range(len(edges))]
    names = [f"{low}-{high} tokens" for low, high in zip(lows, edges.astype(int), strict=True)]
    return names, index[:, None] == np.arange(len(edges))

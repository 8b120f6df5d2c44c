"""What `idp-jax bench` found, as one file of a typed and versioned schema, and what it means.

Two claims of arXiv 2310.00867 are held against it, quantity by quantity: an adapter that chooses
prompts needs 60 % less time than a LoRA, and has 21 times fewer parameters. The invariant: a claim
holds only where the whole interval says so.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from idp_jax.config.choices import Repair
from idp_jax.evaluation.results import Part, read_as, write_finite
from idp_jax.evaluation.roofline import Bound, Peak
from idp_jax.evaluation.statistics import Estimate, median_ratio

SCHEMA = "idp-jax.bench/1"
LESS_TIME = 0.6  # than a LoRA takes, the paper says
FEWER_PARAMETERS = 21.0  # than a LoRA has
QUANTITIES = ("ttft", "tpot", "itl", "e2e")
_CLAIMED = ("ttft", "tpot", "e2e")  # of which every round has one
_PROMPTS: tuple[Repair, ...] = ("idp", "prompt", "prefix")
Verdict = Literal["holds", "does not hold", "undecided"]


@dataclass(frozen=True)
class Summary(Part):
    """Of several times, in milliseconds; `std` is the standard deviation of a sample."""

    median: float
    p90: float
    p99: float
    std: float


@dataclass(frozen=True)
class Timed(Part):
    """Every timed round of one variant at one batch size, in milliseconds.

    Attributes:
        ttft_ms: time to the first token: from the prompts to the first token of every row, a
            pool's choice included.
        itl_ms: inter-token latency, [rounds][new_tokens - 1]: from each token to the next.
        summaries: by quantity: ttft; tpot, the time per output token (e2e - ttft) / (n - 1) of
            every round; itl, of all tokens of all rounds; e2e, end to end.
    """

    ttft_ms: list[float]
    itl_ms: list[list[float]]
    summaries: dict[str, Summary]

    @classmethod
    def of(cls, seconds: Sequence[np.ndarray]) -> "Timed":
        """What `inference.timing.time_tokens` gave in every round."""
        times = 1000 * np.asarray(seconds)
        found = cls(times[:, 0].tolist(), times[:, 1:].tolist(), {})
        summaries = {name: _summary(found.values(name)) for name in QUANTITIES}
        return dataclasses.replace(found, summaries=summaries)

    def values(self, quantity: str) -> np.ndarray:
        """One number for each round, of itl for each token; float64."""
        first, steps = np.asarray(self.ttft_ms), np.asarray(self.itl_ms)
        return {
            "ttft": first,
            "tpot": steps.mean(1),
            "itl": steps.ravel(),
            "e2e": first + steps.sum(1),
        }[quantity]


def _summary(values: np.ndarray) -> Summary:
    std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    median, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return Summary(median, p90, p99, std)


@dataclass(frozen=True, kw_only=True)
class BenchVariant(Part):
    """A model with one repair or none.

    Attributes:
        name: for people.
        model: the name or folder that was loaded.
        repair: the kind of its adapter; None for the model alone.
        merged: whether the adapter was written into the matrices.
        adapter: its folder; None for one that was made for the purpose.
        about: what the adapter is, in words: lengths, or ranks and matrices.
        parameters: that the adapter adds.
        weight_bytes: that a step reads.
        kv_bytes: of keys and values in front of every row.
        stored_kv_bytes: of those that are kept, of all prompts of a pool.
        bounds: by batch size.
        runs: by batch size; empty where nothing was timed.
    """

    name: str
    model: str
    repair: Repair | None = None
    merged: bool = False
    adapter: str | None = None
    about: str = ""
    parameters: int = 0
    weight_bytes: int
    kv_bytes: int = 0
    stored_kv_bytes: int = 0
    bounds: dict[int, Bound]
    runs: dict[int, Timed] = field(default_factory=dict)

    def share(self, batch_size: int, quantity: Literal["ttft", "tpot"]) -> float:
        """The part of the roofline that was reached, by the median."""
        least = getattr(self.bounds[batch_size], f"{quantity}_ms")
        return least / self.runs[batch_size].summaries[quantity].median


@dataclass(frozen=True, kw_only=True)
class Claim(Part):
    """One of the paper's two claims, for one pair of variants beside the same model.

    Attributes:
        quantity: parameters, ttft, tpot or e2e.
        variant, against: names.
        batch_size: None for parameters.
        ratio: of times, variant / against; of parameters, against / variant.
        verdict: "undecided" where the interval holds the claimed number.
    """

    quantity: str
    variant: str
    against: str
    batch_size: int | None = None
    ratio: Estimate
    verdict: Verdict


@dataclass(frozen=True)
class Equal(Part):
    """A LoRA, and the tokens of prompt of which it has 21 times as many parameters.

    Attributes:
        tokens: at most; of a pool all prompts' together.
    """

    rank: int
    targets: list[str]
    parameters: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class BenchResults(Part):
    """The whole file.

    Attributes:
        config: the settings of the command.
        environment: device and versions, see `jobs.machine.describe`.
        peak: what the roofline is of.
        variants: in the order of models and adapters.
        left_out: by name, why a variant was not made.
        equal: LoRAs of several sizes, and prompts 21 times as small.
        claims: see `claims`.
    """

    schema: str = SCHEMA
    config: dict[str, Any]
    environment: dict[str, Any]
    peak: Peak
    variants: list[BenchVariant]
    left_out: dict[str, str]
    equal: list[Equal]
    claims: list[Claim]


def claims(variants: Sequence[BenchVariant], seed: int = 0) -> list[Claim]:
    """Every repair that stands before the input against every LoRA beside the same model.

    Args:
        seed: of the rounds that are drawn again.
    """
    found = []
    for row in variants:
        for other in variants:
            if other.repair != "lora" or other.model != row.model or row.repair not in _PROMPTS:
                continue
            if not other.merged:
                ratio = other.parameters / row.parameters
                exact = Estimate(ratio, ratio, ratio)
                found.append(_claim("parameters", row, other, exact, None))
            for size in row.runs:
                for quantity in _CLAIMED:
                    samples = [x.runs[size].values(quantity).tolist() for x in (row, other)]
                    ratio = median_ratio(*samples, seed=seed)
                    found.append(_claim(quantity, row, other, ratio, size))
    return found


def _claim(quantity: str, row: BenchVariant, other: BenchVariant, ratio, size) -> Claim:
    low, high = ratio.low >= FEWER_PARAMETERS, ratio.high < FEWER_PARAMETERS
    if quantity != "parameters":
        low, high = ratio.high <= 1 - LESS_TIME, ratio.low > 1 - LESS_TIME
    verdict: Verdict = "holds" if low else "does not hold" if high else "undecided"
    names = {"variant": row.name, "against": other.name}
    return Claim(quantity=quantity, batch_size=size, ratio=ratio, verdict=verdict, **names)


def write(results: BenchResults, path: str | Path) -> None:
    """Writes the file, which is complete or absent; raises as `results.write_finite`."""
    write_finite(dataclasses.asdict(results), path, frozenset({"ratio"}))


def read(path: str | Path) -> BenchResults:
    """Reads such a file; raises as `results.read`."""
    return read_as(BenchResults, SCHEMA, path)

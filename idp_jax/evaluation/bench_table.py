"""A bench as cells of text, for a terminal's tables and for Markdown alike, and as sentences."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from idp_jax.evaluation.bench_results import (
    FEWER_PARAMETERS,
    LESS_TIME,
    QUANTITIES,
    BenchResults,
    BenchVariant,
    Claim,
    Summary,
)

_VERDICTS = ("holds", "does not hold", "undecided")


class Sheet(NamedTuple):
    """One table; a cell may have several lines."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def sheets(results: BenchResults) -> list[Sheet]:
    """Times at each batch size, where there are any; what each variant adds; LoRAs of other sizes.

    Without times the bounds of the roofline stand in their place.
    """
    sizes = list(results.variants[0].bounds)
    timed = bool(results.variants[0].runs)
    shown = [_times(results, size) for size in sizes] if timed else [_bounds(results, sizes)]
    return [*shown, _added(results), _equal(results)]


def _times(results: BenchResults, size: int) -> Sheet:
    config = results.config
    title = (
        f"batch {size}, {config['prompt_length']} + {config['new_tokens']} tokens: ms, "
        "median ± std (p90, p99)"
    )
    headings = ["variant", *(name.upper() for name in QUANTITIES), "of the roofline"]
    rows = []
    for row in results.variants:
        cells = [_spread(row.runs[size].summaries[name]) for name in QUANTITIES]
        first, further = row.share(size, "ttft"), row.share(size, "tpot")
        rows.append([row.name, *cells, f"TTFT {first:.0%}\nTPOT {further:.0%}"])
    return Sheet(title, headings, rows)


def _spread(found: Summary) -> str:
    digits = lambda value: f"{value:.1f}" if value >= 100 else f"{value:.2f}"
    least = f"{digits(found.median)} ± {digits(found.std)}"
    return f"{least}\n({digits(found.p90)}, {digits(found.p99)})"


def _bounds(results: BenchResults, sizes: Sequence[int]) -> Sheet:
    config = results.config
    title = (
        f"{config['prompt_length']} + {config['new_tokens']} tokens: TTFT and TPOT at least, ms "
        f"({results.peak.origin})"
    )
    rows = [
        [row.name, *(f"{row.bounds[n].ttft_ms:.3g}, {row.bounds[n].tpot_ms:.3g}" for n in sizes)]
        for row in results.variants
    ]
    return Sheet(title, ["variant", *(f"batch {size}" for size in sizes)], rows)


def _added(results: BenchResults) -> Sheet:
    headings = [
        *("variant", "adapter", "extra parameters", "KV kB of a row", "KV kB kept"),
        "MB of weights a step",
    ]
    rows = [
        [
            row.name,
            row.about,
            f"{row.parameters:,}",
            f"{row.kv_bytes / 1e3:,.0f}",
            f"{row.stored_kv_bytes / 1e3:,.0f}",
            f"{row.weight_bytes / 1e6:,.1f}",
        ]
        for row in results.variants
    ]
    return Sheet("what each adds", headings, rows)


def _equal(results: BenchResults) -> Sheet:
    rows = [
        [f"rank {row.rank} on {' '.join(row.targets)}", f"{row.parameters:,}", f"{row.tokens:,}"]
        for row in results.equal
    ]
    fewer = f"{FEWER_PARAMETERS:g}"
    headings = ["LoRA", "parameters", f"tokens of prompt with {fewer} times fewer"]
    return Sheet(f"{results.config['model']}: LoRAs and prompts", headings, rows)


def sentences(results: BenchResults) -> list[str]:
    """What of the paper's two claims holds here, for which quantities, and what was left out."""
    rows = {row.name: row for row in results.variants}
    said = [f"{name}: not measured: {reason}" for name, reason in results.left_out.items()]
    said += _of_parameters(results, rows)
    times = [claim for claim in results.claims if claim.quantity != "parameters"]
    # The claim is of what chooses; without such a variant, of what stands before the input.
    chosen = [claim for claim in times if rows[claim.variant].repair == "idp"] or times
    pairs = dict.fromkeys((claim.variant, claim.against) for claim in chosen)
    for variant, against in pairs:
        of = [c for c in chosen if (c.variant, c.against) == (variant, against)]
        parts = "; ".join(_of_times(of))
        said.append(f"{LESS_TIME:.0%} less time, {variant} against {against}: {parts}")
    return said


def _of_times(claims: Sequence[Claim]) -> Iterator[str]:
    """What holds, what does not, what is undecided, each with its ratios by batch size."""
    for verdict in _VERDICTS:
        found = [claim for claim in claims if claim.verdict == verdict]
        parts = []
        for quantity in dict.fromkeys(claim.quantity for claim in found):
            ratios = (_ratio(claim) for claim in found if claim.quantity == quantity)
            parts.append(f"{quantity.upper()} ({', '.join(ratios)})")
        if parts:
            yield f"{verdict} for {', '.join(parts)}"
        elif verdict == "holds":
            yield "holds for no quantity"


def _ratio(claim: Claim) -> str:
    found = claim.ratio
    return f"batch {claim.batch_size}: {found.value:.2f} [{found.low:.2f}, {found.high:.2f}] times"


def _of_parameters(results: BenchResults, rows: dict[str, BenchVariant]) -> Iterator[str]:
    claims = [claim for claim in results.claims if claim.quantity == "parameters"]
    for against in dict.fromkeys(claim.against for claim in claims):
        lora = rows[against]
        parts = [
            f"{rows[c.variant].repair} of {rows[c.variant].about} {c.ratio.value:.1f}x, {c.verdict}"
            for c in claims
            if c.against == against
        ]
        yield (
            f"{FEWER_PARAMETERS:g}x fewer parameters than {against} ({lora.about}, "
            f"{lora.parameters:,}): {'; '.join(parts)}"
        )


def markdown(results: BenchResults) -> str:
    """All tables and sentences, ready for a page."""
    machine = results.environment
    parts = [
        f"{machine['device']}, {machine['cpu_cores']} cores, jax {machine['jax']}; roofline: "
        f"{results.peak.origin}."
    ]
    for sheet in sheets(results):
        marks = ["---"] + ["---:"] * (len(sheet.headings) - 1)
        lines = [sheet.headings, marks, *sheet.rows]
        table = "\n".join(f"| {' | '.join(line)} |".replace("\n", " ") for line in lines)
        parts.append(f"### {sheet.title}\n\n{table}")
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in sentences(results))]) + "\n"

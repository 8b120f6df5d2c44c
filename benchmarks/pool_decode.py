"""A pool's prefill and decoding against those of one prompt as long as its longest.

Both run in one process in turn, SmolLM2 in float32; medians count. Serving a pool adds to the
prefill what its selector computes, and nothing to a decode step. Prints milliseconds, the ratios
and their bars, and beside a step what the memory's bandwidth alone would take: the bytes of the
weights by the rate at which an array of 512 MB is summed.

    python benchmarks/pool_decode.py --rows 1 4
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax import load_model
from idp_jax.inference.timing import interleaved
from idp_jax.jobs.machine import describe
from idp_jax.models import Decoder
from idp_jax.recover import Pool, Repaired, SoftPrompt

BARS = {"prefill": 1.05, "decode": 1.02}


def _prompts(model: Decoder, lengths: list[int]) -> list[SoftPrompt]:
    return [
        SoftPrompt.init(model, length, jax.random.key(number))
        for number, length in enumerate(lengths)
    ]


def _variants(model: Decoder, lengths: list[int], selector: str) -> dict[str, Repaired]:
    pool = Pool(_prompts(model, lengths), selector).repair(model)
    return {"prompt": _prompts(model, [max(lengths)])[0].repair(model), "pool": pool}


def _bandwidth() -> float:
    """Bytes that are read in a second, the best of some sums."""
    array = jnp.ones((2**15, 2**12), jnp.float32)
    total = jax.jit(lambda x: x.sum(1))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        total(array).block_until_ready()
        times.append(time.perf_counter() - start)
    return array.nbytes / min(times)


def _compared(times: dict[str, np.ndarray], rows: int, new_tokens: int) -> dict[str, dict]:
    """Medians in ms (of a step, for decoding) and ratios; prints them."""
    found = {}
    for number, job in enumerate(BARS):
        steps = new_tokens if job == "decode" else 1
        ms = {name: 1e3 * float(np.median(t[:, number])) / steps for name, t in times.items()}
        ratio = ms["pool"] / ms["prompt"]
        found[job] = ms | {"ratio": ratio, "bar": BARS[job]}
        print(
            f"{rows:4} {job:8} {ms['prompt']:10.2f} {ms['pool']:10.2f} {ratio:7.3f} {BARS[job]:5}",
            flush=True,
        )
    return found


def main() -> None:
    """Times both and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--lengths", type=int, nargs="+", default=[25, 100], help="of the pool")
    parser.add_argument("--selector", default="mean_attention")
    parser.add_argument("--input", type=int, default=128, help="tokens of the text")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    variants = _variants(model, arguments.lengths, arguments.selector)
    figures: dict = {}
    print(f"{'rows':4} {'job':8} {'prompt ms':>10} {'pool ms':>10} {'ratio':>7} {'bar':>5}")
    for rows in arguments.rows:
        draw = np.random.default_rng(0)
        ids = draw.integers(0, model.config.vocab_size, (rows, arguments.input), np.int32)
        counts = {"new_tokens": arguments.new_tokens, "repeats": arguments.repeats}
        times = interleaved(variants, ids, **counts)
        figures[str(rows)] = _compared(times, rows, arguments.new_tokens)
    size, rate = sum(x.nbytes for x in jax.tree.leaves(model)), _bandwidth()
    figures["bound_ms"] = 1e3 * size / rate
    print(
        f"{size / 1e6:.0f} MB of weights at {rate / 1e9:.1f} GB/s: no step of one row takes less "
        f"than {1e3 * size / rate:.1f} ms"
    )
    figures["environment"] = describe()
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

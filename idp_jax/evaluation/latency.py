"""How long prefill and decoding take, with the protocol beside the numbers.

Compilation is left out (everything runs once before), and a LoRA is measured beside its frozen
matrices, unmerged, because merging would leave the quantisation grid or fill the pruning mask.
"""

import jax
import numpy as np

from idp_jax.evaluation.results import LatencyResult
from idp_jax.inference.timing import time_generation
from idp_jax.models import Decoder
from idp_jax.recover import Repaired
from idp_jax.weights import Lora


def latency(
    repaired: Repaired | Decoder,
    *,
    batch_size: int = 1,
    prompt_length: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    seed: int = 0,
) -> LatencyResult:
    """Times greedy generation from random prompts.

    Args:
        prompt_length: text tokens; a soft prompt comes on top.
        new_tokens: decode steps timed together.
        repeats: timed runs, of which the median is given.

    Raises:
        ValueError: a size below 1, or more tokens than learned positions.
    """
    repaired = Repaired.of(repaired)
    sizes = {
        "batch_size": batch_size,
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "repeats": repeats,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    check_positions(repaired, prompt_length, new_tokens)
    config = repaired.decoder.config
    soft = 0 if repaired.prefix is None else repaired.prefix.length
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, config.vocab_size, (batch_size, prompt_length), np.int32)
    times = time_generation(repaired, ids, new_tokens=new_tokens, repeats=repeats)
    prefill_ms, decode_ms = 1000 * times.T
    step = float(np.median(decode_ms)) / new_tokens
    return LatencyResult(
        prefill_ms=float(np.median(prefill_ms)),
        decode_ms_per_token=step,
        tokens_per_second=1000 * batch_size / step,
        prefill_ms_runs=prefill_ms.tolist(),
        decode_ms_per_token_runs=(decode_ms / new_tokens).tolist(),
        soft_prompt_tokens=soft,
        device=jax.devices()[0].device_kind,
        dtype=str(repaired.decoder.embedding.dtype),
        lora="unmerged" if _has_lora(repaired.decoder) else "none",
        **sizes,
    )


def check_positions(repaired: Repaired, prompt_length: int, new_tokens: int) -> None:
    """Refuses more tokens than learned positions, by ValueError; shapes are enough."""
    config = repaired.decoder.config
    soft = 0 if repaired.prefix is None else repaired.prefix.length
    total = soft + prompt_length + new_tokens
    if config.rope is None and total > config.max_positions:
        raise ValueError(
            f"{total} tokens exceed the {config.max_positions} learned positions; "
            "shorten the prompt"
        )


def _has_lora(decoder: Decoder) -> bool:
    layers = decoder.layers
    return any(isinstance(getattr(layers, name), Lora) for name in layers.weight_names)

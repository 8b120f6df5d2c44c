"""What the harness asks of an answer that is generated: its options, its prompts as one batch."""

from typing import Any

import numpy as np

from idp_jax.inference.buckets import bucket

_GENERATION_KEYS = {"do_sample", "temperature", "top_k"}
# Options of other decoders, with the value that changes nothing.
_NEUTRAL = {
    **{"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "diversity_penalty": 0},
    **{"repetition_penalty": 1, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0},
    **{"min_length": 0, "min_new_tokens": 0, "top_p": 1, "min_p": 0, "typical_p": 1},
    **{"epsilon_cutoff": 0, "eta_cutoff": 0},
}
# Those that touch nothing but sampling, beams, padding or speed.
_SAMPLING = {"top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
_HARMLESS = {"length_penalty", "early_stopping", "use_cache", "pad_token_id"}


def effective(options: dict[str, Any]) -> dict:
    """The options of generation that change an answer.

    Raises:
        ValueError: one that would, and is not supported.
    """
    greedy = not options["do_sample"]
    kept = {}
    for key, value in options.items():
        idle = value is None or key in _HARMLESS or (greedy and key in _SAMPLING)
        if idle or (key in _NEUTRAL and value == _NEUTRAL[key]):
            continue
        if key not in _GENERATION_KEYS:
            raise ValueError(
                f"generation option {key!r} = {value!r:.100} is not supported; use "
                f"until, max_gen_toks, {', '.join(sorted(_GENERATION_KEYS))}"
            )
        kept[key] = value
    return kept


def left_padded(
    prompts: list[list[int]], rows: int, filler: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [rows, bucket]; missing rows repeat the first, empty ones hold `filler`."""
    if filler is None and not all(prompts):
        raise ValueError(
            "an empty prompt cannot be continued: the tokenizer names no eos_token; give text"
        )
    prompts = [prompt or [int(filler or 0)] for prompt in prompts]
    prompts = prompts + prompts[:1] * (rows - len(prompts))
    ids, mask = np.zeros((2, rows, bucket(len(prompts[0]))), np.int32)
    for number, prompt in enumerate(prompts):
        ids[number, -len(prompt) :] = prompt
        mask[number, -len(prompt) :] = 1
    return ids, mask

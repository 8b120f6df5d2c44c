"""What a multiple-choice item says beside right or wrong.

An accuracy moves only where the likeliest option changes. These move with every log-probability, so
they show smaller differences on as many items.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def measures(task: Any, item: Any, logprobs: Sequence[float]) -> dict[str, float]:
    """The measures of one item.

    - `gold_log_odds`: the right answer's log-probability less the mean of the others', in nats.
      Above 0 the right answer is likelier than a typical wrong one.
    - `gold_bits_per_byte`: bits of the right answer for each UTF-8 byte of its text (without the
      space before it, as in the harness's `acc_bytes`).

    Of several right answers the likeliest counts.

    Args:
        task: of the harness.
        item: one of its documents.
        logprobs: of every option, natural logs; behind them, of a mutual information, those of the
            options alone.

    Returns:
        Nothing where the task is no multiple choice or the item has no answer; no log-odds where
        every option is right.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return {}
    options = task.doc_to_choice(item)
    known = np.asarray(logprobs[: len(options)], np.float64)
    # Of tasks whose options stand in the question (WinoGrande) that is where the answer is named,
    # and the text that is scored is the same behind all of them.
    right = task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item)
    texts = [task.doc_to_target(item)] * len(options) if task.multiple_input else options
    numbers = [_number(one, options) for one in (right if isinstance(right, list) else [right])]
    gold = [number for number in numbers if number is not None and 0 <= number < len(known)]
    if not gold:
        return {}
    best = max(gold, key=lambda number: known[number])
    found = {}
    if len(others := np.delete(known, gold)):
        found["gold_log_odds"] = float(known[best] - others.mean())
    if size := len(str(texts[best]).encode()):
        found["gold_bits_per_byte"] = float(-known[best] / math.log(2) / size)
    return found


def _number(answer: Any, options: Sequence[str]) -> int | None:
    """Which option is meant: tasks name its number or its text."""
    if isinstance(answer, str):
        return options.index(answer) if answer in options else None
    return answer

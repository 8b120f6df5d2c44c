"""What a model is called with: token ids and a mask, or a tokenizer's encoding of both."""

from collections.abc import Mapping
from typing import Any


def ids_and_mask(input_ids: Any, attention_mask: Any = None) -> tuple[Any, Any]:
    """The ids and the mask (or None) of a call.

    Args:
        input_ids: ids [B, T]; or a mapping with "input_ids" and, it may be, "attention_mask", such
            as transformers' BatchEncoding.
        attention_mask: wins over the mapping's.
    """
    if not isinstance(input_ids, Mapping):
        return input_ids, attention_mask
    mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
    return input_ids["input_ids"], mask

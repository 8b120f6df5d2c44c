"""Inference-time dynamic prompting: a pool of prompts, one chosen per input."""

from typing import Any

from flax import nnx

from idp_jax.models.decoder import Decoder
from idp_jax.recover.prompt import SoftPrompt
from idp_jax.recover.repaired import Repaired, encode_prompts, stack_prompts
from idp_jax.recover.selection import Selection, as_selection
from idp_jax.recover.selectors import Selector, attention_scores


class Pool(nnx.Module):
    """Inference-time dynamic prompting: several soft prompts, one chosen per input.

    Source: arXiv 2310.00867; what is ours of it is said in `selectors`.

    Attributes:
        selector: what scores the prompts; its parameters, if it has any, are trained with them.
    """

    def __init__(
        self,
        prompts: list[SoftPrompt],
        selector: str | Selector | Selection = attention_scores,
    ):
        self.prompts = nnx.List(prompts)
        self.selector = as_selection(selector)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of every prompt."""
        return [prompt.length for prompt in self.prompts]

    def logical_axes(self) -> dict[str, Any]:
        """What the axes of the parameters mean, see `sharding.declared_axes`."""
        return {"prompts": {i: prompt.logical_axes() for i, prompt in enumerate(self.prompts)}}

    def repair(self, decoder: Decoder) -> Repaired:
        """The model with the pool's prefixes stored, one row each."""
        prompts = [prompt.embeddings[...] for prompt in self.prompts]
        prefix = encode_prompts(decoder, prompts)
        return Repaired(decoder, prefix, stack_prompts(prompts), self.selector)

"""Inference-time dynamic prompting: a pool of prompts, one chosen per input."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from idp_jax.models.cache import KV
from idp_jax.models.decoder import Decoder
from idp_jax.recover.joint import Joint, JointlyTrained
from idp_jax.recover.prefix import PrefixAdapter
from idp_jax.recover.prompt import SoftPrompt
from idp_jax.recover.repaired import Repaired, encode_prompts, stack_prompts
from idp_jax.recover.selection import Selection, as_selection
from idp_jax.recover.selectors import Selector, attention_scores

_TEXTS = 1024  # windows that a selector may follow from


class Pool(nnx.Module):
    """Inference-time dynamic prompting: several prompts, one chosen per input.

    Source: arXiv 2310.00867; what is ours of it is said in `selectors`.

    Attributes:
        prompts: soft prompts of any lengths, or prefixes of one length.
        selector: what scores the prompts; its parameters, if it has any, are trained with them.
        joint: how prompts and selector are trained together; None trains what serves, where the
            selector gets no gradient.
    """

    def __init__(
        self,
        prompts: Sequence[SoftPrompt | PrefixAdapter],
        selector: str | Selector | Selection = attention_scores,
        joint: Joint | None = None,
    ):
        _check(prompts)
        self.prompts = nnx.List(prompts)
        self.selector = as_selection(selector)
        self.joint = joint
        if joint is not None:
            joint.check(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of every prompt."""
        return [prompt.length for prompt in self.prompts]

    def logical_axes(self) -> dict[str, Any]:
        """What the axes of the parameters mean, see `sharding.declared_axes`."""
        return {"prompts": {i: prompt.logical_axes() for i, prompt in enumerate(self.prompts)}}

    def repair(self, decoder: Decoder) -> Repaired:
        """The model with the pool's prefixes stored, one row each."""
        prefixes = [prompt for prompt in self.prompts if isinstance(prompt, PrefixAdapter)]
        if prefixes:
            stored = [prefix.repair(decoder).prefix for prefix in prefixes]
            return Repaired(decoder, _stack(stored), None, self.selector)
        prompts = [p.embeddings[...] for p in self.prompts if isinstance(p, SoftPrompt)]
        prefix = encode_prompts(decoder, prompts)
        return Repaired(decoder, prefix, stack_prompts(prompts), self.selector)

    def fitted(self, decoder: Decoder, windows: Callable[[int], np.ndarray]) -> "Pool":
        """The pool with a selector that follows from it and training text, where it has such a one.

        Args:
            windows: a number -> at most so many windows int32 [N, T].
        """
        fit = getattr(self.selector.score, "fitted", None)
        if fit is None:
            return self
        score = fit(self.repair(decoder), windows(_TEXTS))
        selector = Selection(score, dict(self.selector.options), self.selector.name)
        return Pool(list(self.prompts), selector, self.joint)

    def repair_for_training(self, decoder: Decoder, share: jax.Array, key: jax.Array) -> Repaired:
        """The model as the pool is trained beside it; see `joint`."""
        repaired = self.repair(decoder)
        if self.joint is None:
            return repaired
        return JointlyTrained(
            decoder,
            repaired.prefix,
            repaired.prompt_embeddings,
            repaired.selector,
            share=share,
            key=key,
            joint=self.joint,
        )


def _check(prompts: Sequence[SoftPrompt | PrefixAdapter]) -> None:
    """Refuses pools of both kinds, and prefixes of several lengths.

    A prefix's keys are rotated for the place where it was trained, and its input follows at once.
    """
    kinds = {type(prompt).__name__ for prompt in prompts}
    if len(kinds) != 1:
        raise ValueError(f"a pool holds prompts of one kind, not {sorted(kinds)}")
    if isinstance(prompts[0], PrefixAdapter):
        check_prefixes([prompt.length for prompt in prompts])
        if any(getattr(prompt, "lengths", None) is not None for prompt in prompts):
            raise ValueError("a pool holds no prefixes with a length for every layer")


def check_prefixes(lengths: Sequence[int]) -> None:
    """Refuses prefixes of several lengths, by ValueError."""
    if len(set(lengths)) > 1:
        raise ValueError(
            f"the prefixes of a pool must have one length, not {list(lengths)}; give equal "
            "--pool-lengths, or --pool.of prompts"
        )


def _stack(stored: list) -> KV:
    """Prefixes of one row each as one KV with a row for each."""
    join = lambda name, axis: jnp.concatenate([getattr(kv, name) for kv in stored], axis)
    return KV(join("k", 1), join("v", 1), join("mask", 0), join("next_position", 0))

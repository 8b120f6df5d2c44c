"""The methods of repair, one entry each: what `--method` trains, and from which settings.

Their names and default learning rates stand in `config.choices`, which must not wait for jax. How
an adapter is written to a file is told by its class, in `formats.adapters`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from idp_jax.config import Train
from idp_jax.models.decoder import Decoder
from idp_jax.recover.joint import Joint
from idp_jax.recover.lora import LoraAdapter
from idp_jax.recover.pool import Pool, check_prefixes
from idp_jax.recover.prefix import PrefixAdapter
from idp_jax.recover.prompt import SoftPrompt
from idp_jax.recover.repaired import Repaired
from idp_jax.recover.selection import find_selector
from idp_jax.recover.starts import Start


class Adapter(Protocol):
    """What is trained beside a frozen model: a pytree, all of whose leaves are parameters."""

    def repair(self, decoder: Decoder) -> Repaired:
        """The model with the adapter beside it."""
        ...


class Run(NamedTuple):
    """One training.

    Attributes:
        label: what a progress bar calls it.
        folder: where its checkpoints and metrics lie, below the job's folder; "" for that itself.
        init: (decoder, start) -> the adapter before training.
        order: which of the training windows' orders; runs of one pool take different ones.
        cluster: (number, of how many) clusters of the text that it is trained on; None for all.
    """

    label: str
    folder: str
    init: Callable[[Decoder, Start], Adapter]
    order: int = 0
    cluster: tuple[int, int] | None = None


class Method(NamedTuple):
    """How a kind of repair is trained.

    Attributes:
        runs: the trainings that the settings ask for, done one after the other.
        combine: (settings, their adapters, model, text) -> the adapter that is kept; text is a
            number -> at most so many training windows int32 [N, T].
    """

    runs: Callable[[Train], list[Run]]
    combine: Callable[[Train, list, Decoder, Callable[[int], np.ndarray]], Adapter] = (
        lambda settings, trained, decoder, text: trained[0]
    )


def _prompt_of(length: int, folder: str) -> Run:
    def init(decoder: Decoder, start: Start) -> SoftPrompt:
        return SoftPrompt.init(decoder, length, start.key)

    return Run(f"prompt of {length}", folder, init)


def _prompt(settings: Train) -> list[Run]:
    return [_prompt_of(settings.prompt_length, "")]


def _prefix_of(length: int, folder: str) -> Run:
    def init(decoder: Decoder, start: Start) -> PrefixAdapter:
        return PrefixAdapter.init(decoder, length, start.key)

    return Run("prefix", folder, init)


def _prefix(settings: Train) -> list[Run]:
    return [_prefix_of(settings.prompt_length, "")]


def _lora(settings: Train) -> list[Run]:
    lora = settings.lora

    def init(decoder: Decoder, start: Start) -> LoraAdapter:
        return LoraAdapter.init(
            decoder, lora.rank, start.key, alpha=lora.alpha, targets=tuple(lora.targets)
        )

    return [Run("lora", "", init)]


def _pool(settings: Train) -> list[Run]:
    """One run for each prompt, as if it stood by itself, or one for all of them and the selector.

    Raises:
        ValueError: the settings do not fit the prompts' lengths.
    """
    of = _prefix_of if settings.pool.of == "prefixes" else _prompt_of
    if settings.pool.of == "prefixes":
        check_prefixes(settings.pool_lengths)
    apart = [of(n, f"prompt_{number}") for number, n in enumerate(settings.pool_lengths)]
    if settings.pool.training == "apart":
        return [run._replace(order=number) for number, run in enumerate(apart)]
    if settings.pool.training == "clusters":
        return [run._replace(cluster=(number, len(apart))) for number, run in enumerate(apart)]
    joint = Joint(
        settings.pool.mixture,
        settings.pool.temperature,
        settings.pool.balance,
        settings.pool.distractors,
    )

    def init(decoder: Decoder, start: Start) -> Pool:
        own, *keys = jax.random.split(start.key, len(apart) + 1)
        each = zip(apart, keys, strict=True)
        prompts: list[Any] = [run.init(decoder, start._replace(key=key)) for run, key in each]
        selector = find_selector(settings.selector, (decoder, len(apart), own))
        return Pool(prompts, selector, joint)

    return [Run(f"pool of {len(apart)} {settings.pool.of}", "", init)]


def _pool_of(settings: Train, trained: list, decoder: Decoder, text: Callable) -> Pool:
    if settings.pool.training == "joint":  # how it was trained is no part of a pool in use
        return Pool(list(trained[0].prompts), trained[0].selector)
    start = (decoder, len(trained), jax.random.key(settings.seed))
    return Pool(trained, find_selector(settings.selector, start)).fitted(decoder, text)


METHODS: dict[str, Method] = {
    "prompt": Method(_prompt),
    "prefix": Method(_prefix),
    "lora": Method(_lora),
    "idp": Method(_pool, _pool_of),
}


def repair_for_training(
    adapter: Adapter, decoder: Decoder, share: jax.Array, key: jax.Array
) -> Repaired:
    """The model as an adapter is trained beside it, which may differ from how it is used.

    Args:
        share: float32 scalar, the part of the steps that are done.
        key: of what is drawn at random in this step.
    """
    own = getattr(adapter, "repair_for_training", None)
    return adapter.repair(decoder) if own is None else own(decoder, share, key)


def parameter_count(adapter: Adapter) -> int:
    """The number of numbers that an adapter adds to the model."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(adapter))

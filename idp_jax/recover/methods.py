"""The methods of repair, one entry each: what `--method` trains, and from which settings.

Their names and default learning rates stand in `config.choices`, which must not wait for jax. How
an adapter is written to a file is told by its class, in `formats.adapters`.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import numpy as np

from idp_jax.config import Train
from idp_jax.models.decoder import Decoder
from idp_jax.recover.eora import with_eora
from idp_jax.recover.lora import LoraAdapter, MaskedLora
from idp_jax.recover.norms import NormsAndBiases
from idp_jax.recover.pool import Pool
from idp_jax.recover.prefix import PrefixAdapter
from idp_jax.recover.prompt import SoftPrompt
from idp_jax.recover.repaired import Repaired
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
    """

    label: str
    folder: str
    init: Callable[[Decoder, Start], Adapter]


class Method(NamedTuple):
    """How a kind of repair is trained.

    Attributes:
        runs: the trainings that the settings ask for, done one after the other.
        combine: (settings, their adapters) -> the adapter that is kept.
    """

    runs: Callable[[Train], list[Run]]
    combine: Callable[[Train, list], Adapter] = lambda settings, trained: trained[0]


def _prompt_of(length: int, folder: str) -> Run:
    def init(decoder: Decoder, start: Start) -> SoftPrompt:
        return SoftPrompt.init(decoder, length, start.key)

    return Run(f"prompt of {length}", folder, init)


def _prompt(settings: Train) -> list[Run]:
    return [_prompt_of(settings.prompt_length, "")]


def _prefix(settings: Train) -> list[Run]:
    def init(decoder: Decoder, start: Start) -> PrefixAdapter:
        return PrefixAdapter.init(decoder, settings.prompt_length, start.key)

    return [Run("prefix", "", init)]


def _lora(settings: Train) -> list[Run]:
    lora = settings.lora

    def init(decoder: Decoder, start: Start) -> LoraAdapter:
        adapter = (MaskedLora if lora.masked else LoraAdapter).init(
            decoder,
            lora.rank,
            start.key,
            alpha=lora.alpha,
            targets=lora.targets,
            rules=lora.rules,
            rank_stabilized=lora.rank_stabilized,
        )
        # Where only shapes are asked for there is no text, and the shapes are these.
        if lora.start == "zero" or start.teacher is None or start.windows is None:
            return adapter
        return with_eora(adapter, decoder, start.teacher, start.windows)

    return [Run("lora", "", init)]


def _norms(settings: Train) -> list[Run]:
    def init(decoder: Decoder, start: Start) -> NormsAndBiases:
        return NormsAndBiases.init(decoder, biases=settings.norms.biases)

    return [Run("norms", "", init)]


def _pool(settings: Train) -> list[Run]:
    """The prompts of a pool are trained apart, each as if it stood by itself."""
    return [
        _prompt_of(length, f"prompt_{number}")
        for number, length in enumerate(settings.pool_lengths)
    ]


METHODS: dict[str, Method] = {
    "prompt": Method(_prompt),
    "prefix": Method(_prefix),
    "lora": Method(_lora),
    "norms": Method(_norms),
    "idp": Method(_pool, lambda settings, trained: Pool(trained, settings.selector)),
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
    own = getattr(adapter, "parameter_count", None)
    if own is not None:
        return own
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(adapter))

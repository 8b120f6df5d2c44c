"""The methods of repair, one entry each: what `--method` trains, and from which settings.

Their names and default learning rates stand in `config.choices`, which must not wait for jax. How
an adapter is written to a file is told by its class, in `formats.adapters`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import jax
import numpy as np

from idp_jax.config import Train
from idp_jax.models.decoder import Decoder
from idp_jax.recover.lora import LoraAdapter
from idp_jax.recover.pool import Pool
from idp_jax.recover.prefix import PrefixAdapter
from idp_jax.recover.prompt import SoftPrompt
from idp_jax.recover.repaired import Repaired


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
        init: (decoder, key=key) -> the adapter before training.
    """

    label: str
    folder: str
    init: Callable[..., Adapter]


class Method(NamedTuple):
    """How a kind of repair is trained.

    Attributes:
        runs: the trainings that the settings ask for, done one after the other.
        combine: (settings, their adapters) -> the adapter that is kept.
    """

    runs: Callable[[Train], list[Run]]
    combine: Callable[[Train, list], Adapter] = lambda settings, trained: trained[0]


def _prompt(settings: Train) -> list[Run]:
    length = settings.prompt_length
    return [Run(f"prompt of {length}", "", partial(SoftPrompt.init, length=length))]


def _prefix(settings: Train) -> list[Run]:
    return [Run("prefix", "", partial(PrefixAdapter.init, length=settings.prompt_length))]


def _lora(settings: Train) -> list[Run]:
    lora = settings.lora
    init = partial(LoraAdapter.init, rank=lora.rank, alpha=lora.alpha, targets=tuple(lora.targets))
    return [Run("lora", "", init)]


def _pool(settings: Train) -> list[Run]:
    """The prompts of a pool are trained apart, each as if it stood by itself."""
    return [
        Run(f"prompt of {length}", f"prompt_{number}", partial(SoftPrompt.init, length=length))
        for number, length in enumerate(settings.pool_lengths)
    ]


METHODS: dict[str, Method] = {
    "prompt": Method(_prompt),
    "prefix": Method(_prefix),
    "lora": Method(_lora),
    "idp": Method(_pool, lambda settings, trained: Pool(trained, settings.selector)),
}


def parameter_count(adapter: Adapter) -> int:
    """The number of numbers that an adapter adds to the model."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(adapter))

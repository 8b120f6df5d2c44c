"""The methods of repair, one entry each: what `--method` trains, and from which settings.

Their names and default learning rates stand in `config.choices`, which must not wait for jax. How
an adapter is written to a file is told by its class, in `formats.adapters`.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from idp_jax.config import Train
from idp_jax.models.decoder import Decoder
from idp_jax.recover.eora import with_eora
from idp_jax.recover.joint import Joint
from idp_jax.recover.lora import LoraAdapter, MaskedLora
from idp_jax.recover.norms import NormsAndBiases
from idp_jax.recover.pool import Pool, check_prefixes
from idp_jax.recover.prefix import PrefixAdapter, ProjectedPrefix
from idp_jax.recover.prompt import SoftPrompt
from idp_jax.recover.repaired import Repaired
from idp_jax.recover.selection import find_selector
from idp_jax.recover.starts import Start, first_embeddings


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
        text: lengths of the texts that `Start.text` is to bring, in tokens.
        windows: how many windows of training text `Start.windows` is to bring; 0 for None.
        teacher: whether `Start.teacher` is to bring the uncompressed model.
        order: which of the training windows' orders; runs of one pool take different ones.
        cluster: (number, of how many) clusters of the text that it is trained on; None for all.
    """

    label: str
    folder: str
    init: Callable[[Decoder, Start], Adapter]
    text: tuple[int, ...] = ()
    windows: int = 0
    teacher: bool = False
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


def _prompt_of(settings: Train, length: int, folder: str) -> Run:
    kind, frozen = settings.init.tokens, settings.init.frozen_tokens

    def init(decoder: Decoder, start: Start) -> SoftPrompt:
        return SoftPrompt(first_embeddings(decoder, length, start, kind), frozen)

    return Run(f"prompt of {length}", folder, init, text=(length,) if kind == "text" else ())


def _prompt(settings: Train) -> list[Run]:
    return [_prompt_of(settings, settings.prompt_length, "")]


def _prefix_of(settings: Train, length: int, folder: str) -> Run:
    kind, lengths, width = settings.init.tokens, settings.prefix.lengths, settings.prefix.projection

    def init(decoder: Decoder, start: Start) -> PrefixAdapter | ProjectedPrefix:
        source = _source(settings, decoder, start)
        embeddings = first_embeddings(source, length, start, kind)
        plain = PrefixAdapter.of(source, embeddings, settings.init.frozen_tokens, lengths or None)
        return plain if width is None else ProjectedPrefix(plain, width, start.key)

    text = (length,) if kind == "text" else ()
    return Run("prefix", folder, init, text=text, teacher=settings.init.model == "teacher")


def _prefix(settings: Train) -> list[Run]:
    return [_prefix_of(settings, max(settings.prefix.lengths or (settings.prompt_length,)), "")]


def _plain_prefix(settings: Train, trained: list, *beside: Any) -> PrefixAdapter:
    """The prefix alone, without the MLP that it may have been trained through."""
    (found,) = trained
    return found.prefix() if isinstance(found, ProjectedPrefix) else found


def _source(settings: Train, decoder: Decoder, start: Start) -> Decoder:
    """The model whose keys and values a prefix begins with.

    Raises:
        ValueError: the teacher is another model, not the same one uncompressed.
    """
    if settings.init.model == "compressed":
        return decoder
    if start.teacher is None:
        raise ValueError("a start with the teacher's keys and values needs --teacher.model")
    ours, theirs = decoder.config, start.teacher.config
    for name in ("architecture", "num_layers", "num_kv_heads", "head_dim", "rope", "vocab_size"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"--teacher.model {settings.teacher.model} has {name} {getattr(theirs, name)}, the "
                f"model has {getattr(ours, name)}; a prefix can begin with the keys and values of "
                "the same model uncompressed only"
            )
    return start.teacher


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
        return with_eora(adapter, decoder, start.teacher, start.windows, start.segments)

    if lora.start == "zero":
        return [Run("lora", "", init)]
    return [Run("lora", "", init, windows=lora.windows, teacher=True)]


def _norms(settings: Train) -> list[Run]:
    def init(decoder: Decoder, start: Start) -> NormsAndBiases:
        return NormsAndBiases.init(decoder, biases=settings.norms.biases)

    return [Run("norms", "", init)]


def _pool(settings: Train) -> list[Run]:
    """One run for each prompt, as if it stood by itself, or one for all of them and the selector.

    Raises:
        ValueError: the settings do not fit the prompts' lengths.
    """
    of = _prefix_of if settings.pool.of == "prefixes" else _prompt_of
    if settings.pool.of == "prefixes":
        check_prefixes(settings.pool_lengths)
    lengths = enumerate(settings.pool_lengths)
    apart = [of(settings, length, f"prompt_{number}") for number, length in lengths]
    if settings.pool.training == "apart":
        return [run._replace(order=number) for number, run in enumerate(apart)]
    if settings.pool.training == "clusters":
        return [run._replace(cluster=(number, len(apart))) for number, run in enumerate(apart)]
    return [_together(settings, apart)]


def _together(settings: Train, apart: list[Run]) -> Run:
    """One run over all prompts of a pool and its selector."""
    joint = Joint(
        settings.pool.mixture,
        settings.pool.temperature,
        settings.pool.balance,
        settings.pool.distractors,
    )

    def init(decoder: Decoder, start: Start) -> Pool:
        own, *keys = jax.random.split(start.key, len(apart) + 1)
        texts, prompts = iter(start.text), []
        for run, key in zip(apart, keys, strict=True):
            text = tuple(islice(texts, len(run.text)))
            prompts.append(run.init(decoder, start._replace(key=key, text=text)))
        selector = find_selector(settings.selector, (decoder, len(apart), own))
        return Pool(prompts, selector, joint)

    text = tuple(length for run in apart for length in run.text)
    label = f"pool of {len(apart)} {settings.pool.of}"
    return Run(label, "", init, text=text, teacher=any(run.teacher for run in apart))


def _pool_of(settings: Train, trained: list, decoder: Decoder, text: Callable) -> Pool:
    if settings.pool.training == "joint":  # how it was trained is no part of a pool in use
        return Pool(list(trained[0].prompts), trained[0].selector)
    start = (decoder, len(trained), jax.random.key(settings.seed))
    return Pool(trained, find_selector(settings.selector, start)).fitted(decoder, text)


METHODS: dict[str, Method] = {
    "prompt": Method(_prompt),
    "prefix": Method(_prefix, _plain_prefix),
    "lora": Method(_lora),
    "norms": Method(_norms),
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


def trained(adapter: Adapter) -> Any:
    """Which numbers of an adapter are trained: its own tree, with bool arrays that fit the leaves.

    True stands for all of a leaf. A module that holds some of its numbers back has a method
    `trained` that gives its part of the tree.
    """
    has_own = lambda x: hasattr(x, "trained")
    return jax.tree.map(lambda x: x.trained() if has_own(x) else True, adapter, is_leaf=has_own)


def parameter_count(adapter: Adapter) -> int:
    """The number of numbers that are trained: frozen ones are none of them."""
    count = lambda x, mask: int(np.broadcast_to(mask, x.shape).sum())
    return sum(jax.tree.leaves(jax.tree.map(count, adapter, trained(adapter))))

"""The uncompressed model beside a training: what it says of every batch, at once or from disk.

It is loaded when it is first asked. A training whose text is all in the cache never runs it, and
needs it for its head alone, if at all. On a batch it runs once; its hidden states go to the
objective, which makes its logits chunk by chunk, or its word is shortened here, chunk by chunk as
well.
"""

import hashlib
import json
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax import formats
from idp_jax.config import ConfigError, Train
from idp_jax.config import Teacher as TeacherSettings
from idp_jax.data.batch import Batch
from idp_jax.data.sources import SELF
from idp_jax.formats.source import open_config
from idp_jax.jobs.files import fingerprint
from idp_jax.jobs.progress import SILENT, Progress
from idp_jax.models.config import from_hf
from idp_jax.models.decoder import Decoder
from idp_jax.models.head import Head
from idp_jax.processes import gather
from idp_jax.sharding import shard_batch
from idp_jax.training.cache import Cache, window_keys
from idp_jax.training.objectives import Mix, make_objective
from idp_jax.training.word import FORMS, Word, shorten

_MULTIPLIER = 2654435761  # Knuth's; odd, so that its powers do not vanish


class Teacher:
    """The model of `--teacher.model`, as far as a training needs one."""

    def __init__(
        self,
        config: Train,
        tokenizer: Any,
        *,
        mesh: jax.sharding.Mesh | None = None,
        progress: Progress = SILENT,
    ):
        """Loads no model.

        Args:
            tokenizer: of the text.

        Raises:
            ConfigError: the teacher has other tokens, or the cache is another's.
        """
        self._config, self._mesh, self._progress = config, mesh, progress
        self._objective = make_objective(config.objective)
        self._vocabulary = _vocabulary(tokenizer)
        if config.teacher.model is not None and self._is_asked:
            theirs = _vocabulary(formats.load_tokenizer(config.teacher.model))
            if theirs != self._vocabulary:
                raise ConfigError(
                    f"--teacher.model {config.teacher.model} has another vocabulary than "
                    f"{config.model}; give the model that this one was made of"
                )
        self._cache = None if config.teacher.cache is None else self._open_cache()

    @property
    def _is_asked(self) -> bool:
        """Whether the objective wants to hear of every batch."""
        return asks(self._objective)

    @cached_property
    def decoder(self) -> Decoder:
        """The model, placed on the mesh."""
        assert self._config.teacher.model is not None
        return formats.load_model(
            self._config.teacher.model,
            **self._config.held,
            use_sparse24=False,
            mesh=self._mesh,
            progress=self._progress.tracker("loading the teacher"),
        )

    @cached_property
    def head(self) -> Head:
        """What makes logits of hidden states from the cache.

        A model that is loaded for its sake alone is let go of.
        """
        needed = "decoder" in self.__dict__
        head = self.decoder.output_head()
        if not needed:
            self.__dict__.pop("decoder")
        return head

    def release(self) -> None:
        """Lets go of a model that was asked for something else than the objective's sake."""
        if not self._is_asked:
            self.__dict__.pop("decoder", None)

    def attach(self, batch: Batch) -> Batch:
        """A batch with the teacher's word, as `fit` takes it; on the mesh like the batch."""
        if self._config.teacher.model is None or not self._is_asked:
            return batch
        if self._cache is None:
            return batch._replace(teacher=self._word(batch))
        tokens, segments = gather((batch.tokens, batch.segments))
        segments = None if segments is None else np.asarray(segments)

        def ask() -> dict[str, np.ndarray]:
            word = self._word(batch)
            if word.kept is None:
                return {"hidden": np.asarray(gather(word.hidden), np.float32)}
            kept = gather({name: getattr(word.kept, name) for name in word.kept.FIELDS})
            return {name: np.asarray(value) for name, value in kept.items()}

        rows = self._cache.rows(window_keys(np.asarray(tokens), segments), ask)
        settings = self._config.teacher
        if settings.form == "full":
            hidden = jnp.asarray(rows["hidden"], self.head.kernel.dtype)
            word = shard_batch(Word(hidden, temperature=settings.temperature), self._mesh)
            return batch._replace(teacher=word.replace(head=self.head))
        kept = FORMS[settings.form](**rows, temperature=settings.temperature)
        word = Word(kept=kept, temperature=settings.temperature)
        return batch._replace(teacher=shard_batch(word, self._mesh))

    def _word(self, batch: Batch) -> Word:
        decoder, asked = self.decoder, what_is_asked(self._config.teacher, self._objective)
        key = jax.random.key(self._config.seed)
        word = hear(decoder, batch.tokens, batch.segments, key, **asked)
        # Put in outside of the jit: a result of it would be a copy.
        return word.replace(head=decoder.output_head()) if asked["form"] == "full" else word

    def _open_cache(self) -> Cache:
        settings, config = self._config.teacher, self._config
        assert settings.model is not None and settings.cache is not None
        identity = {
            "version": 1,
            "teacher": fingerprint(formats.resolve(settings.model)),
            "tokenizer": self._vocabulary,
            "form": settings.form,
            "tokens": settings.tokens,
            "temperature": settings.temperature,
            "dtype": config.dtype,
            "seed": config.seed if settings.form == "sampled" else None,
        }
        model = from_hf(open_config(settings.model))
        if settings.form == "full":
            identity |= {"tokens": None, "temperature": None}  # hidden states depend on neither
            shapes = {"hidden": (np.float32, model.embedding_dim)}
            return Cache(settings.cache, identity, config.data.sequence_length, shapes)
        ids = np.uint16 if model.vocab_size <= 2**16 else np.uint32
        shapes = {
            name: (ids if name == "ids" else np.float32, settings.tokens * (axes - 2))
            for name, axes in FORMS[settings.form].FIELDS.items()
        }
        return Cache(settings.cache, identity, config.data.sequence_length, shapes)


def what_is_asked(settings: TeacherSettings, objective: Mix) -> dict[str, Any]:
    """What `hear` is to keep of the teacher's word for an objective, by keyword."""
    form = settings.form if objective.divergent else "full"
    return {
        "form": form,
        "tokens": settings.tokens,
        "temperature": settings.temperature,
        "keep_hidden": form == "full" or objective.hidden,
    }


def asks(objective: Mix) -> bool:
    """Whether a term may need the teacher; nobody knows it of a file's."""
    return any(term.needs_teacher is not False for term in objective.terms)


def check_teacher(config: Train) -> None:
    """Refuses a teacher that is missing, never asked, or no teacher of this model; loads nothing.

    Raises:
        ConfigError: with the setting and the remedy.
    """
    settings, objective = config.teacher, make_objective(config.objective)
    needing = next((term.name for term in objective.terms if term.needs_teacher), None)
    if settings.model is None:
        if needing is not None:
            raise ConfigError(
                f"--objective {config.objective!r}: {needing} needs a teacher; give the "
                "uncompressed model as --teacher.model"
            )
        if settings.cache is not None:
            raise ConfigError(f"--teacher.cache {settings.cache} needs its --teacher.model")
        return
    theirs = from_hf(open_config(settings.model))
    if not asks(objective):
        if config.data.train != SELF and not config.starts_from_teacher:
            raise ConfigError(
                f"--teacher.model {settings.model} is never asked: --objective "
                f"{config.objective!r} needs no teacher; give --objective kl, or leave it out"
            )
    else:
        _check_sizes(config, objective, theirs)
    if settings.cache is not None:
        _check_cache(config, objective)


def _check_sizes(config: Train, objective: Mix, theirs) -> None:
    ours, settings = from_hf(open_config(config.model)), config.teacher
    if theirs.vocab_size != ours.vocab_size:
        raise ConfigError(
            f"--teacher.model {settings.model} has another vocabulary than {config.model}: "
            f"{theirs.vocab_size} tokens, not {ours.vocab_size}"
        )
    if objective.hidden and theirs.embedding_dim != ours.embedding_dim:
        raise ConfigError(
            f"--teacher.model {settings.model} has hidden states of {theirs.embedding_dim}, "
            f"{config.model} of {ours.embedding_dim}; give --objective kl"
        )
    if settings.form == "topk" and settings.tokens > ours.vocab_size:
        raise ConfigError(
            f"--teacher.tokens {settings.tokens} is more than the vocabulary's {ours.vocab_size}"
        )


def _check_cache(config: Train, objective: Mix) -> None:
    cache, form = config.teacher.cache, config.teacher.form
    if not asks(objective):
        raise ConfigError(
            f"--teacher.cache {cache} is never read: --objective {config.objective!r} needs no "
            "teacher; leave it out"
        )
    if form != "full" and (objective.hidden or not objective.divergent):
        raise ConfigError(
            f"--teacher.cache {cache} of --teacher.form {form} keeps what kl needs, and nothing "
            f"else: --objective {config.objective!r} cannot be trained from it; give "
            "--teacher.form full"
        )


@partial(jax.jit, static_argnames=("form", "tokens", "temperature", "keep_hidden"))
def hear(
    decoder: Decoder,
    ids: jax.Array,
    segments: jax.Array | None,
    key: jax.Array,
    *,
    form: str,
    tokens: int,
    temperature: float,
    keep_hidden: bool,
) -> Word:
    """The teacher's word on int32 [B, T], without its head."""
    hidden = decoder.hidden(ids, segments=segments)
    kept = None
    if form != "full":
        draws = _uniform(ids, key)
        kept = shorten(hidden, decoder.output_head(), form, tokens, temperature, draws)
    return Word(hidden if keep_hidden else None, None, kept, temperature)


def _uniform(ids: jax.Array, key: jax.Array) -> jax.Array:
    """float32 [B, T] of [0, 1): random numbers that a window has wherever and whenever it comes."""
    time = ids.shape[1]
    powers = np.array([pow(_MULTIPLIER, n, 2**32) for n in range(1, time + 1)], np.uint32)
    hashes = ((ids.astype(jnp.uint32) + jnp.uint32(1)) * powers).sum(1, dtype=jnp.uint32)
    draw = lambda number: jax.random.uniform(jax.random.fold_in(key, number), (time,))
    return jax.vmap(draw)(hashes)


def _vocabulary(tokenizer: Any) -> str:
    """A digest of which id is which token."""
    known = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]))
    return hashlib.sha256(known.encode()).hexdigest()

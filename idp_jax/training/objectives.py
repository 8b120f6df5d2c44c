"""What training makes smaller: functions of the repaired model and a batch.

The invariant: an objective knows neither the adapter nor the optimiser, and runs the student once,
whatever it is made of. What it needs beside the tokens, such as a teacher's word on them, comes in
the batch.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from idp_jax.data.batch import Batch
from idp_jax.models.decoder import Remat
from idp_jax.recover.repaired import Repaired, with_penalties
from idp_jax.training.chunks import summed
from idp_jax.training.terms import Positions, Term, parse
from idp_jax.training.word import Full, Word


class Objective(Protocol):
    """A loss, differentiable (traceable)."""

    def __call__(self, repaired: Repaired, batch: Batch, /) -> tuple[jax.Array, dict]:
        """The loss, float32 scalar, and scalars by name to be logged beside it."""
        ...


@dataclass(frozen=True)
class Mix:
    """A weighted sum of terms, each a mean over the positions whose next token counts.

    Attributes:
        terms: see `terms.parse`.
        remat: what the backward pass makes again, see `Decoder.hidden`.
    """

    terms: tuple[Term, ...]
    remat: Remat | None = None

    @property
    def hidden(self) -> bool:
        """Whether a term compares hidden states."""
        return any(term.of_hidden for term in self.terms)

    @property
    def divergent(self) -> bool:
        """Whether a term reads the teacher's word on the next token, or may do so."""
        return any(term.needs_teacher is not False and not term.of_hidden for term in self.terms)

    def __call__(self, repaired: Repaired, batch: Batch) -> tuple[jax.Array, dict]:
        """The loss, and every term and every penalty of the repair by name.

        Raises:
            ValueError: the teacher's word is missing from the batch.
        """
        past, penalties = repaired.serve(batch.tokens)
        hidden = repaired.decoder.hidden(
            batch.tokens, past=past, remat=self.remat, segments=batch.segments
        )
        weight = _weight(batch)
        loss, found = self._of_logits(hidden, weight, repaired, batch)
        of_states = self._of_hidden(hidden, weight, batch.teacher)
        loss = loss + self._sum(of_states)
        return with_penalties(loss, penalties), found | of_states | penalties

    def _sum(self, found: dict[str, jax.Array]) -> jax.Array:
        """The weighted sum of some of the terms."""
        summands = (jnp.float32(t.weight) * found[t.name] for t in self.terms if t.name in found)
        return sum(summands, jnp.zeros((), jnp.float32))

    def _of_hidden(self, hidden: jax.Array, weight: jax.Array, word: Word | None) -> dict:
        terms = [term for term in self.terms if term.of_hidden]
        if not terms:
            return {}
        if word is None or word.hidden is None:
            raise ValueError(f"{terms[0].name} needs a teacher's hidden states in the batch")
        return {term.name: term.function(hidden, word.hidden, weight) for term in terms}

    def _of_logits(
        self, hidden: jax.Array, weight: jax.Array, repaired: Repaired, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The sum of the terms over logits, which may be differentiated, and each by name."""
        terms = [term for term in self.terms if not term.of_hidden]
        if not terms:
            return jnp.zeros((), jnp.float32), {}
        word = Word() if batch.teacher is None else batch.teacher
        said = word.hidden if word.kept is None else word.kept
        if said is None and (needing := [t.name for t in terms if t.needs_teacher]):
            raise ValueError(f"{needing[0]} needs a teacher's word in the batch")

        def score(logits: jax.Array, rows: tuple, head):
            targets, weight, said = rows
            if head is not None and said is not None:
                said = Full(head(said), word.temperature)
            at = Positions(targets, said)
            values = {term.name: (_each(term, logits, at) * weight).sum() for term in terms}
            return self._sum(values), values

        theirs = word.head if word.kept is None else None
        head = None if theirs is None else theirs.whole()
        targets = jnp.roll(batch.tokens, -1, 1)
        ours = repaired.decoder.output_head().whole()
        with jax.named_scope("loss"):
            return summed(score, hidden, ours, (targets, weight, said), head)


def _each(term: Term, logits: jax.Array, positions: Positions) -> jax.Array:
    """A term of every position, [B, W]; ValueError where a function of one's own gives another."""
    found = term.function(logits, positions)
    if jnp.shape(found) != logits.shape[:2]:
        raise ValueError(
            f"the term {term.name} gives values {jnp.shape(found)}; it must give one for each of "
            f"the positions {logits.shape[:2]}"
        )
    return found


def make_objective(text: str, *, remat: Remat | None = None) -> Mix:
    """The objective of a sum such as "kl + 0.5*ce"; raises ConfigError as `terms.parse`."""
    return Mix(parse(text), remat)


def next_token(
    repaired: Repaired, batch: Batch, *, remat: Remat | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of every next token that counts; as `Mix.__call__`."""
    return Mix(_NEXT_TOKEN, remat)(repaired, batch)


_NEXT_TOKEN = parse("ce")


def counted_targets(batch: Batch) -> jax.Array:
    """bool [B, T - 1], whether the next token of each position counts."""
    counted = jnp.ones(batch.tokens[:, 1:].shape, bool)
    if batch.loss_mask is not None:
        counted = counted & batch.loss_mask[:, 1:].astype(bool)
    if batch.segments is not None:  # the first token of a document is nobody's to foresee
        counted = counted & (batch.segments[:, 1:] == batch.segments[:, :-1])
    return counted


def _weight(batch: Batch) -> jax.Array:
    """float32 [B, T], 1 / N for each of the N positions whose next token counts."""
    counted = jnp.pad(counted_targets(batch).astype(jnp.float32), [(0, 0), (0, 1)])
    return counted / jnp.maximum(counted.sum(), 1)

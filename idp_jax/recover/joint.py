"""Training the prompts of a pool, and what chooses among them, together.

The invariant: what stands before a row in training is what would stand there in use, a stored
prompt's keys and values bit for bit, except in a soft mixture. The choice itself has no gradient;
the scores get one straight through, as if the chosen keys and values were the sum over all prompts,
weighted with the choice's probabilities.

With a row's scores s, in units of u, and the temperature t (geometric from the first to the last
step), p = softmax(s / (u t)) and g Gumbel noise, gumbel takes argmax(s / (u t) + g): a sample of p.
Noise and relaxation share the temperature, so that at its end training chooses as use does, by the
largest score. u is 1 for a module, which learns its own scale. A function's scores have any scale
(shares of attention are thousandths), so there u is their spread over the prompts, which has no
gradient.

Sources: "Categorical Reparameterization with Gumbel-Softmax" (arXiv 1611.01144) for the estimator,
Switch Transformers (arXiv 2101.03961, eq. 4) for the balance, SMoP (EMNLP 2023) for routed prompts,
arXiv 2606.04557 for distractors.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx, struct

from idp_jax.models.cache import KV, concatenate
from idp_jax.recover.repaired import Repaired

_NO_SPREAD = 1e-12  # of scores that are all the same


@dataclass(frozen=True)
class Joint:
    """How a pool is trained as one; see `config.recovery.Pool`."""

    mixture: str = "gumbel"
    temperature: tuple[float, float] = (1.0, 0.1)
    balance: float = 0.01
    distractors: int = 0

    def check(self, lengths: list[int]) -> None:
        """Refuses what prompts of these lengths cannot be trained with.

        Raises:
            ValueError: with the setting and the remedy.
        """
        if self.mixture == "soft" and len(set(lengths)) > 1:
            raise ValueError(
                f"--pool.mixture soft adds up prompts token by token, and --pool-lengths {lengths} "
                "differ; give equal lengths, or --pool.mixture gumbel"
            )
        if self.mixture == "soft" and self.distractors:
            raise ValueError(
                f"--pool.distractors {self.distractors}: a soft mixture has no other prompts; give "
                "--pool.mixture gumbel"
            )
        if self.distractors >= len(lengths):
            raise ValueError(
                f"--pool.distractors {self.distractors} are not fewer than the {len(lengths)} "
                f"prompts of the pool; give {len(lengths) - 1} at most"
            )

    def temperature_at(self, share: jax.Array) -> jax.Array:
        """The temperature when this part of the steps is done, float32 scalar."""
        first, last = self.temperature
        return jnp.float32(first) * jnp.float32(last / first) ** share


class JointlyTrained(Repaired):
    """A pool as it is trained.

    Attributes:
        share: float32 scalar, the part of the steps that are done.
        key: of this step's noise.
        joint: the settings.
    """

    share: jax.Array | None = None
    key: jax.Array | None = None
    joint: Joint = struct.field(pytree_node=False, default=Joint())

    def serve(self, input_ids, attention_mask=None) -> tuple[KV | None, dict[str, jax.Array]]:
        """As `Repaired.serve`, with a choice that is drawn, and a gradient for the scores."""
        inputs = self.selector_inputs(input_ids, attention_mask)
        if inputs is None or self.prefix is None or self.selector is None:
            return self.prefix, {}
        assert self.share is not None and self.key is not None
        scores = self.selector(inputs).astype(jnp.float32)
        temperature = self.joint.temperature_at(self.share)
        unit = 1.0 if isinstance(self.selector.score, nnx.Module) else _spread(scores)
        logits = scores / (temperature * unit)
        noise_key, other_key = jax.random.split(self.key)
        if self.joint.mixture == "soft":
            weights = load = jax.nn.softmax(logits)
            past = _blend(self.prefix, weights)
        else:
            drawn = logits + jax.random.gumbel(noise_key, logits.shape)
            choice = jnp.argmax(drawn, -1).astype(jnp.int32)
            load = jax.nn.one_hot(choice, logits.shape[-1])
            weights = jax.nn.softmax(drawn)
            past = straight_through(self.prefix, choice, weights)
            if self.joint.distractors:
                others = _others(other_key, choice, logits.shape[-1], self.joint.distractors)
                past = _behind(self.prefix, others, past)
        penalties = {
            "balance": self.joint.balance * balance(jax.nn.softmax(logits), load),
            "usage_entropy": usage_entropy(load),
        }
        own = getattr(self.selector.score, "penalties", None)
        return past, penalties if own is None else {**penalties, **own(inputs, load)}


def straight_through(prompts: KV, choice: jax.Array, weights: jax.Array) -> KV:
    """Row choice[b] of the prompts for every b, with a gradient for the weights.

    Args:
        prompts: one prompt per row.
        choice: int32 [B].
        weights: float32 [B, M]; their gradient is that of sum_m weights[b, m] prompts[m] with the
            prompts held fixed. A slot that a prompt leaves empty counts as zeros.
    """
    chosen = prompts.rows(choice)
    nothing = weights - jax.lax.stop_gradient(weights)  # exactly 0, with the gradient of weights
    add = lambda rows, stored: rows + _sum(jax.lax.stop_gradient(stored), prompts.mask, nothing)
    return chosen.replace(k=add(chosen.k, prompts.k), v=add(chosen.v, prompts.v))


def balance(probabilities: jax.Array, load: jax.Array) -> jax.Array:
    """M times the sum over prompts of mean probability x load: 1 where all are used alike.

    Args:
        probabilities: [B, M] of the choice; the load has no gradient.
        load: [B, M], what each row takes of each prompt.
    """
    used = jax.lax.stop_gradient(load).mean(0)
    return probabilities.shape[-1] * (probabilities.mean(0) * used).sum()


def usage_entropy(load: jax.Array) -> jax.Array:
    """The entropy of the prompts' shares of a batch, in nats: ln M where all are used alike."""
    used = jax.lax.stop_gradient(load).mean(0)
    return jax.scipy.special.entr(used).sum()


def _spread(scores: jax.Array) -> jax.Array:
    """The standard deviation over prompts, its square's mean over rows; no gradient."""
    spread = jnp.sqrt(jnp.var(jax.lax.stop_gradient(scores), -1).mean())
    return jnp.maximum(spread, _NO_SPREAD)


def _sum(stored: jax.Array, mask: jax.Array, weights: jax.Array) -> jax.Array:
    """[L, M, S, K, H] weighted by [B, M] -> [L, B, S, K, H]."""
    held = jnp.where(mask[None, :, :, None, None], stored, 0)
    return jnp.einsum("lmskh,bm->lbskh", held, weights.astype(stored.dtype))


def _blend(prompts: KV, weights: jax.Array) -> KV:
    """The weighted sum of prompts of one length, for every row."""
    rows = prompts.rows(jnp.zeros(weights.shape[:1], jnp.int32))  # masks and positions are alike
    return rows.replace(
        k=_sum(prompts.k, prompts.mask, weights), v=_sum(prompts.v, prompts.mask, weights)
    )


def _others(key: jax.Array, choice: jax.Array, prompts: int, count: int) -> jax.Array:
    """`count` prompts beside the chosen one, drawn without repetition: int32 [B, count]."""
    order = jax.random.uniform(key, (choice.shape[0], prompts))
    order = jnp.where(jnp.arange(prompts) == choice[:, None], -1.0, order)
    return jax.lax.top_k(order, count)[1].astype(jnp.int32)


def _behind(prompts: KV, others: jax.Array, past: KV) -> KV:
    """`past` with other prompts in front of it, which get no gradient from there."""
    for number in range(others.shape[1]):
        past = concatenate(jax.lax.stop_gradient(prompts.rows(others[:, number])), past)
    return past

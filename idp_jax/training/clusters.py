"""Which part of the training text a prompt of a pool is trained on.

The invariant: the clusters hang on the text, the model's word embeddings and the seed alone, so a
run that goes on finds them again.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.config import ConfigError
from idp_jax.data.stream import TrainingText
from idp_jax.models.decoder import Decoder
from idp_jax.processes import gather

_ROWS = 256  # windows whose embeddings are looked up at a time
_TRIES = 10  # starts of k-means, until no cluster is empty


def part_of(
    text: TrainingText, decoder: Decoder, cluster: tuple[int, int] | None, order: int
) -> TrainingText:
    """The text in an order of its own, or one of its clusters.

    Args:
        cluster: (number, of how many) or None. A cluster is validated on the held-out windows that
            are nearest to its centre, and on all of them where none is.

    Raises:
        ConfigError: a stream has no clusters, or the windows do not fall into so many.
    """
    text = replace(text, order=order)
    if cluster is None:
        return text
    if text.local is None:
        raise ConfigError(
            f"--pool.training clusters reads all of the text at first, and {text.source} is a "
            "stream; give a local --data.train, or --pool.training apart"
        )
    number, count = cluster
    means = _means(decoder, text.local)
    centres, labels = _clusters(means, count, text.seed)
    held_out = _means(decoder, text.validation)
    nearest = np.square(held_out[:, None] - centres).sum(-1).argmin(-1) == number
    kept = nearest if nearest.any() else np.ones_like(nearest)
    segments = text.validation_segments
    return replace(
        text,
        chosen=np.flatnonzero(labels == number),
        validation=text.validation[kept],
        validation_segments=None if segments is None else segments[kept],
    )


def _means(decoder: Decoder, windows: np.ndarray) -> np.ndarray:
    """The mean embedding of every window, float64 [W, E]."""
    parts = [windows[start : start + _ROWS] for start in range(0, len(windows), _ROWS)]
    found = [gather(_mean_embedding(decoder.embedding[...], np.asarray(part))) for part in parts]
    return np.concatenate([np.asarray(part, np.float64) for part in found])


@jax.jit
def _mean_embedding(table: jax.Array, ids: jax.Array) -> jax.Array:
    return table[ids].astype(jnp.float32).mean(1)


def _clusters(means: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres [count, E] and labels [W] by k-means, from a start of k-means++."""
    from scipy.cluster.vq import ClusterError, kmeans2

    distinct = len(np.unique(means, axis=0))
    for attempt in range(_TRIES if distinct >= count else 0):
        try:
            rng = np.random.default_rng([seed, attempt])
            return kmeans2(means, count, minit="++", missing="raise", rng=rng)
        except ClusterError:
            continue
    raise ConfigError(
        f"the {len(means)} training windows do not fall into {count} clusters; give more text, or "
        "fewer --pool-lengths"
    )

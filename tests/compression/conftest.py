"""A small layer with correlated inputs, as second-order methods want it; the files of a job."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tiny_decoder, tiny_folder, tiny_tokenizer, write_folder

LAYERS = 2


@pytest.fixture
def make_layer() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """(outputs, inputs, seed) -> float32 weights [O, I] and layer inputs [tokens, I]."""

    def make(outputs: int = 24, inputs: int = 96, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        mixing = np.eye(inputs) + rng.normal(size=(inputs, inputs)) / np.sqrt(inputs)
        x = rng.normal(size=(8 * inputs, inputs)) @ mixing
        weights = rng.normal(size=(outputs, inputs))
        return weights.astype(np.float32), x.astype(np.float32)

    return make


@pytest.fixture
def exact_hessian() -> Callable[[np.ndarray], np.ndarray]:
    """Layer inputs [tokens, I] -> 2/n X^T X in float64, rounded to float32 once."""
    return lambda x: (2 / len(x) * x.astype(np.float64).T @ x.astype(np.float64)).astype(np.float32)


@pytest.fixture
def exact_factor() -> Callable[[np.ndarray, float], np.ndarray]:
    """The papers' way to U, in float64: damp, invert, upper Cholesky factor of the inverse."""

    def factor(hessian: np.ndarray, damping: float) -> np.ndarray:
        H = hessian.astype(np.float64)
        diagonal = np.diag(H)
        dead = diagonal == 0
        H = H + np.diag(dead + damping * diagonal[~dead].mean())
        return np.linalg.cholesky(np.linalg.inv(H)).T

    return factor


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of two layers, the same in bfloat16, and a text."""
    folder = tmp_path_factory.mktemp("files")
    tiny_folder(folder / "model", num_layers=LAYERS)
    words = np.random.default_rng(0).choice(["tide ", "ship ", "lamp ", "rock. "], 200)
    (folder / "text.txt").write_text("".join(words))
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), tiny_decoder(num_layers=LAYERS, vocab_size=259)
    )
    write_folder(half, folder / "half")
    tiny_tokenizer().save_pretrained(folder / "half")
    return folder

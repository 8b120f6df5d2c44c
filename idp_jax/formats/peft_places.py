"""Hugging Face's name of every parameter, and where it stands in a decoder.

Adapters name parameters of any kind; the invariant is that every one of the model's is here.
"""

from typing import NamedTuple

from idp_jax.models.abstract import abstract
from idp_jax.models.config import ModelConfig
from idp_jax.models.matrices import matrices
from idp_jax.models.names import NAMES


class Place(NamedTuple):
    """Where a parameter of Hugging Face's model stands in a decoder.

    Attributes:
        path: see `recover.replaced`.
        layer: its layer, or None outside the layers.
        shape: in the file.
    """

    path: str
    layer: int | None
    shape: tuple[int, ...]

    @property
    def turned(self) -> bool:
        """Whether the file has [O, I] where the decoder has [I, O]."""
        return self.path.endswith(".kernel")


def places_of(config: ModelConfig) -> dict[str, Place]:
    """Every parameter of a model by its name in files, the head of tied models too."""
    names, like, found = NAMES[config.architecture], abstract(config), {}

    def norm(module: str, path: str, parts, layer: int | None = None) -> None:
        for name, leaf in (("weight", "scale"), ("bias", "bias")):
            if getattr(parts, leaf, None) is not None:
                found[f"{module}.{name}"] = Place(f"{path}.{leaf}", layer, (config.hidden_dim,))

    for name in ("embedding", "positions"):
        if getattr(like, name) is not None:
            found[f"{getattr(names, name)}.weight"] = Place(name, None, getattr(like, name).shape)
    vocabulary = (config.vocab_size, config.embedding_dim)
    found[f"{names.head}.weight"] = Place("head.kernel", None, vocabulary)
    for name in ("project_in", "project_out"):
        weight = getattr(like, name)
        if weight is not None:
            shape = weight.kernel.shape[::-1]
            found[f"{getattr(names, name)}.weight"] = Place(f"{name}.kernel", None, shape)
    norm(names.final_norm, "final_norm", like.final_norm)
    for layer in range(config.num_layers):
        for matrix in matrices(config):
            module, path = names.weight(layer, matrix.name), f"layers.{matrix.name}"
            shape = (matrix.outputs, matrix.inputs)
            found[f"{module}.weight"] = Place(f"{path}.kernel", layer, shape)
            if matrix.bias:
                found[f"{module}.bias"] = Place(f"{path}.bias", layer, shape[:1])
        for name in ("attention_norm", "mlp_norm"):
            module = names.layer.format(layer) + getattr(names, name)
            norm(module, f"layers.{name}", getattr(like.layers, name), layer)
    return found

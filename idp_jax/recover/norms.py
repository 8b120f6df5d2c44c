"""Scales and biases of norms, and the biases of matrices: the fewest parameters that repair.

Source: "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", arXiv 2312.15230.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from idp_jax.config.choices import Biases
from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import matrices, matrix_axes
from idp_jax.recover.repaired import Repaired
from idp_jax.recover.replaced import parameter, with_parameters


class NormsAndBiases(nnx.Module):
    """Norms and biases that stand in for the model's own.

    Attributes:
        values: by their path, see `replaced.with_parameters`; those in the layers are stacked.
    """

    def __init__(self, values: Mapping[str, jax.Array]):
        self.values = nnx.Dict({path: nnx.Param(value) for path, value in values.items()})

    @classmethod
    def init(cls, decoder: Decoder, *, biases: Biases = "existing") -> "NormsAndBiases":
        """The model's own values; a bias that it does not have begins as zeros.

        Args:
            biases: those of matrices: the existing ones, all, or none.

        Raises:
            ValueError: the model has nothing of what is asked for.
        """
        values = {path: parameter(decoder, path) for path in _norm_paths(decoder)}
        for matrix in matrices(decoder.config) if biases != "none" else ():
            path = f"layers.{matrix.name}.bias"
            if getattr(decoder.layers, matrix.name).bias is not None:
                values[path] = parameter(decoder, path)
            elif biases == "all":
                shape = (decoder.config.num_layers, matrix.outputs)
                values[path] = jnp.zeros(shape, jnp.float32)
        if not values:
            raise ValueError(
                "this model's norms have no parameters, and its matrices no biases; give "
                "--norms.biases all"
            )
        return cls(values)

    def repair(self, decoder: Decoder) -> Repaired:
        """The model with these norms and biases."""
        return Repaired(with_parameters(decoder, {p: v[...] for p, v in self.values.items()}))

    def new(self, decoder: Decoder) -> dict[str, jax.Array]:
        """The biases of matrices that have none in the model, [L, O] by matrix name."""
        return {
            name: self.values[path][...]
            for path in self.values
            if path.startswith("layers.")
            and path.endswith(".bias")
            and getattr(decoder.layers, name := path.split(".")[1]).bias is None
        }

    def logical_axes(self) -> dict[str, Any]:
        """What the axes of the parameters mean, see `sharding.declared_axes`."""
        axes = lambda path: (
            ("embed_activation",) if "norm" in path else (matrix_axes(path.split(".")[1])[1],)
        )
        return {"values": {path: axes(path) for path in self.values}}


def _norm_paths(decoder: Decoder) -> list[str]:
    norms = {
        "layers.attention_norm": decoder.layers.attention_norm,
        "layers.mlp_norm": decoder.layers.mlp_norm,
        "final_norm": decoder.final_norm,
    }
    return [
        f"{path}.{leaf}"
        for path, norm in norms.items()
        for leaf in ("scale", "bias")
        if getattr(norm, leaf, None) is not None
    ]

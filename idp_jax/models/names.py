"""Hugging Face's names: one table per architecture, for all that names a matrix or a tensor.

The invariant: `weights` has every matrix of `models.matrices`, each with its module's name.
"""

from dataclasses import dataclass

from idp_jax.models.config import ModelConfig
from idp_jax.models.matrices import matrices


@dataclass(frozen=True)
class Names:
    """The tensor names of one architecture; `{}` in `layer` is the layer's number."""

    layer: str
    weights: dict[str, str]
    attention_norm: str
    mlp_norm: str
    embedding: str
    final_norm: str
    head: str = "lm_head"
    positions: str = ""
    project_in: str = ""
    project_out: str = ""

    def weight(self, layer: int, name: str) -> str:
        """The module that holds matrix `name` of a layer."""
        return self.layer.format(layer) + self.weights[name]


NAMES = {
    "llama": Names(
        layer="model.layers.{}.",
        weights={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.o_proj",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        },
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        embedding="model.embed_tokens",
        final_norm="model.norm",
    ),
    "opt": Names(
        layer="model.decoder.layers.{}.",
        weights={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.out_proj",
            "up": "fc1",
            "down": "fc2",
        },
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        positions="model.decoder.embed_positions",
        project_in="model.decoder.project_in",
        project_out="model.decoder.project_out",
    ),
}


def module_names(config: ModelConfig) -> dict[tuple[int, str], str]:
    """(layer, matrix) -> Hugging Face module name, layer by layer."""
    names = NAMES[config.architecture]
    return {
        (layer, matrix.name): names.weight(layer, matrix.name)
        for layer in range(config.num_layers)
        for matrix in matrices(config)
    }

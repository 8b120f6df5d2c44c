"""What compressed-tensors itself does with a model: pack it, and read a folder back.

The invariant: nothing of ours takes part. Written for releases 0.17 to 0.20, which differ in how
they pack 3 bits and in whether they know act-order.
"""

from pathlib import Path
from typing import Any

import numpy as np


def pack(model, folder: Path, *, act_order_seed: int | None = None, **settings: Any) -> Path:
    """Rounds every linear module of a transformers model but its head, and saves it packed.

    Args:
        act_order_seed: if given, inputs are assigned to groups at random (before release 0.18).
        settings: of `QuantizationArgs`: num_bits, group_size, strategy, symmetric.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    if act_order_seed is not None:
        settings["actorder"] = "group"
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            _set_grid(module, act_order_seed)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


def _set_grid(module, act_order_seed: int | None) -> None:
    """The smallest grid around the weights of each group."""
    import torch
    from compressed_tensors.quantization.utils import calculate_qparams

    args, weight = module.quantization_scheme.weights, module.weight.detach()
    inputs = weight.shape[1]
    groups = inputs // (args.group_size or inputs)
    index = torch.arange(inputs) // (inputs // groups)
    if act_order_seed is not None:
        index = index[
            torch.randperm(inputs, generator=torch.Generator().manual_seed(act_order_seed))
        ]
        module.weight_g_idx.data.copy_(index)
    grouped = weight[:, torch.argsort(index, stable=True)].reshape(len(weight), groups, -1)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    module.weight_scale.data.copy_(scale)
    module.weight_zero_point.data.copy_(zero)


def expanded(model) -> dict[str, np.ndarray]:
    """The matrices of a packed model as compressed-tensors expands them, which it does in place.

    Returns:
        float32 [out, in] by tensor name.
    """
    from compressed_tensors.compressors import decompress_module

    weights = {}
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None:
            decompress_module(module)
            weights[f"{name}.weight"] = module.weight.detach().float().numpy()
    return weights


class Loaded:
    """A packed folder as transformers and compressed-tensors read it, computing in float32.

    Args:
        dequantize: whether weights are expanded while they are loaded, or before the first product
            (which with transformers 5.23 and release 0.20 cannot load zero points).
    """

    def __init__(self, folder: Path, *, dequantize: bool = True):
        from transformers import AutoModelForCausalLM, CompressedTensorsConfig

        self.model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="float32",
            quantization_config=CompressedTensorsConfig(dequantize=dequantize),
        ).eval()

    def weights(self) -> dict[str, np.ndarray]:
        """The dequantised matrices of the layers, float32 [out, in] by tensor name."""
        return {
            name: parameter.detach().numpy()
            for name, parameter in self.model.named_parameters()
            if ".layers." in name and name.endswith("proj.weight")
        }

"""Updates written into the matrices that they stand beside.

The invariant: nothing that compression gave is lost without a word. A matrix on a grid keeps its
grid, so nothing is merged into it; a pruned one keeps its zeros, unless they are given up.
"""

import jax
import jax.numpy as jnp

from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import matrices
from idp_jax.models.names import module_names
from idp_jax.models.storage import restore
from idp_jax.recover.lora import LoraAdapter
from idp_jax.recover.norms import NormsAndBiases
from idp_jax.recover.replaced import with_parameters
from idp_jax.weights import Dense, Lora, Quantized

# Of a matrix' numbers: a trained one has no zeros to speak of, the mildest pruning takes more.
_PRUNED = 0.02


def merged(adapter, decoder: Decoder, *, lose_zeros: bool = False) -> Decoder:
    """The model that computes alone what it computes with the adapter beside it.

    Args:
        adapter: a LoRA, masked or not, or norms and biases.
        lose_zeros: whether a plain LoRA may be merged into pruned matrices, which fills their
            zeros.

    Raises:
        ValueError: an adapter that is no part of matrices, or a matrix that would lose its grid or,
            unasked, its zeros.
    """
    if not isinstance(adapter, LoraAdapter | NormsAndBiases):
        raise ValueError(
            f"a {type(adapter).__name__} stands before the input and is no part of the matrices, "
            "so it cannot be merged; keep it beside the model (idp-jax eval --adapter)"
        )
    decoder = restore(decoder)
    if isinstance(adapter, LoraAdapter):
        _check(adapter, decoder, lose_zeros)
    decoder = adapter.repair(decoder).decoder
    layers, written = decoder.layers, {}
    for name in layers.weight_names:
        weight = getattr(layers, name)
        if isinstance(weight, Lora):
            bias = None if weight.bias is None else weight.bias[...]
            written[name] = Dense(_dense(weight, str(decoder.embedding.dtype)), bias)
    return _with_all_biases(decoder.with_layers(layers.replace(**written)))


_dense = jax.jit(lambda weight, dtype: weight.dense(dtype), static_argnums=1)


def _check(adapter: LoraAdapter, decoder: Decoder, lose_zeros: bool) -> None:
    names = module_names(decoder.config)
    touched = {name: next(i for i, rank in enumerate(r) if rank) for name, r in adapter.ranks}
    for path in adapter.replaced:
        if path.startswith("layers.") and path.endswith(".kernel"):
            touched.setdefault(path.split(".")[1], 0)
    for name, layer in touched.items():
        weight, module = getattr(decoder.layers, name), names[layer, name]
        if isinstance(weight, Quantized):
            raise ValueError(
                f"{module} is quantised to {weight.bits} bits, and a merged update would leave its "
                "grid; keep the adapter beside the model (idp-jax eval --adapter), or merge into "
                "a dense copy (idp-jax convert --to dense), which is no longer quantised"
            )
        fills = name not in adapter.a or bool(jnp.any(adapter.b[name][...] != 0))
        if adapter.masked or lose_zeros or not fills:
            continue
        zeros = float(jnp.mean(weight.dense() == 0))
        if zeros > _PRUNED:
            raise ValueError(
                f"{module} is pruned (matrices like it hold {zeros:.0%} zeros), and this LoRA "
                "would fill its zeros; train with --lora.masked, or give them up with --dense"
            )


def _with_all_biases(decoder: Decoder) -> Decoder:
    """Zeros for the biases that a file must have beside those that the model has got.

    Configurations know biases of a whole attention or MLP, and of OPT's both at once.
    """
    groups = {0: "attention", 1: "attention"}
    together = decoder.config.architecture == "opt"
    kind = lambda matrix: together or groups.get(matrix.stage, "mlp")
    has = {m: getattr(decoder.layers, m.name).bias is not None for m in matrices(decoder.config)}
    kinds = {kind(matrix) for matrix, there in has.items() if there}
    shape = lambda matrix: (decoder.config.num_layers, matrix.outputs)
    missing = {
        f"layers.{matrix.name}.bias": jnp.zeros(shape(matrix), jnp.float32)
        for matrix, there in has.items()
        if not there and kind(matrix) in kinds
    }
    return with_parameters(decoder, missing)

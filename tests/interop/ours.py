"""Our side of the comparisons: models to exchange, and what must be the same when others load them.

The invariant: everything that is not packed is a float16 number, so that a library that loads
embeddings and norms in float16 loses nothing.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax import config, load_model, save_model
from idp_jax.compression.job import compress
from idp_jax.formats.convert import convert
from idp_jax.formats.quantization import Packing, write_config
from idp_jax.models import Decoder
from idp_jax.models.block import layer_slice
from idp_jax.models.names import module_names
from tests.helpers import quantize_decoder, tiny_decoder, tiny_ids, tiny_tokenizer, write_folder

# Both sides compute in float32 from the same numbers, in another order; logits reach 5.
TOLERANCE = 1e-4


def half_numbers(model: Decoder) -> Decoder:
    """The model with every floating-point value rounded to float16, in the dtype it had."""

    def half(leaf: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(jnp.float16).astype(leaf.dtype) if floating else leaf

    return jax.tree.map(half, model)


def tiny_source(folder: Path, **overrides) -> Path:
    """A random dense LLaMA folder with a tokenizer; `overrides` are fields of `ModelConfig`."""
    sizes = {"vocab_size": 259, "hidden_dim": 64, "ffw_dim": 128, **overrides}
    write_folder(half_numbers(tiny_decoder("llama", **sizes)), folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rounded(
    source: Path, out: Path, *, bits: int, group_size: int, symmetric: bool, form: str
) -> Path:
    """A folder that was rounded to nearest and converted here, by the library's own commands."""
    settings = config.Compress(
        model=str(source),
        out=out.with_name(f"{out.name}-compressed"),
        method="rtn",
        # A searched grid makes SmolLM2 with 3 bits a model whose logits torch's own float32 misses
        # by 1.3e-3, measured against float64.
        grid="minmax",
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
    )
    compress(settings)
    return convert(config.Convert(model=str(settings.out), out=out, to=form), progress=iter)


def random_codes(out: Path, *, bits: int, form: str, act_order: bool = False) -> Path:
    """A folder of random codes in groups of 32, in which every zero point occurs."""
    sizes = {"vocab_size": 259, "hidden_dim": 64, "ffw_dim": 64}
    like = tiny_source(out.with_name(f"{out.name}-dense"), **sizes)
    model = quantize_decoder(tiny_decoder("llama", **sizes), bits, act_order=act_order)
    packing = Packing(bits, 32, symmetric=False, act_order=act_order)
    names = module_names(model.config).values()
    settings = write_config(form, dict.fromkeys(names, packing))
    return save_model(half_numbers(model), out, like=like, quantization=settings)


def matrices(model: Decoder) -> dict[str, np.ndarray]:
    """The matrices of the layers, written out: float32 [out, in] by tensor name."""
    found = {}
    for (layer, name), module in module_names(model.config).items():
        weight = getattr(layer_slice(model.layers, layer), name)
        found[f"{module}.weight"] = np.asarray(weight.kernel[...].astype(jnp.float32)).T
    return found


def differing(ours: Decoder, theirs: dict[str, np.ndarray]) -> list[str]:
    """The matrices that are not equal bit for bit; all, if the names are not the same."""
    mine = matrices(ours)
    if mine.keys() != theirs.keys():
        return sorted(mine.keys() ^ theirs.keys())
    return [name for name in mine if not np.array_equal(mine[name], theirs[name])]


def ids_for(model: Decoder) -> np.ndarray:
    """Token ids [B, T] to compute logits of."""
    return np.asarray(tiny_ids(model, batch=2, time=24))


def torch_logits(model, ids: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] of a model that another library loaded."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long)).logits.numpy()


def check_same(folder: Path, theirs, tolerance: float = TOLERANCE) -> None:
    """Both sides read `folder` alike: its matrices, and the logits of dense and packed products.

    Args:
        theirs: a `Loaded` of the other side.
    """
    model = load_model(folder, weights="dense")
    wrong = differing(model, theirs.weights())
    assert not wrong, wrong
    ids = ids_for(model)
    expected = torch_logits(theirs.model, ids)
    for mine in (model, load_model(folder, weights="packed")):
        error = np.abs(np.asarray(mine(ids)) - expected).max()
        assert error <= tolerance, error

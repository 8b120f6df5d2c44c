"""Adapters on disk: `save_adapter` and `load_adapter`, whatever the kind."""

from collections.abc import Callable
from pathlib import Path

from idp_jax.formats.peft import PEFT_FORMS, read_peft, write_peft
from idp_jax.formats.pool import read_pool, write_pool
from idp_jax.jobs.folder import written_folder
from idp_jax.models.decoder import Decoder
from idp_jax.recover.methods import Adapter
from idp_jax.recover.pool import Pool
from idp_jax.recover.repaired import Repaired
from idp_jax.recover.selectors import Selector

# What writes an adapter's folder, by its class.
WRITERS: dict[type, Callable] = {
    Pool: write_pool,
    **{form.adapter: write_peft for form in PEFT_FORMS.values()},
}


def save_adapter(
    adapter: Adapter, out: str | Path, *, decoder: Decoder, base: str = "", overwrite: bool = False
) -> Path:
    """Writes an adapter folder.

    Args:
        decoder: the model it belongs to.
        base: that model's path or name, for `base_model_name_or_path`.

    Raises:
        ValueError: `out` exists, no file form is known for the adapter, or a pool's selector cannot
            be found again by a name.
    """
    if type(adapter) not in WRITERS:
        raise ValueError(
            f"no file form is known for a {type(adapter).__name__}; there are forms for "
            f"{', '.join(kind.__name__ for kind in WRITERS)}"
        )
    write = WRITERS[type(adapter)]
    with written_folder(Path(out), overwrite=overwrite, sources={"base": base}) as folder:
        write(adapter, folder, decoder, base)
    return Path(out)


def load_adapter(
    model: Decoder, folder: str | Path, selector: str | Selector | None = None
) -> Repaired:
    """Puts an adapter, in one of PEFT's forms or our own, beside a model.

    Args:
        selector: for a pool, another one than its folder names: a name, a function or a module. A
            name of a class with parameters takes those of the folder.

    Returns:
        A model that is called in the same way; `model` itself is unchanged.

    Raises:
        ValueError: no adapter there, one of another kind, or one that was made for another model.
    """
    return read_adapter(model, folder, selector).repair(model)


def read_adapter(
    decoder: Decoder, folder: str | Path, selector: str | Selector | None = None
) -> Adapter:
    """Reads an adapter folder for `decoder`; arguments and errors as of `load_adapter`."""
    folder = Path(folder)
    if (folder / "pool.json").is_file():
        return read_pool(decoder, folder, selector)
    if selector is not None:
        raise ValueError(f"{folder} is no pool of prompts, so no selector can be given with it")
    return read_peft(decoder, folder)

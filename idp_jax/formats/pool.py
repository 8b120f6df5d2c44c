"""A pool on disk: `pool.json` and one PEFT folder per prompt, each of which PEFT loads by itself.

A selector is found again by the name in `pool.json`, its parameters in `selector.safetensors`. A
pool that names a file or a package runs its code when it is loaded.
"""

import json
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.formats.peft import read_peft, write_peft
from idp_jax.formats.peft_files import other_model, read_json, read_tensors, short
from idp_jax.models.decoder import Decoder
from idp_jax.recover.pool import Pool
from idp_jax.recover.prefix import PrefixAdapter
from idp_jax.recover.prompt import SoftPrompt
from idp_jax.recover.selection import Selection, as_selection, find_selector
from idp_jax.recover.selectors import Selector

SELECTOR_FILE = "selector.safetensors"


def write_pool(pool: Pool, folder: Path, decoder: Decoder, base: str) -> None:
    """Writes a pool's folder.

    Raises:
        ValueError: the selector cannot be found again by a name.
    """
    from safetensors.numpy import save_file

    names = [f"prompt_{i}_{length}_tokens" for i, length in enumerate(pool.lengths)]
    settings = {
        "type": "IDP_POOL",
        "prompts": names,
        "lengths": pool.lengths,
        "selector": _name_of_selector(pool, decoder),
        "alignment": _alignment(decoder),
    }
    for name, prompt in zip(names, pool.prompts, strict=True):
        (folder / name).mkdir()
        write_peft(prompt, folder / name, decoder, base)
    parameters = _parameters(pool.selector)
    if parameters:
        tensors = {name: np.ascontiguousarray(value) for name, value in parameters.items()}
        save_file(tensors, folder / SELECTOR_FILE)
    (folder / "pool.json").write_text(json.dumps(settings, indent=2))


def read_pool(decoder: Decoder, folder: Path, given: str | Selector | None) -> Pool:
    """Reads a pool's folder.

    Args:
        given: a selector to take instead of the recorded one.

    Raises:
        ValueError: no pool, another model's, or its selector cannot be had.
    """
    settings = _settings(folder / "pool.json")
    alignment = settings.get("alignment") or "own"
    # Rotary models tell distances alone, so a prompt at 0 .. n - 1 and one that ends with the
    # longest are the same. Learned positions do not move: only prompts trained at 0 .. n - 1 fit.
    if alignment not in ("own", _alignment(decoder)):
        raise other_model(folder, f"prompts aligned {alignment!r}", repr(_alignment(decoder)))
    prompts = []
    for name in settings["prompts"]:
        prompt = read_peft(decoder, folder / name)
        if not isinstance(prompt, SoftPrompt | PrefixAdapter):
            raise ValueError(
                f"{folder / name} is no PROMPT_TUNING or PREFIX_TUNING adapter; a "
                "pool has no others"
            )
        prompts.append(prompt)
    selector = _read_selector(decoder, folder, settings["selector"], given, len(prompts))
    try:
        pool = Pool(prompts, selector)
    except ValueError as error:
        raise ValueError(f"{folder / 'pool.json'}: {error}") from error
    if settings.get("lengths") not in (None, pool.lengths):
        raise ValueError(
            f"{folder / 'pool.json'}: lengths {short(settings['lengths'])} are not those of the "
            f"prompts, {pool.lengths}; save the pool again"
        )
    return pool


# What each key of pool.json may hold; all but the first two may be missing.
_KEYS = {
    "prompts": (
        "a list of folders below this one",
        lambda x: isinstance(x, list) and x and all(map(_is_below, x)),
    ),
    "selector": ("a name", lambda x: isinstance(x, str) and x),
    "type": ("IDP_POOL", lambda x: x == "IDP_POOL"),
    "lengths": ("a list of numbers", lambda x: isinstance(x, list)),
    "alignment": ("a name", lambda x: isinstance(x, str)),
}


def _settings(file: Path) -> dict[str, Any]:
    """The keys of pool.json, of which none is unknown or of the wrong type."""
    settings = read_json(file)
    missing = [key for key in ("prompts", "selector") if not settings.get(key)]
    if missing:
        raise ValueError(f"{file} names no {missing[0]}; save the pool again")
    for key, value in settings.items():
        if value is None:
            continue
        if key not in _KEYS:
            raise ValueError(f"{file}: {key} is not known here; it may change the pool")
        wanted, valid = _KEYS[key]
        if not valid(value):
            raise ValueError(f"{file}: {key} = {short(value)} is not {wanted}")
    for name in settings["prompts"]:
        if not (file.parent / name).resolve().is_relative_to(file.parent.resolve()):
            raise ValueError(f"{file}: the prompt {name!r} lies outside {file.parent}")
    return settings


def _is_below(name) -> bool:
    """Whether a name can be that of a folder in another, links aside."""
    if not isinstance(name, str) or "\0" in name or len(name) > 255:
        return False
    path = PurePath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _alignment(decoder: Decoder) -> str:
    """How a model's prompts of several lengths stand.

    Returns:
        "right": all end where the input starts; "own": each at positions 0 .. n - 1.
    """
    return "right" if decoder.config.rope is not None else "own"


def _read_selector(
    decoder: Decoder, folder: Path, recorded: str, given: str | Selector | None, prompts: int
) -> Selection:
    """The given selector or the recorded one, with the folder's parameters where it has any."""
    if given is not None and not isinstance(given, str):
        return as_selection(given)
    try:
        found = _abstract(given or recorded, decoder, prompts)
    except ValueError as error:
        if given is not None:
            raise
        raise ValueError(
            f"{folder / 'pool.json'} names a selector that cannot be had: {error}; name another "
            "there, or give one by --selector"
        ) from error
    wanted = _parameters(found)
    if not wanted:
        return found
    file = folder / SELECTOR_FILE
    if not file.is_file():
        raise ValueError(
            f"selector {found.name} has parameters, and {folder} holds no {SELECTOR_FILE}; give "
            "the selector that the pool was trained with"
        )
    tensors = read_tensors(file)
    if _shapes(tensors) != _shapes(wanted):
        raise ValueError(
            f"{file} holds {_shapes(tensors)}, and selector {found.name} has {_shapes(wanted)}; "
            "give the selector that the pool was trained with"
        )
    leaves = [jnp.asarray(tensors[name], like.dtype) for name, like in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(found), leaves)


def _name_of_selector(pool: Pool, decoder: Decoder) -> str:
    """The name that a pool's selector is saved by, checked to give the same parameters again."""
    name, parameters = pool.selector.name, _parameters(pool.selector)
    if name is None:
        raise ValueError(
            f"the pool's selector {pool.selector.score!r} has no name to save; put it into a file "
            "and give it as file.py:name"
        )
    if parameters:
        again = _parameters(_abstract(name, decoder, len(pool.prompts)))
        if _shapes(again) != _shapes(parameters):
            raise ValueError(
                f"the pool's selector has parameters {_shapes(parameters)}, and one made by its "
                f"name {name} has {_shapes(again)}; make it by a name that carries its options, "
                "such as file.py:Router(width=64)"
            )
    return name


def _abstract(name: str, decoder: Decoder, prompts: int) -> Selection:
    """A selector by name, with shapes for parameters."""
    return jax.eval_shape(lambda: find_selector(name, (decoder, prompts, jax.random.key(0))))


def _parameters(selection: Selection) -> dict[str, Any]:
    """A selector's parameters by their path, in the order of the tree's leaves."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return {
        name(path).removeprefix("score.").removesuffix(".value"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(selection)[0]
    }


def _shapes(parameters: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameters[name].shape) for name in sorted(parameters)}

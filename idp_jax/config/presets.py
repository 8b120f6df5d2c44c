"""Published recipes as settings: small YAML files, each with the source that it was taken from.

`preset: NAME` in a tree of settings stands for what that file says; whatever the tree says itself
wins. The files lie in configs/presets of a checkout, and in the wheel beside the package's rooms.
"""

from pathlib import Path
from typing import Any, NamedTuple, get_args

from idp_jax.config.choices import Preset
from idp_jax.config.groups import ConfigError, one_of

PRESETS: tuple[str, ...] = get_args(Preset)


class Recipe(NamedTuple):
    """A preset.

    Attributes:
        name: as it is asked for.
        source: paper, repository, and the table or file of it; what differs here.
        settings: of `train`, nested as in a configuration file.
    """

    name: str
    source: str
    settings: dict[str, Any]


def read_preset(name: str) -> Recipe:
    """A preset by its name; raises ConfigError where there is none."""
    one_of("preset", name, PRESETS)
    import yaml

    place = _folder() / f"{name}.yaml"
    try:
        settings = yaml.safe_load(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--preset {name} cannot be read: {place}: {error.strerror}") from error
    return Recipe(name, settings.pop("source").strip(), settings)


def with_preset(tree: dict[str, Any]) -> dict[str, Any]:
    """Settings with those of their preset, where they name one, beneath; raises ConfigError."""
    tree = dict(tree)
    name = tree.pop("preset", None)
    return tree if name is None else beneath(read_preset(name).settings, tree)


def beneath(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` with what only `base` has, group by group."""
    both = {**base, **tree}
    for key in base.keys() & tree.keys():
        if isinstance(base[key], dict) and isinstance(tree[key], dict):
            both[key] = beneath(base[key], tree[key])
    return both


def _folder() -> Path:
    packaged = Path(__file__).resolve().parents[1] / "presets"
    return packaged if packaged.is_dir() else packaged.parents[1] / "configs" / "presets"

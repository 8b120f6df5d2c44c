"""Configurations as files: YAML and dictionaries to the dataclasses of `config`, and back.

An unknown key, a wrong type or a value out of range is an error of one line that names the file.
pydantic is imported only when there is something to check.
"""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from idp_jax.config.groups import ConfigError, refuse_url
from idp_jax.config.presets import with_preset

T = TypeVar("T")


def from_yaml(kind: type[T], path: str | Path) -> T:
    """Reads a configuration file.

    Args:
        kind: one of the commands' dataclasses.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has the wrong
            type or is out of range.
    """
    return from_dict(kind, read_yaml(path), str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """What a configuration file says; raises ConfigError where it is missing or not YAML."""
    import yaml

    refuse_url("--config_path", path)
    try:
        text = Path(path).read_text(encoding="utf-8")
        _refuse_twice(yaml.compose(text, yaml.SafeLoader), path)
        tree = yaml.safe_load(text) or {}
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"--config_path {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no settings; give lines such as `seed: 0`")
    return tree


def _refuse_twice(node: Any, path: str | Path) -> None:
    """Refuses a key that is there twice in one place, of which YAML would keep the last."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            _refuse_twice(entry, path)
    if isinstance(node, yaml.MappingNode):
        known = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in known:
                line = key.start_mark.line + 1
                raise ConfigError(f"{path}:{line}: {key.value!r} is there twice; keep one of them")
            known.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            _refuse_twice(value, path)


def from_dict(kind: type[T], tree: dict[str, Any], origin: str = "configuration") -> T:
    """Builds a configuration from nested dictionaries; raises as `from_yaml`."""
    return _checked(kind, _whole(kind, tree), origin)


def part_from_dict(kind: type, tree: dict[str, Any], origin: str) -> dict[str, Any]:
    """Some settings of a kind by name, each checked by itself; raises as `from_yaml`."""
    types = {entry.name: entry.type for entry in dataclasses.fields(kind)}
    tree = _whole(kind, tree)
    for key in tree:
        if key not in types:
            raise ConfigError(f"{origin}: unknown key {key!r}")
    return {key: _checked(types[key], value, origin, key) for key, value in tree.items()}


def _whole(kind: type, tree: dict[str, Any]) -> dict[str, Any]:
    """The settings, with those of their preset where the kind takes one."""
    return with_preset(tree) if getattr(kind, "has_presets", False) else tree


def _checked(kind: Any, value: Any, origin: str, key: str | None = None) -> Any:
    """`value` as `kind`; where it cannot be, one line with the place and what is wrong there."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ((key,) if key else ()) + first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            raise ConfigError(f"{origin}: unknown key {where!r}") from None
        if first["type"] == "literal_error":
            allowed = first.get("ctx", {})["expected"].replace("'", "").replace(" or ", ", ")
            option = where.replace("_", "-")
            raise ConfigError(
                f"{origin}: --{option} {first['input']!r} is not one of {allowed}"
            ) from None
        reason = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] == "value_error" else f" (got {first['input']!r})"
        raise ConfigError(f"{origin}: {where + ': ' if where else ''}{reason}{given}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain YAML and JSON types."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))

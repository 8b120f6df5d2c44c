"""Configurations as files: YAML and dictionaries to the dataclasses of `config`, and back.

An unknown key, a wrong type or a value out of range is an error of one line that names the file.
"""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from idp_jax.config.groups import Compression, ConfigError, Data, Lora, Mesh, Optimizer

T = TypeVar("T")


def from_yaml(kind: type[T], path: str | Path, **required: Any) -> T:
    """Reads a configuration file.

    Args:
        kind: one of the dataclasses above.
        required: values for fields that the file leaves out.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has the wrong
            type or is out of range.
    """
    import yaml

    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"--config_path {path} cannot be read: {error.strerror}") from error
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no settings; give lines such as `seed: 0`")
    return from_dict(kind, {**required, **tree}, str(path))


def from_dict(kind: type[T], tree: dict[str, Any], origin: str = "configuration") -> T:
    """Builds a configuration from nested dictionaries; raises as `from_yaml`."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    strict = ConfigDict(extra="forbid")
    for name in (Compression, Mesh, Optimizer, Lora, Data, kind):
        name.__pydantic_config__ = strict  # type: ignore[attr-defined]
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            raise ConfigError(f"{origin}: unknown key {where!r}") from None
        reason = first["msg"].removeprefix("Value error, ")
        value = "" if first["type"] == "value_error" else f" (got {first['input']!r})"
        raise ConfigError(f"{origin}: {where + ': ' if where else ''}{reason}{value}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain YAML and JSON types."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))

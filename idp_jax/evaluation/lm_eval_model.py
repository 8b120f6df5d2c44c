"""Our models in the harness's own command line: `--model idp_jax`.

    python -m idp_jax.evaluation --model idp_jax --tasks arc_easy \\
        --model_args pretrained=MODEL,adapter=ADAPTER,selector=random

is `lm_eval` with all of its options. Its 0.4.13 finds models in its own list alone, so whoever
calls it has to import this module, which registers the model, first. Versions that look for entry
points (`lm_eval.models`) find it by the package's, and `lm_eval --model idp_jax` will do.
"""

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from idp_jax.config import ConfigError, Loading
from idp_jax.config.files import from_dict
from idp_jax.evaluation.harness import HarnessLM
from idp_jax.formats import default_dtype, load_adapter, load_model, load_tokenizer
from idp_jax.recover import Repaired

# What the harness gives to every backend and has no meaning here: devices are JAX's.
_IGNORED = ("device", "max_batch_size", "trust_remote_code")
_OWN = ("batch_size", "max_length", "add_bos_token", "seed")
_HELD = ("dtype", "weights", "kernel")
_PLACES = ("pretrained", "adapter", "selector")


@register_model("idp_jax")
class IdpJaxLM(HarnessLM):
    """A model and its repair, as `--model_args` names them."""

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None):
        """As `create_from_arg_obj`, of `pretrained=...,adapter=...`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ):
        """Loads what is named.

        Args:
            arg_dict: `pretrained` (as `eval --model`); perhaps `adapter`, a folder, and `selector`
                of a pool, `dtype`, `weights`, `kernel`, `max_length`, `add_bos_token`, `seed`.
            additional_config: `batch_size`; "auto" is 8.

        Raises:
            ConfigError: an argument that is missing, unknown or of another kind.
            ValueError: the model or the adapter cannot be used.
        """
        given = {**arg_dict, **(additional_config or {})}
        given = {k: v for k, v in given.items() if v is not None and k not in _IGNORED}
        known = (*_PLACES, *_HELD, *_OWN)
        for name in given.keys() - set(known):
            raise ConfigError(f"no argument {name!r}; there are {', '.join(known)}")
        if "pretrained" not in given:
            raise ConfigError("pretrained=MODEL is missing: a hub name, folder or GGUF file")
        named = {name: given[name] for name in _HELD if name in given}
        loading = from_dict(Loading, {"model": str(given["pretrained"]), **named}, "--model_args")
        held = {**loading.held, "dtype": loading.dtype or default_dtype()}
        repaired, selector = Repaired.of(load_model(loading.model, **held)), given.get("selector")
        if "adapter" in given:
            repaired = load_adapter(repaired.decoder, str(given["adapter"]), selector)
        elif selector is not None:
            raise ConfigError(f"selector={selector} needs a pool: give its adapter")
        own = {name: given[name] for name in _OWN if name in given}
        own["batch_size"] = _batch_size(own.get("batch_size", "auto"))
        return cls(repaired, load_tokenizer(loading.model), **own)


def _batch_size(given: Any) -> int:
    """The harness gives its number as text, or `auto`; scores do not depend on it."""
    if str(given).startswith("auto"):
        return 8
    if not str(given).isdigit():
        raise ConfigError(f"batch_size={given} is no whole number; give one, or auto")
    return int(given)

"""Every key of `adapter_config.json`, and what becomes of it.

A key is read, neutral (it says how the adapter was trained, or by what), or refused by name. One
that is in no list may come from a later PEFT and change what the adapter computes: it is refused
too, unless it says nothing (None, False or empty). Source: LoraConfig, PromptTuningConfig,
PrefixTuningConfig and CartridgeConfig of PEFT 0.21 with their parents, and `BaseTuner` for what
they do at load.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from idp_jax.formats.peft_files import short

REQUIRED = object()


class Key(NamedTuple):
    """A key that is read.

    Attributes:
        wanted: what it may hold, in words.
        valid: whether a value is that.
        default: PEFT's value where the key is missing; REQUIRED where it must be there.
    """

    wanted: str
    valid: Callable[[Any], bool]
    default: Any = None


def _count(value) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _positive(value) -> bool:
    return _count(value) and value > 0


def _number(value) -> bool:
    # Larger ones are no numbers any more in float32, in which adapters compute.
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def _names(value) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _counts(value) -> bool:
    return isinstance(value, list) and all(_count(number) for number in value)


def _pattern(value, form: str = "{}") -> bool:
    try:
        return isinstance(value, str) and bool(value) and bool(re.compile(form.format(value)))
    except (re.error, RecursionError, OverflowError):
        return False


def _part(value) -> bool:
    """A regular expression that PEFT puts into a longer one."""
    return _pattern(value) and _pattern(value, "({})")


def _by_pattern(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict)
        and all(_part(key) and valid(number) for key, number in value.items())
    )


_FLAG = Key("true or false", lambda value: isinstance(value, bool), False)
_SIZE = Key("a whole number of at least 1", _positive)
_MODULES = Key("names, or one regular expression", lambda x: _names(x) or _pattern(x))
_TASK = Key("CAUSAL_LM", lambda value: value == "CAUSAL_LM")

# Those that leave the model's own matrices as they are; A and B are then overwritten by the file's.
# pissa, olora, corda, loftq and lora_ga put the rest of a decomposition into the model instead.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_START = Key(
    "true, false, gaussian, eva, orthogonal or mica: the others change the matrices of the model "
    "(PEFT makes a plain LoRA by save_pretrained(path_initial_model_for_weight_conversion=...))",
    lambda value: isinstance(value, bool | str) and value in _PLAIN_STARTS,
    True,
)

_PROMPTS = {
    "task_type": _TASK,
    "num_virtual_tokens": Key("a whole number", _count, REQUIRED),
    "token_dim": _SIZE,
    "num_layers": _SIZE,
    "num_attention_heads": _SIZE,
    "num_transformer_submodules": Key("1", lambda x: type(x) is int and x == 1, 1),
}

READ: dict[str, dict[str, Key]] = {
    "PROMPT_TUNING": _PROMPTS,
    "PREFIX_TUNING": _PROMPTS,
    "CARTRIDGE": {**_PROMPTS, "num_frozen_tokens": Key("a whole number", _count, 1)},
    "IDP_DEEP_PREFIX": {  # of our own
        **_PROMPTS,
        "num_frozen_tokens": Key("a whole number", _count, 0),
        "layer_lengths": Key("a length for each layer", lambda x: _counts(x) and x, REQUIRED),
    },
    "LORA": {
        "task_type": _TASK,
        "r": Key("a rank of at least 1", _positive, REQUIRED),
        "lora_alpha": Key("a finite number", _number, REQUIRED),
        "use_rslora": _FLAG,
        "rank_pattern": Key("ranks by pattern", _by_pattern(_positive), {}),
        "alpha_pattern": Key("numbers by pattern", _by_pattern(_number), {}),
        # What PEFT takes for LLaMA and OPT where nothing is said.
        "target_modules": _MODULES._replace(default=["q_proj", "v_proj"]),
        "exclude_modules": _MODULES._replace(default=[]),
        "layers_to_transform": Key("layer numbers", lambda x: _count(x) or _counts(x), []),
        "layers_pattern": Key(
            "names of a list of layers",
            lambda x: x in ("", []) or _part(x) or (_names(x) and all(map(_part, x))),
            [],
        ),
        "bias": Key("none, all or lora_only", lambda x: x in ("none", "all", "lora_only"), "none"),
        "lora_bias": _FLAG,
        "modules_to_save": Key("names", lambda x: _names(x) and all(map(_part, x)), []),
        "trainable_token_indices": Key(
            "token numbers, or those of one module",
            lambda x: (
                _counts(x)
                or (isinstance(x, dict) and len(x) == 1 and all(k and _counts(x[k]) for k in x))
            ),
            [],
        ),
        "ensure_weight_tying": _FLAG,
        "init_lora_weights": _START,
    },
}

READ["MASKED_LORA"] = READ["LORA"]
READ["LN_TUNING"] = {
    "task_type": _TASK,
    "target_modules": _MODULES._replace(default=REQUIRED),
    "exclude_modules": _MODULES._replace(default=[]),
}

_EVERYWHERE = {
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config"),
}
NEUTRAL: dict[str, set[str]] = {
    "PROMPT_TUNING": {
        *_EVERYWHERE,
        *("prompt_tuning_init", "prompt_tuning_init_text"),
        *("tokenizer_name_or_path", "tokenizer_kwargs"),
    },
    # The file holds what the projection gave, not the projection.
    "PREFIX_TUNING": {*_EVERYWHERE, "encoder_hidden_size", "prefix_projection", "init_weights"},
    "CARTRIDGE": _EVERYWHERE,
    "IDP_DEEP_PREFIX": _EVERYWHERE,
    "LORA": {
        *_EVERYWHERE,
        *("lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size"),
        # Settings of starts, which stand for nothing without the start itself.
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    },
}
NEUTRAL["MASKED_LORA"] = NEUTRAL["LORA"]
NEUTRAL["LN_TUNING"] = _EVERYWHERE

_MERGE = "merge it into its model with PEFT (merge_and_unload) and load that"
REFUSED: dict[str, str] = {
    "use_dora": f"it scales every column of the updated matrix; {_MERGE}",
    "use_qalora": f"it pools the inputs of every update; {_MERGE}",
    "target_parameters": f"it updates parameters inside modules; {_MERGE}",
    "layer_replication": f"it uses layers several times; {_MERGE}",
    "alora_invocation_tokens": "it works only behind these tokens, which no merged model can do",
    "arrow_config": "it chooses among several adapters for every token",
    "kasa_config": f"it takes singular values out of the model's matrices; {_MERGE}",
    "monteclora_config": "it adds random numbers to every update",
    "velora_config": "it replaces the products of every update",
    "use_bdlora": f"its updates are block-diagonal; {_MERGE}",
    "megatron_config": "it belongs to Megatron's layers",
    "modules_to_save": "only LoRA replaces modules here",
}


def checked(file: Path, tree: dict[str, Any], kind: str) -> dict[str, Any]:
    """The keys that are read, with PEFT's defaults.

    Raises:
        ValueError: a missing key, one of the wrong type, or one that is neither read nor neutral.
    """
    known = READ[kind]
    for key, value in tree.items():
        if key in known or key in NEUTRAL[kind] or _says_nothing(value):
            continue
        reason = REFUSED.get(key, "it is no key that is known here, and may change the adapter")
        raise ValueError(f"{file}: {key} = {short(value)} is not supported: {reason}")
    settings = {}
    for key, rule in known.items():
        # PEFT takes None for every default but an empty dict.
        missing = key not in tree or (tree[key] is None and rule.default != {})
        value = rule.default if missing else tree[key]
        if value is REQUIRED:
            raise ValueError(f"{file} lacks {key}; save the adapter again")
        if not missing and not rule.valid(value):
            raise ValueError(f"{file}: {key} = {short(value)} is not {rule.wanted}")
        settings[key] = value
    if kind in ("LORA", "MASKED_LORA"):
        _check_lora(file, settings)
    return settings


def _check_lora(file: Path, settings: dict[str, Any]) -> None:
    """Refuses keys that contradict each other, as PEFT does."""
    if isinstance(settings["target_modules"], str):
        for key in ("layers_to_transform", "layers_pattern"):
            if settings[key] not in ([], ""):
                raise ValueError(f"{file}: {key} cannot go with a pattern in target_modules")
    elif settings["layers_pattern"] and settings["layers_to_transform"] == []:
        raise ValueError(f"{file}: layers_pattern says nothing without layers_to_transform")
    if settings["lora_bias"] and settings["init_lora_weights"] not in (True, False):
        raise ValueError(
            f"{file}: lora_bias cannot go with init_lora_weights = "
            f"{settings['init_lora_weights']!r}"
        )


def _says_nothing(value) -> bool:
    return value is None or value is False or value in ("", [], {})


def updates(settings: dict[str, Any], module: str, linear: set[str]) -> bool:
    """Whether LoRA's settings put an update beside a module (PEFT's check_target_module_exists).

    Args:
        linear: the modules that "all-linear" stands for.
    """
    if module_matches(settings["exclude_modules"], module):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in settings["modules_to_save"]):
        return False
    targets = settings["target_modules"]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return module in linear
    if not module_matches(targets, module):
        return False
    layers = settings["layers_to_transform"]
    if isinstance(targets, str) or layers == [] or module in targets:
        return True
    patterns = settings["layers_pattern"]
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns
    number = r"\.(?P<layer>\d+)\."
    forms = [rf"(?:^|.*?\.){pattern}{number}" for pattern in patterns] or [rf".*?\.[^.]*{number}"]
    found = next((match for form in forms if (match := re.match(form, module))), None)
    wanted = [layers] if isinstance(layers, int) else layers
    return found is not None and int(found["layer"]) in wanted


def module_matches(modules: str | list[str], module: str) -> bool:
    """Whether names, or one regular expression, of the settings mean a module."""
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in modules)


def by_pattern(patterns: dict[str, Any], module: str, default):
    """The value of the first pattern that fits a module (PEFT's get_pattern_key)."""
    fitting = (x for key, x in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(fitting, default)

"""How a checkpoint says which of its matrices are packed, and how: `quantization_config`.

GPTQ and compressed-tensors describe the same thing in two languages; a `Layout` is what both mean:
module name -> `Packing`, or None for a matrix that is left dense. The invariant: `read_config` of
what `write_config` gave answers every module with the packing that was written.
Sources: GPTQModel's `QuantizeConfig` (`dynamic`: the first pattern that matches decides),
compressed-tensors' `QuantizationConfig` (`ignore` before targets; a module's own name before a
pattern, and a pattern before a class).
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from idp_jax.config.choices import Bits, Form, PackedForm

GPTQ_FORMS = ("gptq", "gptq_v2")
PLANAR = "gptq_p"  # read only
PACK_QUANTIZED = "pack-quantized"
PACKED_FORMS = get_args(PackedForm)
BITMASK, BITMASK_24 = SPARSE_FORMS = ("sparse-bitmask", "sparse-24-bitmask")
DENSE = "dense"
FORMS = get_args(Form)
BITS = get_args(Bits)
_METHODS = ("gptq", "compressed-tensors")
# Linear modules outside the layers, which are never packed here.
_OUTER = ("lm_head", "model.decoder.project_in", "model.decoder.project_out")


@dataclass(frozen=True)
class Packing:
    """How one matrix is packed.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale and a zero; -1 for all of them.
        symmetric: whether every zero is 2^(bits - 1).
        act_order: whether every input names its group (`g_idx`).
    """

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool = False


@dataclass(frozen=True)
class Layout:
    """What a checkpoint's configuration says of its matrices.

    Attributes:
        form: one of `FORMS`, or "gptq_p".
        rules: patterns over module names, each with its packing; the first that matches decides.
        zeros_by_word: whether GPTQ v1's one was taken from the zeros by a subtraction per word,
            which borrows from the next field where a zero is 0 (GPTQModel, 2, 4 and 8 bits).
    """

    form: str
    rules: tuple[tuple[re.Pattern[str], Packing | None], ...] = ()
    zeros_by_word: bool = False

    def packing(self, name: str) -> Packing | None:
        """How module `name` is packed, or None where it is dense."""
        return next((packing for rule, packing in self.rules if rule.match(name)), None)


def read_config(config: dict[str, Any] | None) -> Layout | None:
    """Reads `quantize_config.json`, or config.json's `quantization_config`.

    Raises:
        ValueError: a method, bit width or setting that is not supported.
    """
    if config is None:
        return None
    _typed(config, dict, "the quantization settings")
    method = config.get("quant_method") or config.get("method")
    if method is None:
        # AutoGPTQ's oldest files and compressed-tensors' first ones name no method.
        theirs = {"config_groups", "sparsity_config"} & config.keys()
        method = "compressed-tensors" if theirs else "gptq"
    if method not in _METHODS:
        raise ValueError(
            f"quant_method {method!r} is not supported; supported: {', '.join(_METHODS)}"
        )
    return _read_gptq(config) if method == "gptq" else _read_compressed_tensors(config)


def write_config(
    form: str, packings: dict[str, Packing | None], *, damping: float | None = None
) -> dict[str, Any] | None:
    """The `quantization_config` of a folder; GPTQ repeats it in `quantize_config.json`.

    Args:
        form: one of `FORMS`.
        packings: every matrix of the layers by its Hugging Face module name; None is left dense.
            The commonest packing becomes the default, the others are named one by one.
        damping: of the Hessian, for the record (GPTQ).

    Returns:
        None for the dense form, and where no matrix is packed.

    Raises:
        ValueError: another form.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} is not supported; supported: {', '.join(FORMS)}")
    if form in SPARSE_FORMS:
        return _sparse_config(form, packings)
    counts = Counter(packing for packing in packings.values() if packing is not None)
    if form == DENSE or not counts:
        return None
    default = counts.most_common(1)[0][0]
    if form == PACK_QUANTIZED:
        return _compressed_tensors_config(packings, default)
    return _gptq_config(form, packings, default, damping)


def _typed(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        words = {dict: "an object", list: "a list", str: "a text"}
        raise ValueError(f"{name} must be {words[kind]}, but is {value!r}; correct it")
    return value


def _group_size(value: Any) -> int:
    """Inputs that share a scale; -1, or nothing, for all of them."""
    if value is None:
        return -1
    if type(value) is not int or (value != -1 and value < 1):
        raise ValueError(f"group_size {value!r} is neither -1 nor a number from 1 on; correct it")
    return value


def _bits(value: Any, method: str) -> int:
    if type(value) is not int or value not in BITS:
        raise ValueError(
            f"{value}-bit {method} is not supported; supported: {', '.join(map(str, BITS))}"
        )
    return value


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(
            f"{text!r} in the quantization settings is no regular expression ({error}); correct it"
        ) from None


def _exactly(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name) + "$")


_ANY = re.compile("")


def _read_gptq(config: dict[str, Any]) -> Layout:
    form = config.get("checkpoint_format") or config.get("format") or "gptq"
    if form not in (*GPTQ_FORMS, PLANAR):
        known = ", ".join((*GPTQ_FORMS, PLANAR))
        raise ValueError(f"checkpoint_format {form!r} is not supported; supported: {known}")
    if config.get("is_marlin_format"):
        raise ValueError(
            "a GPTQ checkpoint in Marlin's own layout is not supported; fetch the "
            "same model without is_marlin_format"
        )
    if config.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"pack_dtype {config['pack_dtype']!r} is not supported; supported: int32")
    if config.get("format") not in (None, form):
        raise ValueError(
            f"checkpoint_format {form!r} and format {config['format']!r} contradict each other; "
            "correct the quantization settings"
        )
    rules = []
    for pattern, changes in _typed(config.get("dynamic") or {}, dict, "dynamic").items():
        rule = _pattern(pattern.removeprefix("+:").removeprefix("-:"))
        skipped = pattern.startswith("-:")
        changed = {**config, **_typed(changes or {}, dict, f"dynamic {pattern!r}")}
        rules.append((rule, None if skipped else _gptq_packing(changed)))
    quantizer = str(_typed(config.get("meta") or {}, dict, "meta").get("quantizer", ""))
    by_word = form == "gptq" and "gptqmodel" in quantizer
    return Layout(form, (*rules, (_ANY, _gptq_packing(config))), by_word)


def _gptq_packing(config: dict[str, Any]) -> Packing:
    if config.get("adapter"):
        raise ValueError(
            "a GPTQ checkpoint whose matrices have an adapter beside them (adapter) is not "
            "supported; fetch the same model without it"
        )
    return Packing(
        bits=_bits(config.get("bits"), "GPTQ"),
        group_size=_group_size(config.get("group_size", -1)),
        symmetric=bool(config.get("sym", True)),
        act_order=bool(config.get("desc_act", False)),
    )


def _gptq_config(
    form: str, packings: dict[str, Packing | None], default: Packing, damping: float | None
) -> dict[str, Any]:
    settings_of = lambda packing: {
        "bits": packing.bits,
        "group_size": packing.group_size,
        "sym": packing.symmetric,
        "desc_act": packing.act_order,
    }
    dynamic = {}
    for name, packing in packings.items():
        exactly = f"^{re.escape(name)}$"
        if packing is None:
            dynamic[f"-:{exactly}"] = {}
        elif packing != default:
            dynamic[f"+:{exactly}"] = settings_of(packing)
    return {
        "quant_method": "gptq",
        "checkpoint_format": form,
        **settings_of(default),
        **({"dynamic": dynamic} if dynamic else {}),
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": damping,
        "lm_head": False,
        "pack_dtype": "int32",
    }


def _read_compressed_tensors(config: dict[str, Any]) -> Layout | None:
    sparsity = _typed(config.get("sparsity_config") or {}, dict, "sparsity_config")
    sparse = sparsity.get("format", DENSE)
    groups = _typed(config.get("config_groups") or {}, dict, "config_groups")
    if sparse not in (*SPARSE_FORMS, DENSE):
        raise ValueError(
            f"sparsity format {sparse!r} is not supported; supported: {', '.join(SPARSE_FORMS)}"
        )
    if sparse != DENSE and groups:
        raise ValueError(
            f"a packed model in {sparse!r} is not supported; fetch one that is only "
            "packed, or only sparse"
        )
    if sparse != DENSE:
        return Layout(sparse)
    if not groups:
        return None
    if config.get("kv_cache_scheme"):
        raise ValueError("a quantised KV cache (kv_cache_scheme) is not supported")
    if config.get("transform_config"):
        raise ValueError(
            "a model whose activations are rotated as it runs (transform_config) is not supported; "
            "fetch one that is only packed"
        )
    rules: list[tuple[int, re.Pattern[str], Packing]] = []
    for name, group in groups.items():
        packing = _group_packing(name, group, config.get("format"))
        for target in _typed(group.get("targets") or [], list, f"targets of {name}"):
            rules.append((*_target(target), packing))
    ignored = [
        (_target(target)[1], None) for target in _typed(config.get("ignore") or [], list, "ignore")
    ]
    ordered = sorted(rules, key=lambda rule: rule[0])
    return Layout(PACK_QUANTIZED, (*ignored, *((rule, packing) for _, rule, packing in ordered)))


def _target(target: str) -> tuple[int, re.Pattern[str]]:
    """A target's rank (names before patterns before the class of all matrices) and its pattern."""
    _typed(target, str, "a target of the quantization settings")
    if target == "Linear":
        return 2, _ANY
    if target.startswith("re:"):
        return 1, _pattern(target.removeprefix("re:"))
    return 0, _exactly(target)


def _group_packing(name: str, group: Any, form: str | None) -> Packing:
    """One of `config_groups`; whatever changes the function and is not done here is refused."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not weights:
        raise ValueError(
            f"config_groups.{name} describes no packed weights, which is not supported"
        )
    form = group.get("format") or form
    if form != PACK_QUANTIZED:
        raise ValueError(
            f"format {form!r} of config_groups.{name} is not supported; supported: {PACK_QUANTIZED}"
        )
    if group.get("input_activations") or group.get("output_activations"):
        raise ValueError(f"config_groups.{name} quantises activations, which is not supported")
    _typed(weights, dict, f"the weights of config_groups.{name}")
    if weights.get("dynamic"):
        raise ValueError(
            f"config_groups.{name} packs weights as it runs (dynamic: true), which is not supported"
        )
    size, strategy = _group_size(weights.get("group_size")), weights.get("strategy")
    strategy = strategy or ("group" if size > 0 else "channel")
    if weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
        raise ValueError(
            f"config_groups.{name} packs {weights.get('type')!r} by {strategy!r}, which is not "
            "supported; supported: int by group or channel"
        )
    return Packing(
        bits=_bits(weights.get("num_bits"), PACK_QUANTIZED),
        group_size=size if strategy == "group" else -1,
        symmetric=bool(weights.get("symmetric", True)),
        act_order=weights.get("actorder") in ("group", "dynamic", True),
    )


def _compressed_tensors_config(
    packings: dict[str, Packing | None], default: Packing
) -> dict[str, Any]:
    targets: dict[Packing, list[str]] = {default: ["Linear"]}
    for name, packing in packings.items():
        if packing is not None and packing != default:
            targets.setdefault(packing, []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": PACK_QUANTIZED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": _ignored(packings),
        "config_groups": {
            f"group_{number}": {
                "targets": names,
                "weights": _weights_config(packing),
                "input_activations": None,
                "output_activations": None,
            }
            for number, (packing, names) in enumerate(targets.items())
        },
    }


def _weights_config(packing: Packing) -> dict[str, Any]:
    grouped = packing.group_size > 0
    return {
        "num_bits": packing.bits,
        "type": "int",
        "symmetric": packing.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": packing.group_size if grouped else None,
        "dynamic": False,
        # compressed-tensors from 2026 on reads no index of groups; older versions do.
        **({"actorder": "group"} if packing.act_order else {}),
    }


def _ignored(packings: dict[str, Packing | None]) -> list[str]:
    """The linear modules that the class "Linear" would wrongly take in."""
    return [*(name for name, packing in packings.items() if packing is None), *_outer(packings)]


def _outer(names: Iterable[str]) -> tuple[str, ...]:
    opt = any(name.startswith("model.decoder.") for name in names)
    return _OUTER if opt else _OUTER[:1]


def _sparse_config(form: str, names: Iterable[str]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "sparsity_config": {
            "format": form,
            "targets": ["Linear"],
            "ignore": list(_outer(names)),
            "global_sparsity": None,
            "sparsity_structure": "2:4" if form == BITMASK_24 else "unstructured",
        },
    }

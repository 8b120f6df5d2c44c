"""LoRA in PEFT's files.

Updates of the blocks' matrices stay low-rank beside the frozen weights, which may be compressed.
All else that a file may hold (biases, modules_to_save, rows of the embedding, updates of matrices
outside the blocks, which are dense) becomes whole parameters of the model. The invariant: every
tensor of the file is used, and every module that the settings name is in it.
"""

from pathlib import Path
from statistics import mode
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from idp_jax.formats.peft_files import other_model
from idp_jax.formats.peft_keys import by_pattern, updates
from idp_jax.formats.peft_places import Place, places_of
from idp_jax.models.config import ModelConfig
from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import matrices
from idp_jax.models.names import NAMES
from idp_jax.recover.lora import LoraAdapter
from idp_jax.recover.replaced import parameter

PREFIX = "base_model.model."
_LINEAR = ("lora_A.weight", "lora_B.weight")
_LOOKUP = ("lora_embedding_A", "lora_embedding_B")
_BIAS = "lora_B.bias"
_ROWS = "token_adapter.trainable_tokens_delta"


def lora_files(adapter: LoraAdapter, config: ModelConfig):
    """The settings and tensors of PEFT's two files.

    Raises:
        ValueError: there is no low-rank update, without which PEFT loads no LoRA.
    """
    if not adapter.a:
        raise ValueError(
            "this LoRA updates no matrix of the blocks, and PEFT loads none without such an update"
        )
    names = NAMES[config.architecture]
    ranks, alphas = dict(adapter.ranks), dict(adapter.alphas)
    tensors, updated = {}, {}
    for name in adapter.a:
        bias = adapter.bias[name][...] if name in adapter.bias else None
        a, b = np.asarray(adapter.a[name][...]), np.asarray(adapter.b[name][...])
        for layer, rank in enumerate(ranks[name]):
            if not rank:
                continue
            module = names.weight(layer, name)
            updated[module] = (rank, alphas[name][layer])
            tensors[f"{PREFIX}{module}.{_LINEAR[0]}"] = a[layer, :, :rank].T
            tensors[f"{PREFIX}{module}.{_LINEAR[1]}"] = b[layer, :rank].T
            if adapter.bias:
                nothing = np.zeros(b.shape[2], np.float32)
                value = nothing if bias is None else np.asarray(bias)[layer]
                tensors[f"{PREFIX}{module}.{_BIAS}"] = value
    rank, alpha = (mode(values) for values in zip(*updated.values(), strict=True))
    everywhere = all(all(of_layers) for of_layers in ranks.values())
    settings: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {m: r for m, (r, _) in updated.items() if r != rank},
        "alpha_pattern": {m: x for m, (_, x) in updated.items() if x != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": False,
        "target_modules": [names.weights[name].rpartition(".")[2] for name in adapter.a]
        if everywhere
        else list(updated),
    }
    if adapter.bias:
        settings["lora_bias"] = True
    for name, place in places_of(config).items():
        if place.path not in adapter.replaced:
            continue
        module, _, leaf = name.rpartition(".")
        value = np.asarray(adapter.replaced[place.path][...])
        value = value if place.layer is None else value[place.layer]
        inner = "base_layer." if module in updated else ""
        tensors[f"{PREFIX}{module}.{inner}{leaf}"] = value.T if place.turned else value
    if config.tied_embeddings and "head.kernel" in adapter.replaced:
        settings["modules_to_save"] = [names.head]  # else PEFT puts it into the embedding too
    return settings, tensors


def read_lora(
    decoder: Decoder, folder: Path, settings, tensors, kind: type[LoraAdapter] = LoraAdapter
) -> LoraAdapter:
    """Makes the adapter of what PEFT's two files hold.

    Args:
        kind: the class of the adapter.

    Raises:
        ValueError: the file and the settings contradict each other, or belong to another model.
    """
    places = places_of(decoder.config)
    found = _Found(folder, settings, places, decoder.config)
    found.sort(tensors)
    found.check()
    updates_of = {module: found.update(module) for module in sorted(found.updated)}
    low_rank, layout = _stacked(decoder.config, updates_of)
    outer = {
        found.modules[module].path: update.scale * (update.a @ update.b)
        for module, update in updates_of.items()
        if found.modules[module].layer is None
    }
    replaced = _replaced_in_layers(decoder, found) | _replaced_outside(decoder, found, outer)
    a, b, bias, replaced = (
        {name: jnp.asarray(value, jnp.float32) for name, value in part.items()}
        for part in (*low_rank, replaced)
    )
    return kind(a, b, layout["alphas"], ranks=layout["ranks"], bias=bias, replaced=replaced)


class _Update(NamedTuple):
    """One module's update: a [I, r], b [r, O], PEFT's lora_bias [O] or None, and its alpha."""

    a: np.ndarray
    b: np.ndarray
    bias: np.ndarray | None
    alpha: float

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.a.shape[1]

    @property
    def scale(self) -> float:
        """What the product of a and b is multiplied by."""
        return self.alpha / self.rank


class _Found:
    """The tensors of a file, by what they are.

    Attributes:
        modules: the model's modules, with the place of their weight.
        updated: those that the settings put an update beside.
        saved: the parameters of those that the settings replace (modules_to_save).
        rows: the modules some of whose rows the file has, with the numbers of these rows.
        plain: whole parameters of the file.
        parts: the rest of a module's tensors, by module and name.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], places, config: ModelConfig):
        names = NAMES[config.architecture]
        self.folder, self.settings, self.places = folder, settings, places
        self.modules: dict[str, Place] = {}
        for name, place in places.items():
            self.modules.setdefault(name.rpartition(".")[0], place)
        linear = {m for m, p in self.modules.items() if p.turned and m != names.head}
        self.updated = {m for m in self.modules if updates(settings, m, linear)}
        tied = {names.embedding, names.head}
        if settings["ensure_weight_tying"] and config.tied_embeddings and tied & self.updated:
            self.updated |= tied
        self.saved = {name for name in places if self._is_saved(name)}
        rows = settings["trainable_token_indices"]
        rows = rows if isinstance(rows, dict) else ({names.embedding: rows} if rows else {})
        self.rows = {
            module: numbers
            for name, numbers in rows.items()
            for module in (names.embedding, names.head)
            if module.endswith(name)
        }
        if len(self.rows) != len(rows):
            raise ValueError(
                f"{folder / 'adapter_config.json'}: trainable_token_indices names "
                f"{next(iter(rows))}, which is no embedding or head"
            )
        self.plain: dict[str, np.ndarray] = {}
        self.parts: dict[str, dict[str, np.ndarray]] = {}

    def _is_saved(self, parameter_name: str) -> bool:
        """Whether a module around the parameter ends with a name of modules_to_save, as in PEFT."""
        words = parameter_name.split(".")[:-1]
        around = [".".join(words[: end + 1]) for end in range(len(words))]
        return any(m.endswith(name) for m in around for name in self.settings["modules_to_save"])

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"{self.folder}: {what}")

    def sort(self, tensors: dict[str, np.ndarray]) -> None:
        """Puts every tensor where it belongs."""
        for full, value in tensors.items():
            name = full.removeprefix(PREFIX)
            words = name.split(".")
            heads = (".".join(words[:end]) for end in range(len(words) - 1, 0, -1))
            module = next((m for m in heads if m in self.modules), None)
            if name == full:
                raise self._wrong(f"the tensor {full} is not called as PEFT calls any")
            if module is None:
                raise other_model(self.folder, f"the tensor {full}", "no such module")
            suffix = name[len(module) + 1 :]
            # PEFT puts the module that it updates one level deeper.
            inner = "base_layer." if module in self.updated else ""
            leaf = f"{module}.{suffix.removeprefix(inner)}"
            if suffix.startswith(inner) and leaf in self.places:
                if value.shape != self.places[leaf].shape:
                    wanted = str(self.places[leaf].shape)
                    raise other_model(self.folder, f"{full} of {value.shape}", wanted)
                self.plain[leaf] = value
            elif suffix in (*_LINEAR, *_LOOKUP, _BIAS, _ROWS):
                self.parts.setdefault(module, {})[suffix] = value
            else:
                raise self._wrong(f"the tensor {full} is not known here")

    def check(self) -> None:
        """Compares the modules that the settings name with those of the file."""
        if not self.updated:
            raise self._wrong(
                f"target_modules {self.settings['target_modules']!r} names no module of this model"
            )
        there = {module for module, parts in self.parts.items() if set(parts) - {_ROWS}}
        layers = lambda modules: {self.modules[m].layer for m in modules} - {None}
        if not there:
            raise self._wrong("the file holds no update; save the adapter again")
        if there < self.updated and layers(there) < layers(self.updated):
            wanted = f"{len(layers(self.updated))} layers"
            raise other_model(self.folder, f"updates in {len(layers(there))} layers", wanted)
        for module in sorted(there - self.updated):
            raise self._wrong(
                f"the file updates {module}, which target_modules and its companions leave out"
            )
        for module in sorted(self.updated - there):
            raise self._wrong(f"the settings update {module}, of which the file holds nothing")
        for name in sorted(self.saved - set(self.plain)):
            raise self._wrong(f"modules_to_save replaces {name}, which the file lacks")
        with_rows = {module for module, parts in self.parts.items() if _ROWS in parts}
        for module in sorted(with_rows ^ set(self.rows)):
            raise self._wrong(
                f"trainable_token_indices and the tensor {module}.{_ROWS} do not go together"
            )

    def update(self, module: str) -> _Update:
        """The update of one module, compared with the settings and the model."""
        parts, settings, place = self.parts[module], self.settings, self.modules[module]
        names = _LOOKUP if place.path == "embedding" else _LINEAR
        if place.path != "embedding" and not place.turned:
            raise self._wrong(f"an update of {module} is not supported")
        bias = [_BIAS] if settings["lora_bias"] else []
        for name in (*names, *bias):
            if name not in parts:
                raise self._wrong(f"the file lacks {module}.{name}; save the adapter again")
        for name in set(parts) - {*names, *bias, _ROWS}:
            raise self._wrong(f"{module}.{name} contradicts the settings; save the adapter again")
        if bias and place.layer is None:
            raise self._wrong(f"lora_bias of {module}, outside the blocks, is not supported")
        a, b = parts[names[0]], parts[names[1]]
        rank = by_pattern(settings["rank_pattern"], module, settings["r"])
        alpha = by_pattern(settings["alpha_pattern"], module, settings["lora_alpha"])
        if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
            raise self._wrong(
                f"{module}.{names[0]} of {a.shape} and {names[1]} of {b.shape} do not have the "
                f"rank {rank} that r or rank_pattern says"
            )
        # The embedding is a matrix of [V, E] that reads one-hot rows, so its inputs are V.
        outputs, inputs = place.shape if place.turned else place.shape[::-1]
        if (a.shape[1], b.shape[0]) != (inputs, outputs):
            wanted = str((inputs, outputs))
            raise other_model(self.folder, f"{module} of {(a.shape[1], b.shape[0])}", wanted)
        if bias and parts[_BIAS].shape != (outputs,):
            raise other_model(
                self.folder, f"{module}.{_BIAS} of {parts[_BIAS].shape}", f"{outputs}"
            )
        alpha = alpha * (rank**0.5 if settings["use_rslora"] else 1.0)
        return _Update(a.T, b.T, parts.get(_BIAS), alpha)

    def with_rows(self, module: str, value: np.ndarray) -> np.ndarray:
        """A parameter [V, E] with the rows that the file has for it."""
        numbers, new = self.rows[module], self.parts[module][_ROWS]
        if len(set(numbers)) != len(numbers) or new.shape != (len(numbers), value.shape[1]):
            raise self._wrong(
                f"{module}.{_ROWS} of {new.shape} does not fit {len(numbers)} different tokens of "
                "trainable_token_indices"
            )
        if numbers and max(numbers) >= len(value):
            raise other_model(self.folder, f"token {max(numbers)}", f"less than {len(value)}")
        value = np.array(value)
        value[numbers] = new
        return value


def _stacked(config: ModelConfig, found: dict[str, _Update]):
    """The updates of the blocks' matrices as (a, b, bias) by matrix, and their ranks and alphas.

    a and b are filled up with zeros to the largest rank of the matrix, as `LoraAdapter` has them.
    """
    names, layers = NAMES[config.architecture], range(config.num_layers)
    a, b, bias, ranks, alphas = {}, {}, {}, {}, {}
    for matrix in matrices(config):
        inside = {n: found[m] for n in layers if (m := names.weight(n, matrix.name)) in found}
        if not inside:
            continue
        name, rank = matrix.name, max(update.rank for update in inside.values())
        a[name] = np.zeros((config.num_layers, matrix.inputs, rank), np.float32)
        b[name] = np.zeros((config.num_layers, rank, matrix.outputs), np.float32)
        ranks[name] = [inside[n].rank if n in inside else 0 for n in layers]
        usual = mode(update.alpha for update in inside.values())
        alphas[name] = [inside[n].alpha if n in inside else usual for n in layers]
        for layer, update in inside.items():
            a[name][layer, :, : update.rank] = update.a
            b[name][layer, : update.rank] = update.b
            if update.bias is not None:
                bias.setdefault(name, np.zeros((config.num_layers, matrix.outputs), np.float32))
                bias[name][layer] = update.bias
    return (a, b, bias), {"ranks": ranks, "alphas": alphas}


def _replaced_in_layers(decoder: Decoder, found: _Found) -> dict[str, np.ndarray]:
    """The stacked parameters of the layers that the file replaces in one layer or more."""
    stacked = {}
    for name, value in found.plain.items():
        path, layer, _ = place = found.places[name]
        if layer is None:
            continue
        if path not in stacked:
            stacked[path] = np.array(parameter(decoder, path))
        stacked[path][layer] = value.T if place.turned else value
    return stacked


def _replaced_outside(decoder: Decoder, found: _Found, deltas) -> dict[str, np.ndarray]:
    """The parameters outside the layers that are others with the adapter.

    In a tied model a parameter of the file goes into the embedding and the head at once, and so do
    rows of the embedding; modules_to_save and updates belong to one of them.

    Args:
        deltas: updates, multiplied out to [I, O], by path.
    """
    tied, both = decoder.config.tied_embeddings, ("embedding", "head.kernel")
    turned = lambda path, value: value.T if path.endswith(".kernel") else value
    values, apart = {}, False  # as in the file: [O, I]

    def current(path: str) -> np.ndarray:
        value = values.get(path)
        return turned(path, np.asarray(parameter(decoder, path))) if value is None else value

    for name, value in sorted(found.plain.items(), key=lambda item: item[0] in found.saved):
        path, layer, _ = found.places[name]
        if layer is None:
            if name not in found.saved and not np.array_equal(values.get(path, value), value):
                raise ValueError(f"{found.folder}: the file has two embeddings for a tied model")
            alone = not tied or path not in both or name in found.saved
            apart |= name in found.saved and path in both
            values |= dict.fromkeys([path] if alone else both, value)
    for module in found.rows:
        path = found.modules[module].path
        for one in both if tied else (path,):
            values[one] = found.with_rows(module, current(one))
    for path, delta in deltas.items():
        values[path] = current(path) + turned(path, delta)
        apart |= path in both
    if tied and not apart:
        values.pop("head.kernel", None)
    elif tied and "embedding" in values:
        values.setdefault("head.kernel", current("head.kernel"))
    return {path: turned(path, value) for path, value in values.items()}

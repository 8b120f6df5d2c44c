"""Damaged settings files: a refusal of one line, or the numbers that are right.

config.json, the index of the shards and generation_config.json of a tiny model are mutated one
place at a time. Every try must end in a one-line ValueError, in the logits of the model as it was,
or in those that transformers computes from the mutated folder.
"""

import json
import random
import shutil
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from idp_jax import load_model
from tests.helpers import FUZZ_TRIES, close, tiny_decoder, write_folder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_logs")]

FILES = ("config.json", "model.safetensors.index.json", "generation_config.json")
IDS = np.random.default_rng(0).integers(3, 128, (2, 7)).astype(np.int32)
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**40), 10**30),
    *(0.0, -0.5, 1e-30, 1e300, float("nan"), float("inf"), 64.0),
    *("", "x", "64", "../model.safetensors", "/etc/hostname", "\ud800", "a\0b", "true"),
    *([], [1], [[2]], {}, {"a": 1}, {"type": "yarn"}, ["x", None]),
)


def whole_model(folder, architecture):
    """A folder of two shards with an index, as `save_pretrained` writes a larger model."""
    write_folder(tiny_decoder(architecture), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    for number in range(2):
        part = dict(list(sorted(tensors.items()))[number::2])
        name = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / FILES[1]).write_text(json.dumps(index))
    (folder / FILES[2]).write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 5]}))
    return folder


def places_of(value, path=()):
    """The path of every entry of a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        yield (*path, key)
        if isinstance(entry, dict | list):
            yield from places_of(entry, (*path, key))


def mutated_json(text, rng):
    content = json.loads(text)
    *parents, last = rng.choice(list(places_of(content)))
    holder = content
    for key in parents:
        holder = holder[key]
    value, kind = holder[last], rng.choice(("value", "value", "scale", "delete", "rename", "nest"))
    if kind == "scale" and isinstance(value, int | float):
        holder[last] = value * rng.choice((2, -1, 0.5, 1000)) + rng.choice((0, 1))
    elif kind == "delete":
        del holder[last]
    elif kind == "rename" and isinstance(holder, dict):
        holder[rng.choice((str(last).upper(), f"{last}_", "hidden_size", ""))] = holder.pop(last)
    elif kind == "nest":
        holder[last] = rng.choice(([value], {"value": value}, [[value]]))
    else:
        holder[last] = rng.choice(VALUES)
    return json.dumps(content).encode()


def mutated_bytes(text, rng):
    data = bytearray(text.encode())
    place = rng.randrange(len(data))
    kind = rng.choice(("cut", "byte", "deep", "bom", "latin"))
    if kind == "cut":
        return bytes(data[:place])
    if kind == "byte":
        data[place] = rng.randrange(256)
    if kind == "deep":
        data[place:place] = b'{"a":' * 100_000
    if kind == "bom":
        data[:0] = b"\xef\xbb\xbf"
    if kind == "latin":
        data[place:place] = "\xe9".encode("latin-1")
    return bytes(data)


def transformers_logits(folder):
    """Those of transformers' own reading, or None where it cannot read the folder either."""
    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            with torch.no_grad():
                return model(torch.tensor(IDS, dtype=torch.long)).logits.numpy()
        except Exception:
            return None


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_damaged_file_never_gives_other_numbers(tmp_path, architecture):
    pytest.importorskip("torch")
    whole = whole_model(tmp_path / "whole", architecture)
    right, rng = np.asarray(load_model(whole)(IDS)), random.Random(architecture)
    assert close(right, transformers_logits(whole), 1e-4)
    refused = 0
    for number in range(FUZZ_TRIES // 2):
        name = rng.choice(FILES)
        change = rng.choice((mutated_json, mutated_json, mutated_json, mutated_bytes))
        folder = shutil.copytree(whole, tmp_path / "mutated", dirs_exist_ok=True)
        data = change((whole / name).read_text(), rng)
        (folder / name).write_bytes(data)
        try:
            found = np.asarray(load_model(folder)(IDS))
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, (number, data[-500:])
            refused += 1
            continue
        except BaseException as error:
            raise AssertionError(f"try {number}, {name}: {data[-1500:]!r}") from error
        if not close(found, right):
            theirs = transformers_logits(folder)
            assert theirs is not None and close(found, theirs, 1e-4), (number, name, data[-1500:])
    assert refused > FUZZ_TRIES // 20

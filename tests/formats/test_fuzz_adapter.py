"""Settings with something wrong in them are refused in one line, or mean what PEFT takes them for.

Every try changes one of the two JSON files at random: a key gets another type, sign, size or word,
is taken out or added, or the file is cut short.
"""

import dataclasses
import json
import random
import shutil

import numpy as np
import pytest

from idp_jax import load_adapter, load_model
from idp_jax.formats import save_adapter
from tests.formats.test_peft import deprecated, random_adapter
from tests.formats.test_peft_lora import IDS, peft_logits, write_lora
from tests.helpers import FUZZ_TRIES, hf_config, tiny_decoder, write_folder

pytestmark = [deprecated, pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

LORAS = {
    "plain": {},
    "patterns": {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
        "use_rslora": True,
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "bias": {"lora_bias": True, "target_modules": ["k_proj", "up_proj"]},
    "modules": {"modules_to_save": ["lm_head", "norm"], "trainable_token_indices": [5, 9]},
    "outside": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
}
VALUES = [
    *(
        None,
        True,
        False,
        0,
        1,
        2,
        3,
        4,
        8,
        -1,
        -7,
        10**6,
        2**63,
        10**400,
        0.0,
        0.5,
        2.0,
        -3.5,
        1e300,
    ),
    *(float("nan"), float("inf"), "", "x", "none", "all", "lora_only", "all-linear", "q_proj", "["),
    *(
        ".*",
        r".*layers\.1\..*",
        "(?i)Q_PROJ",
        "CAUSAL_LM",
        "LORA",
        "gaussian",
        "pissa",
        "\0",
        "é" * 300,
    ),
    *(
        [],
        [0],
        [1],
        [0, 1],
        [5, 9],
        [True],
        ["q_proj"],
        ["layers"],
        ["lm_head"],
        [None],
        [[]],
        ["../x"],
    ),
    *({}, {"q_proj": 2}, {"v_proj": 0}, {"lm_head": [5, 9]}, {"": 1}, {"a": {"b": []}}, {"[": 1}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The base, and a folder for every adapter that is damaged."""
    pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("fuzz")
    model = tiny_decoder("llama", attention_bias=True)
    base = write_folder(model, root / "base")
    hf_config(model.config).save_pretrained(base)
    made = {name: write_lora(base, root / name, **how) for name, how in LORAS.items()}
    for kind in ("prompt", "prefix", "pool"):
        made[kind] = save_adapter(random_adapter(kind, model), root / kind, decoder=model)
    return base, made


def damaged(rng: random.Random, text: str, keys: list[str]) -> str:
    """The text of a JSON file with one thing wrong, or two."""
    if rng.random() < 0.1:
        return text[: rng.randrange(len(text))]
    tree = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2))):
        key = rng.choice(keys)
        if rng.random() < 0.15:
            tree.pop(key, None)
        else:
            tree[key] = rng.choice(VALUES)
    return json.dumps(tree)


def test_damaged_settings_are_refused_or_mean_what_they_say(folders, tmp_path):
    import peft

    base, made = folders
    rng, model = random.Random(0), load_model(base)
    fields = [f.name for f in dataclasses.fields(peft.LoraConfig)] + ["a_new_key"]
    plain = {name: np.asarray(load_adapter(model, folder)(IDS)) for name, folder in made.items()}
    outcomes = {"refused": 0, "unchanged": 0, "as PEFT": 0}
    for number in range(FUZZ_TRIES):
        name = rng.choice([*made, *LORAS])
        folder = shutil.copytree(made[name], tmp_path / str(number))
        file = folder / ("pool.json" if name == "pool" else "adapter_config.json")
        own = list(json.loads(file.read_text()))
        text = damaged(rng, file.read_text(), own if rng.random() < 0.8 else [*own, *fields])
        file.write_text(text)
        try:
            found = np.asarray(load_adapter(model, folder)(IDS))
        except ValueError as error:
            assert str(error) and "\n" not in str(error), text
            outcomes["refused"] += 1
            continue
        tolerance = {"rtol": 1e-3, "atol": 1e-3}
        if np.allclose(found, plain[name], **tolerance):
            outcomes["unchanged"] += 1
            continue
        assert name != "pool" and np.allclose(found, peft_logits(base, folder), **tolerance), text
        outcomes["as PEFT"] += 1
    assert min(outcomes.values()) > 0, outcomes

"""Every method has one entry, and every adapter of a method a form on disk."""

from pathlib import Path
from typing import get_args

import jax
import pytest

from idp_jax.config import Train
from idp_jax.config.choices import LEARNING_RATES, Repair
from idp_jax.formats.adapters import WRITERS
from idp_jax.recover.methods import METHODS, parameter_count
from idp_jax.recover.starts import Start
from tests.helpers import tiny_decoder


def test_methods_are_those_of_the_settings():
    assert METHODS.keys() == LEARNING_RATES.keys() == set(get_args(Repair))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_what_can_be_saved(name):
    model = tiny_decoder("llama", num_layers=1)
    settings = Train(model="m", out=Path("o"), method=name, prompt_length=3, pool_lengths=(2, 4))
    method = METHODS[name]
    key = jax.random.key(0)
    runs = method.runs(settings)
    assert len({run.folder for run in runs}) == len(runs) and all(run.label for run in runs)
    adapter = method.combine(
        settings, [run.init(model, Start(key)) for run in runs], model, lambda count: None
    )
    assert type(adapter) in WRITERS and parameter_count(adapter) > 0
    assert adapter.repair(model)([[5, 6]]).shape == (1, 2, 128)

"""The lists of choices: those that must be stated a second time say the same."""

import subprocess
import sys
from typing import get_args

import pytest

from idp_jax.cli import main
from idp_jax.config import choices
from idp_jax.formats import quantization


def test_code_on_arrays_alone_knows_the_same():
    from idp_jax.compression.cores.grid import GRID_BITS
    from idp_jax.compression.cores.order import ACT_ORDERS
    from idp_jax.kernels.dispatch import BACKENDS

    assert set(ACT_ORDERS) == set(get_args(choices.ActOrder))
    assert set(GRID_BITS) == set(get_args(choices.Bits))
    # "reference" is for tests.
    assert {"auto", *BACKENDS} - {"reference"} == set(get_args(choices.Kernel))


def test_forms_are_those_that_files_know():
    named = (*quantization.GPTQ_FORMS, quantization.PACK_QUANTIZED)
    assert set(named) == set(get_args(choices.PackedForm))
    plain = (*quantization.SPARSE_FORMS, quantization.DENSE)
    assert set(plain) == set(get_args(choices.PrunedForm))


def test_choices_import_nothing_heavy():
    lines = "import sys; import idp_jax.config; assert not {'jax', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", lines], check=True)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("compress", "--method {gptq,rtn,sparsegpt,wanda,magnitude}"),
        ("compress", "--bits {2,3,4,8}"),
        ("train", "--method {prompt,prefix,lora,norms,idp}"),
        ("eval", "--kernel {auto,pallas_tpu,mosaic_gpu,xla}"),
        ("convert", "--to {gptq,gptq_v2,pack-quantized,dense,sparse-bitmask,"),
    ],
)
def test_help_shows_the_choices(command, shown, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert shown in capsys.readouterr().out

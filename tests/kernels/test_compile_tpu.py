"""TPU kernels through the real TPU compiler, a few shapes of each.

Needs libtpu, not a TPU; kernels/bench/compile_tpu.py compiles them all.
"""

import importlib.util

import pytest

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed (pip install libtpu)", allow_module_level=True)

from idp_jax.kernels.bench.compile_tpu import BOUND, Case, bytes_of_a_walk, compile_case

_CASES = [
    Case("quant", 3, 128, 4096, 11008, 1),
    Case("quant", 4, 32, 11008, 4096, 16),
    Case("quant", 2, -1, 4096, 4096, 64),
    Case("quant", 8, 64, 8192, 1024, 512),
    Case("quant", 3, 128, 11008, 4096, 512, gradient=True),
    Case("quant", 4, 128, 4096, 4096, 8, dtype="float32"),
    Case("quant", 3, 128, 4096, 11008, 512, dtype="float32"),
    Case("quant", 4, 256, 4096, 4096, 512),
    Case("sparse24", None, -1, 4096, 4096, 1),
    Case("sparse24", 4, 128, 4096, 4096, 512, gradient=True),
]


@pytest.mark.parametrize("case", _CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("kind", ["v4", "v5e", "v5p", "v6e"])
def test_compiles_and_reads_packed_bytes(case, kind):
    result = compile_case(case, kind)
    assert result.bytes_ratio <= BOUND
    assert 0 < result.vmem < 16 * 2**20


@pytest.mark.parametrize("operation, bits", [("quant", 3), ("sparse24", None)])
def test_a_walk_over_layers_copies_no_weight(operation, bits):
    case = Case(operation, bits, 128 if bits else -1, 4096, 4096, 1)
    assert bytes_of_a_walk(case, "v5e") <= BOUND

"""The sizes that tuning writes are those that the kernels look up."""

import sys

import jax
import pytest

from idp_jax.kernels import gpu_blocks, tuned
from idp_jax.kernels.bench import tune
from idp_jax.kernels.quant_matmul import sizes
from idp_jax.kernels.sparse24_matmul import sizes as sparse_sizes

_SHAPE = (512, 128)


@pytest.mark.parametrize(
    "backend, kernel, bits, rows",
    [
        ("pallas_tpu", "quant", 3, 1),
        ("pallas_tpu", "quant", 3, 512),
        ("pallas_tpu", "sparse24", None, 8),
        ("pallas_tpu", "sparse24", 4, 8),
        ("mosaic_gpu", "quant", 3, 8),
        ("mosaic_gpu", "sparse24", None, 8),
        ("mosaic_gpu", "sparse24", 4, 8),
    ],
)
def test_kernels_find_what_was_measured(backend, kernel, bits, rows, monkeypatch):
    table = {}
    monkeypatch.setattr(tuned, "table", lambda: table)
    # Each candidate is faster than the one before.
    seconds = iter(range(1000, 0, -1))
    monkeypatch.setattr(tune, "seconds_per_call", lambda *_: next(seconds))
    best = tune.best_sizes(backend, kernel, bits, _SHAPE, rows)
    kind = jax.devices()[0].device_kind
    if backend == "mosaic_gpu":
        taken, tile = (bits, 256) if kernel == "quant" else (9, 256) if bits is None else (3.0, 512)
        found = gpu_blocks.sizes(kind, taken, *_SHAPE, rows, tile)
    elif kernel == "sparse24":
        found = sparse_sizes.blocks(kind, bits, *_SHAPE, rows, 2)
    elif rows <= sizes.DECODE_ROWS:
        found = (sizes.decode_outputs(kind, bits, *_SHAPE, rows),)
    else:
        found = sizes.prefill_blocks(kind, bits, *_SHAPE, rows, 2)
    assert list(found) == best


def test_what_the_table_has_is_left_out(monkeypatch):
    table = {jax.devices()[0].device_kind: {}}
    tuned_now = []

    def best_sizes(backend, kernel, bits, shape, rows):
        tuned_now.append((kernel, bits, shape, rows))
        key = tune.table_key(backend, kernel, bits, shape, rows)
        table[jax.devices()[0].device_kind][key] = [1]

    monkeypatch.setattr(tuned, "table", lambda: table)
    monkeypatch.setattr(tune, "best_backend", lambda: "mosaic_gpu")
    monkeypatch.setattr(tune, "best_sizes", best_sizes)
    monkeypatch.setattr(tune, "_write", lambda: None)
    options = ["tune.py", "--bits", "none,3", "--rows", "1,512"]
    monkeypatch.setattr(sys, "argv", options)
    assert tune.main() == 0
    shapes = 3
    assert [case[:2] for case in tuned_now] == [
        *[("quant", 3)] * shapes,
        *[("sparse24", None)] * shapes,
        *[("sparse24", 3)] * shapes,
    ]
    monkeypatch.setattr(sys, "argv", [*options, "--missing"])
    assert tune.main() == 0 and len(tuned_now) == 3 * shapes

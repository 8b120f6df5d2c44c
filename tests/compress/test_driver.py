"""The walk through the model: every matrix is compressed for the inputs that it will really see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.compress import driver
from idp_jax.compress.driver import CompressionError, StageTimes, check_fit, compress
from idp_jax.compress.gptq import gptq
from idp_jax.config import Compression, ConfigError
from idp_jax.formats.io import expand
from idp_jax.models.block import STAGES, layer_slice
from idp_jax.sharding import make_mesh, shard
from idp_jax.weights import Quantized
from tests.helpers import close, quantize_decoder, tiny_decoder, tiny_ids

NAMES = ("llama", "opt")
GPTQ = Compression(method="gptq", bits=3, group_size=32)


@functools.cache
def model_of(name: str):
    """A small model; OPT as OPT-350m, with its norms behind the sums and a projected embedding."""
    other = {"norm_before": False, "final_norm": False, "embedding_dim": 32}
    return tiny_decoder(name, **(other if name == "opt" else {}))


@functools.cache
def tokens_of(name: str) -> np.ndarray:
    """Calibration text; five windows leave a smaller micro-batch at the end."""
    return np.asarray(tiny_ids(model_of(name), batch=5, time=32))


@functools.cache
def compressed(name: str, settings: Compression = GPTQ):
    """The compressed model, its report, the Hessians, and (run, stored) of every matrix."""
    hessians, results = [], []
    with pytest.MonkeyPatch.context() as patch:
        own_hessian, own_stage = driver._hessian, driver._compress_stage

        def hessian_of(inputs):
            hessians.append(own_hessian(inputs))
            return hessians[-1]

        def stage_of(*arguments):
            out = own_stage(*arguments)
            results.extend((running, stored) for running, stored, _ in out.values())
            return out

        patch.setattr(driver, "_hessian", hessian_of)
        patch.setattr(driver, "_compress_stage", stage_of)
        model, report = compress(model_of(name), settings, tokens_of(name), batch_size=2)
    return model, report, [np.asarray(hessian) for hessian in hessians], results


class Recorder:
    """A matrix that keeps what it reads, in a forward pass that knows nothing of stages."""

    def __init__(self, weight):
        self.weight, self.inputs = weight, None

    def __call__(self, x):
        self.inputs = np.asarray(x, np.float64)
        return self.weight(x)


def read_by_matrices(model, ids) -> list[dict[str, np.ndarray]]:
    """Layer by layer and matrix by matrix, what a whole forward pass of the model feeds it."""
    h, context, _ = model.start(model.embed(jnp.asarray(ids)))
    found = []
    for layer in range(model.config.num_layers):
        block = layer_slice(model.layers, layer)
        recorders = {name: Recorder(getattr(block, name)) for name in block.weight_names}
        for name, recorder in recorders.items():
            object.__setattr__(block, name, recorder)
        h, _ = block(h, context)
        found.append({name: recorder.inputs for name, recorder in recorders.items()})
    return found


def hessian_of(x: np.ndarray) -> np.ndarray:
    """2/n X^T X in float64."""
    x = x.reshape(-1, x.shape[-1])
    return 2 / len(x) * x.T @ x


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_sees_the_compressed_matrices_before_it(name):
    """What a matrix reads depends on those before it alone, so the finished model shows it."""
    model, _, hessians, _ = compressed(name)
    reads = read_by_matrices(expand(model), tokens_of(name))
    untouched = read_by_matrices(model_of(name), tokens_of(name))
    number = 0
    for layer, (inputs, before) in enumerate(zip(reads, untouched, strict=True)):
        for stage in STAGES:
            expected = hessian_of(inputs[stage[-1]])
            # Scales are stored in float16 and sums taken in float32.
            error = np.abs(hessians[number] - expected).max() / np.abs(expected).max()
            assert error <= 2e-3, (layer, stage)
            other = np.abs(hessian_of(before[stage[-1]]) - expected).max() / np.abs(expected).max()
            first = layer == 0 and stage[-1] == "v"
            assert (other < 1e-6) if first else (other > 1e-2), (layer, stage)
            number += 1
    assert number == len(hessians)


@pytest.mark.parametrize("name", NAMES)
def test_each_matrix_is_what_the_core_makes_of_it(name):
    """Layer 1's down projection by itself, from a Hessian measured by hand."""
    model, report, _, _ = compressed(name)
    x = read_by_matrices(expand(model), tokens_of(name))[1]["down"]
    kernel = model_of(name).layers.down.kernel[...][1]
    hessian = jnp.asarray(hessian_of(x), jnp.float32)
    codes, dense, _ = gptq(kernel.T, hessian, bits=3, group_size=32)
    down = layer_slice(model.layers, 1).down
    assert (np.abs(np.asarray(down.dense()) - np.asarray(dense).T) < 1e-6).mean() > 0.98
    assert codes.codes.shape == kernel.T.shape
    row = next(row for row in report if row["layer"] == 1 and row["matrix"] == "down")
    difference = x.reshape(-1, x.shape[-1]) @ (np.asarray(kernel) - np.asarray(down.dense()))
    output = x.reshape(-1, x.shape[-1]) @ np.asarray(kernel)
    measured = np.square(difference).sum() / np.square(output).sum()
    assert row["relative_error"] == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_what_ran_is_what_is_stored(name):
    _, _, _, results = compressed(name)
    assert len(results) == 2 * (7 if name == "llama" else 6)
    for running, stored in results:
        assert isinstance(stored, Quantized) and stored.bits == 3
        assert close(running.kernel[...], stored.dense(), 1e-7)


@pytest.mark.parametrize("settings", [GPTQ, Compression(method="magnitude", sparsity="0.5")])
def test_everything_else_stays(settings):
    before = model_of("opt")
    after = compressed("opt", settings)[0]
    assert after.config == before.config
    for name in before.layers.weight_names:
        bias = getattr(after.layers, name).bias
        assert (bias[...] == getattr(before.layers, name).bias[...]).all(), name
    for name in ("embedding", "positions"):
        assert (getattr(after, name)[...] == getattr(before, name)[...]).all()
    assert (after.project_in.kernel[...] == before.project_in.kernel[...]).all()
    assert (after.layers.mlp_norm.bias[...] == before.layers.mlp_norm.bias[...]).all()
    # The model that was given is as it was.
    again = tiny_decoder("opt", norm_before=False, final_norm=False, embedding_dim=32)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(again), strict=True)
    assert all((x == y).all() for x, y in pairs)


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_zeros_are_where_the_pattern_says(method, sparsity):
    settings = Compression(method=method, sparsity=sparsity, block_size=32)
    model, report = compress(model_of("llama"), settings, tokens_of("llama"))
    for name in model.layers.weight_names:
        kernel = np.asarray(getattr(model.layers, name).kernel[...])  # [L, I, O]
        original = np.asarray(getattr(model_of("llama").layers, name).kernel[...])
        zeros = kernel == 0
        if sparsity == "2:4":
            runs = zeros.reshape(2, -1, 4, kernel.shape[-1])
            assert (runs.sum(2) == 2).all(), name
        assert (zeros.sum((1, 2)) == kernel[0].size // 2).all(), name
        moved = (kernel != original)[~zeros].mean()
        assert moved == 0 if method == "magnitude" else moved > 0.5
    assert all(row["sparsity"] == 0.5 for row in report)
    assert all(("relative_error" in row) == (method == "sparsegpt") for row in report)


def test_rounding_needs_no_text():
    settings = Compression(method="rtn", bits=4, group_size=32)
    model, report = compress(model_of("llama"), settings)
    for name in model.layers.weight_names:
        before = np.asarray(getattr(model_of("llama").layers, name).kernel[...])
        weight = getattr(model.layers, name)
        step = np.repeat(np.asarray(weight.scales[...], np.float32), 32, 1)
        # Half a step, and what the float16 scale moves the ends of the grid by.
        assert (np.abs(np.asarray(weight.dense()) - before) <= 0.51 * step).all(), name
    assert [row["matrix"] for row in report[:7]] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert [row["layer"] for row in report] == [0] * 7 + [1] * 7


@pytest.mark.parametrize(("bits", "group_size"), [(3, 48), (2, -1)])
def test_groups_that_no_word_ends_with(bits, group_size):
    """48 inputs of 3 bits end in the middle of a word."""
    model = tiny_decoder("llama", hidden_dim=96, num_heads=6, num_kv_heads=6, num_layers=1)
    settings = Compression(method="rtn", bits=bits, group_size=group_size)
    after, _ = compress(model, settings)
    groups = 96 // group_size if group_size > 0 else 1
    assert after.layers.q.scales[...].shape == (1, groups, 96)
    scales = np.asarray(after.layers.q.scales[...], np.float32)[0]
    steps = np.asarray(after.layers.q.dense())[0].reshape(groups, -1, 96) / scales[:, None]
    codes = np.round(steps)
    # Whole steps from the zero point, and no more of them than the bits can count.
    assert np.abs(steps - codes).max() < 1e-3
    assert (codes.max(1) - codes.min(1)).max() == 2**bits - 1


def test_several_devices_compress_alike():
    settings = Compression(method="gptq", bits=3, group_size=32, block_size=32)
    model = tiny_decoder("llama", num_layers=1)
    tokens = np.asarray(tiny_ids(model, batch=8, time=32))
    alone, expected = compress(model, settings, tokens)
    mesh = make_mesh({"data": 8})
    with jax.set_mesh(mesh):
        placed = shard(model, mesh)
        cut, report = compress(placed, settings, tokens, mesh=mesh)
    for row, wanted in zip(report, expected, strict=True):
        assert row["relative_error"] == pytest.approx(wanted["relative_error"], rel=1e-2), row
    for name in model.layers.weight_names:
        here, there = getattr(alone.layers, name).dense(), getattr(cut.layers, name).dense()
        # A sum in another order tips single weights over to the next code.
        assert (np.abs(np.asarray(here) - np.asarray(there)) < 1e-4).mean() > 0.99, name


def test_text_passes_in_micro_batches():
    """Their size changes nothing but the memory."""
    _, report = compress(model_of("llama"), GPTQ, tokens_of("llama"), batch_size=5)
    for row, wanted in zip(report, compressed("llama")[1], strict=True):
        # A sum in another order tips single weights over to the next code, and so on.
        assert row["relative_error"] == pytest.approx(wanted["relative_error"], rel=0.05)


def test_progress_and_times():
    layers, times = [], StageTimes()

    def progress(items):
        for item in items:
            layers.append(item)
            yield item

    settings = Compression(method="rtn", bits=4, group_size=32)
    compress(model_of("llama"), settings, progress=progress, times=times)
    assert layers == [0, 1]
    assert set(times.seconds) == {"hessian", "core"} and times.seconds["core"] > 0


def packed():
    """A model that is compressed already."""
    return quantize_decoder(tiny_decoder("llama", num_layers=1), 4)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (
            lambda: model_of("llama"),
            {"group_size": 48},
            r"--group-size 48 does not divide the 64 inputs of matrix q; use 32, 64, -1",
        ),
        (
            lambda: model_of("llama"),
            {"group_size": 64},
            r"--group-size 64 does not divide the 96 inputs of matrix down; use 32, -1",
        ),
        (
            lambda: tiny_decoder("llama", ffw_dim=72),
            {"group_size": 8},
            r"matrix gate of 64 x 72 cannot be packed: .* multiples of 32",
        ),
        (
            lambda: tiny_decoder("llama", ffw_dim=90),
            {"method": "magnitude", "sparsity": "2:4"},
            r"--sparsity 2:4 needs multiples of 4; down has 90 inputs",
        ),
        (packed, {}, "matrix q is packed already; compress the uncompressed model"),
        (lambda: model_of("llama"), {}, "--method gptq needs calibration text; give --calibration"),
        (
            lambda: model_of("llama"),
            {"method": "sparsegpt"},
            "--method sparsegpt needs calibration text; give --calibration",
        ),
    ],
)
def test_settings_that_do_not_fit(make, settings, message):
    work = []
    with pytest.raises(ConfigError, match=message):
        compress(make(), Compression(**{"group_size": 32, **settings}), progress=work.append)
    assert not work


def test_pruning_ignores_group_sizes():
    check_fit(tiny_decoder("llama", ffw_dim=72), Compression(method="magnitude", group_size=7))


@pytest.mark.parametrize("method", ["gptq", "sparsegpt"])
def test_inputs_that_are_not_numbers(method):
    broken = tiny_decoder("llama", num_layers=3)
    norm = broken.layers.mlp_norm
    norm.scale[...] = norm.scale[...].at[1, 5].set(jnp.nan)
    settings = Compression(method=method, group_size=32, block_size=32)
    with pytest.raises(CompressionError, match=r"layer 1 matrix gate .*--damping") as error:
        compress(broken, settings, tokens_of("llama"))
    assert "\n" not in str(error.value)


def test_a_dead_input_is_reported():
    model = tiny_decoder("llama", num_layers=1)
    norm = model.layers.attention_norm
    norm.scale[...] = norm.scale[...].at[0, :3].set(0.0)
    _, report = compress(model, GPTQ, tokens_of("llama"))
    assert [row["dead_columns"] for row in report] == [3, 3, 3, 0, 0, 0, 0]
    assert report[0]["retries"] == 0

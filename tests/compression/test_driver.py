"""The walk through the model: every matrix is compressed for the inputs that it will really see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.compression import driver, matrices
from idp_jax.compression.cores.gptq import gptq
from idp_jax.compression.driver import CompressionError, StageTimes, compress, resolve_settings
from idp_jax.compression.flow import Flow
from idp_jax.config import Compression, ConfigError
from idp_jax.models.block import layer_slice
from idp_jax.models.matrices import stages
from idp_jax.models.storage import expand
from idp_jax.sharding import make_mesh, shard
from idp_jax.weights import Dense, Quantized
from tests.helpers import close, quantize_decoder, tiny_config, tiny_decoder, tiny_ids

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
        own_hessian, own_running = Flow.hessian, driver.running

        def hessian_of(*arguments):
            hessians.append(own_hessian(*arguments))
            return hessians[-1]

        def running(stored, dtype):
            results.append((own_running(stored, dtype), stored))
            return results[-1][0]

        patch.setattr(Flow, "hessian", hessian_of)
        patch.setattr(driver, "running", running)
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
        for stage in stages(model.config):
            last = stage[-1].name
            expected = hessian_of(inputs[last])
            # Scales are stored in float16 and sums taken in float32.
            error = np.abs(hessians[number] - expected).max() / np.abs(expected).max()
            assert error <= 2e-3, (layer, stage)
            other = np.abs(hessian_of(before[last]) - expected).max() / np.abs(expected).max()
            first = layer == 0 and last == "v"
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
    codes, dense, _ = gptq(
        kernel.T, hessian, bits=3, group_size=32, grid="mse", act_order="group", block_size=32
    )
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
@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_zeros_are_where_the_pattern_says(method, sparsity):
    # Rows of a random model compete within themselves: Wanda may lose against the whole matrix.
    free = (".",) if method == "wanda" else ()
    settings = Compression(method=method, sparsity=sparsity, block_size=32, allow_worse=free)
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
        assert moved > 0.5 if method == "sparsegpt" else moved == 0
    keys = {"layer", "matrix", "module", "method", "sparsity"}
    if method != "magnitude":
        keys |= {"relative_error", "baseline_error"}
    if method == "sparsegpt":
        keys |= {"damping", "retries", "dead_columns"}
    assert all(row["sparsity"] == 0.5 and set(row) == keys for row in report)


def test_rounding_needs_no_text():
    settings = Compression(method="rtn", bits=4, group_size=32, grid="minmax")
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


@functools.cache
def one_layer():
    """A model of one layer and text that eight devices can share."""
    model = tiny_decoder("llama", num_layers=1)
    return model, np.asarray(tiny_ids(model, batch=8, time=32))


@functools.cache
def alone(settings: Compression):
    """What one device makes of it."""
    return compress(one_layer()[0], settings, one_layer()[1])


@pytest.mark.parametrize(
    ("method", "mesh"),
    [
        ("gptq", {"data": 2, "model": 4}),
        pytest.param("gptq", {"data": 8}, marks=pytest.mark.slow),
        pytest.param("sparsegpt", {"data": 2, "model": 4}, marks=pytest.mark.slow),
        pytest.param("wanda", {"data": 8}, marks=pytest.mark.slow),
    ],
    ids=["gptq-2x4", "gptq-8x1", "sparsegpt-2x4", "wanda-8x1"],
)
def test_several_devices_compress_alike(method, mesh):
    settings = Compression(method=method, bits=3, group_size=32, block_size=32, allow_worse=(".",))
    one, expected = alone(settings)
    model, tokens = one_layer()
    devices = make_mesh(mesh)
    with jax.set_mesh(devices):
        several, report = compress(shard(model, devices), settings, tokens, mesh=devices)
    for row, wanted in zip(report, expected, strict=True):
        assert row["relative_error"] == pytest.approx(wanted["relative_error"], rel=1e-2), row
        assert row["baseline_error"] == pytest.approx(wanted["baseline_error"], rel=1e-2), row
    for name in model.layers.weight_names:
        here, there = getattr(one.layers, name).dense(), getattr(several.layers, name).dense()
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
    assert set(times.seconds) == {"core"} and times.seconds["core"] > 0


def packed():
    """A model that is compressed already."""
    return quantize_decoder(tiny_decoder("llama", num_layers=1), 4)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (
            lambda: model_of("llama"),
            {"group_size": 48},
            r"--group-size 48 does not divide the 64 inputs of model.layers.0.self_attn.q_proj; "
            "use 32, 64, -1, or a rule for this matrix",
        ),
        (
            lambda: model_of("llama"),
            {"group_size": 64},
            r"--group-size 64 does not divide the 96 inputs of model.layers.0.mlp.down_proj; "
            "use 32, -1, or a rule",
        ),
        (
            lambda: tiny_decoder("llama", ffw_dim=72),
            {"group_size": 8},
            r"layers.0.mlp.gate_proj of 64 x 72 cannot be packed: .* multiples of 32",
        ),
        (
            lambda: tiny_decoder("llama", ffw_dim=90),
            {"method": "magnitude", "sparsity": "2:4"},
            r"--sparsity 2:4 needs .* multiples of 4; model.layers.0.mlp.down_proj has 90 inputs",
        ),
        (packed, {}, "matrix q is packed already; compress the uncompressed model"),
        (lambda: model_of("llama"), {}, "--method gptq needs calibration text; give --calibration"),
        (
            lambda: model_of("llama"),
            {"method": "sparsegpt"},
            "--method sparsegpt needs calibration text; give --calibration",
        ),
        (
            lambda: model_of("llama"),
            {"sparsity": "3:12"},
            r"--sparsity 3:12 needs inputs and groups that are multiples of 12; .*q_proj has 64",
        ),
        (
            lambda: model_of("llama"),
            {"rules": ("q_proj group_size=48",)},
            r"--group-size 48 does not divide the 64 inputs of model.layers.0.self_attn.q_proj",
        ),
        (lambda: model_of("llama"), {"rules": ("fc1 bits=4",)}, "'fc1 bits=4': no such matrix"),
        (lambda: model_of("llama"), {"allow_worse": ("fc1",)}, "--allow-worse 'fc1': no such"),
        (
            lambda: model_of("llama"),
            {"method": "rtn", "rules": ("q_proj method=wanda",)},
            "needs calibration text; give --calibration",
        ),
    ],
)
def test_settings_that_do_not_fit(make, settings, message):
    work = []
    with pytest.raises(ConfigError, match=message):
        compress(make(), Compression(**{"group_size": 32, **settings}), progress=work.append)
    assert not work


def test_pruning_ignores_group_sizes():
    config = tiny_config("llama", ffw_dim=72)
    resolve_settings(config, Compression(method="magnitude", group_size=7))
    resolve_settings(config, Compression(group_size=32, rules=("mlp skip",)))


@pytest.mark.parametrize("method", ["gptq", "wanda"])
@pytest.mark.parametrize("place", ["inputs", "weights"])
def test_numbers_too_large_to_be_squared_are_told_as_such(place, method):
    """All of them are finite, and no Hessian is at fault."""
    model = tiny_decoder("llama")
    wild = model.layers.mlp_norm.scale if place == "inputs" else model.layers.up.kernel
    wild[...] = wild[...].at[1, 3].set(1e30)
    settings = Compression(method=method, group_size=32, allow_worse=(".*",))
    with pytest.raises(CompressionError, match="too large to be squared") as error:
        compress(model, settings, tokens_of("llama"))
    said = str(error.value)
    assert "model.layers.1.mlp." in said and "Hessian" not in said and "\n" not in said


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("method", ["rtn", "magnitude", "wanda"])
def test_weights_that_are_not_finite_are_named_and_counted(method, value):
    broken = tiny_decoder("llama")
    kernel = broken.layers.up.kernel
    kernel[...] = kernel[...].at[1, 2:4, 5].set(value)
    settings = Compression(method=method, group_size=32, allow_worse=(".",))
    with pytest.raises(CompressionError, match=r"model.layers.1.mlp.up_proj holds 2 of 6144"):
        compress(broken, settings, tokens_of("llama"))


@pytest.mark.parametrize(("bits", "grid"), [(4, "minmax"), (8, "mse")])
def test_a_matrix_on_the_grid_is_not_worse_than_its_baseline(bits, grid):
    """Rounded to 4 bits once, it loses next to nothing, as does its baseline."""
    settings = Compression(method="rtn", bits=4, group_size=32, grid="minmax")
    exact = expand(compress(model_of("llama"), settings)[0])
    again = Compression(method="gptq", bits=bits, group_size=32, grid=grid, allow_worse=())
    _, report = compress(exact, again, tokens_of("llama"))
    assert max(row["relative_error"] for row in report) < 2**-16


@pytest.mark.parametrize("method", ["gptq", "sparsegpt"])
def test_inputs_that_are_not_numbers(method):
    broken = tiny_decoder("llama", num_layers=3)
    norm = broken.layers.mlp_norm
    norm.scale[...] = norm.scale[...].at[1, 5].set(jnp.nan)
    settings = Compression(method=method, group_size=32, block_size=32)
    wanted = r"gives model.layers.1.mlp.gate_proj and model.layers.1.mlp.up_proj \d+ of 64 inputs"
    with pytest.raises(CompressionError, match=wanted) as error:
        compress(broken, settings, tokens_of("llama"))
    assert "\n" not in str(error.value)


def test_a_dead_input_is_reported():
    model = tiny_decoder("llama", num_layers=1)
    norm = model.layers.attention_norm
    norm.scale[...] = norm.scale[...].at[0, :3].set(0.0)
    _, report = compress(model, GPTQ, tokens_of("llama"))
    assert [row["dead_columns"] for row in report] == [3, 3, 3, 0, 0, 0, 0]
    assert report[0]["retries"] == 0


@pytest.mark.parametrize(
    ("settings", "worse"),
    [
        ({"method": "wanda"}, "magnitude pruning"),
        ({"rules": ("down_proj method=wanda",)}, "magnitude pruning"),
        ({"rules": ("down_proj bits=4 act_order=none",)}, "rounding to nearest"),
    ],
)
def test_a_matrix_worse_than_its_baseline_stops_the_walk(monkeypatch, settings, worse):
    """The core is made to return nothing but zeros for the down projection."""
    own = matrices._core

    def core(matrix, hessian, settings):
        result = own(matrix, hessian, settings)
        return result._replace(dense=result.dense * (0.0 if matrix.shape[1] == 96 else 1.0))

    monkeypatch.setattr(matrices, "_core", core)
    model, tokens = one_layer()
    # A damping of its own, so that no program compiled with the true core is used.
    settings = {"group_size": 32, "damping": 0.011, **settings}
    free = ("attn", "gate", "up")
    with pytest.raises(
        CompressionError, match=rf"mlp\.down_proj ends with .* 1, {worse} alone"
    ) as e:
        compress(model, Compression(**settings, allow_worse=free), tokens)
    assert "--allow-worse 'model.layers.0.mlp.down_proj'" in str(e.value)
    assert "\n" not in str(e.value)
    _, report = compress(model, Compression(**settings, allow_worse=(*free, "down")), tokens)
    assert report[-1]["relative_error"] == 1 > report[-1]["baseline_error"]
    matrices._compress_alike.clear_cache()


def test_each_matrix_has_its_own_settings(monkeypatch):
    """Mixed bits, groups, methods and zeros; what is loaded is what was made, layer by layer."""
    made = []
    own = driver.compress_matrices

    def recorded(*arguments):
        made.append(own(*arguments))
        return made[-1]

    monkeypatch.setattr(driver, "compress_matrices", recorded)
    rules = (
        r"layers\.0\..*q_proj bits=8 group_size=-1",
        "k_proj skip",
        "v_proj method=wanda sparsity=2:4",
        r"layers\.1\..*o_proj bits=4 group_size=16",
        "up_proj sparsity=0.5",
        r"layers\.0\..*down_proj method=rtn",
    )
    settings = Compression(group_size=32, grid="minmax", rules=rules, allow_worse=(".",))
    model, report = compress(model_of("llama"), settings, tokens_of("llama"))
    by_name = {(row["layer"], row["matrix"]): row for row in report}
    results = iter(made)
    for layer in range(2):
        in_block = [next(results) for _ in stages(model.config)]
        stored = {name: result.weight for stage in in_block for name, result in stage.items()}
        block = layer_slice(model.layers, layer)
        for name, weight in stored.items():
            np.testing.assert_array_equal(getattr(block, name).dense(), weight.dense())
        for name in ("q", "o", "gate", "up", "down"):
            assert stored[name].bits == by_name[layer, name]["bits"], name
        assert isinstance(stored["k"], Dense) and isinstance(stored["v"], Dense)
        up = np.asarray(stored["up"].dense())
        assert (up == 0).mean() >= 0.5 and by_name[layer, "up"]["sparsity"] >= 0.5
        v = np.asarray(stored["v"].dense())
        assert ((v == 0).reshape(16, 4, -1).sum(1) == 2).all()
    np.testing.assert_array_equal(model.layers.k.dense(), model_of("llama").layers.k.dense())
    assert by_name[0, "k"] == {
        "layer": 0,
        "matrix": "k",
        "module": "model.layers.0.self_attn.k_proj",
        "method": "skip",
    }
    assert by_name[0, "q"]["bits"] == 8 and by_name[0, "q"]["group_size"] == -1
    assert by_name[1, "o"]["bits"] == 4 and by_name[0, "o"]["bits"] == 3
    assert set(by_name[1, "q"]) == {
        "layer",
        "matrix",
        "module",
        "method",
        "bits",
        "group_size",
        "relative_error",
        "baseline_error",
        "damping",
        "retries",
        "dead_columns",
    }
    assert "baseline_error" not in by_name[0, "down"] and "relative_error" in by_name[0, "down"]
    ids = tiny_ids(model)
    assert close(model(ids), expand(model)(ids))

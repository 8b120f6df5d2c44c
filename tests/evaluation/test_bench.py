"""A bench says what was timed, in turns, and holds the paper's claims against it."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from idp_jax.cli import main
from idp_jax.config import Bench, ConfigError, Lora, Mesh
from idp_jax.evaluation import bench as room
from idp_jax.evaluation.bench import bench
from idp_jax.evaluation.bench_results import BenchVariant, Timed, claims, read
from idp_jax.evaluation.bench_table import markdown, sentences, sheets
from idp_jax.evaluation.roofline import Bound, Peak, bound, weight_bytes
from idp_jax.evaluation.statistics import median_ratio
from idp_jax.formats import load_model, save_adapter
from idp_jax.recover import LoraAdapter, Repaired
from tests.helpers import quantize_decoder, tiny_decoder, tiny_folder, tiny_pool, write_folder

MODELS = Path(__file__).parents[2] / "configs" / "models"
SMALL = {
    "batch_sizes": (1, 2),
    "prompt_length": 5,
    "new_tokens": 3,
    "repeats": 2,
    "soft_prompt_length": 4,
    "pool_lengths": (2, 3),
    "lora": Lora(rank=2),
}
PACKED = {"bits": 4, "group_size": 32, "quant_method": "gptq", "checkpoint_format": "gptq_v2"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, and one of its shape that is packed."""
    folder = tmp_path_factory.mktemp("bench")
    tiny_folder(folder / "model", num_layers=2)
    packed = quantize_decoder(tiny_decoder("llama", vocab_size=259), 4)
    write_folder(packed, folder / "packed", {**PACKED, "desc_act": False, "sym": False})
    return folder


def settings(files, **changes) -> Bench:
    return Bench(**{"model": str(files / "model"), "plan": True, **SMALL, **changes})


def test_llama_7bs_parameters_are_those_of_the_method():
    """LoRA 524,288 r on q and v; a prompt 4,096 n; a prefix 262,144 n."""
    settings = Bench(model=str(MODELS / "llama-7b"), plan=True, chip="h100", soft_prompt_length=50)
    rows = bench(settings).variants
    of = {row.name.removeprefix("llama-7b + "): row for row in rows}
    assert of["LoRA"].parameters == 524_288 * 8 == 4_194_304
    assert of["prompt"].parameters == 4_096 * 50 == 204_800
    assert of["LoRA"].parameters / of["prompt"].parameters == 20.48
    assert of["prefix"].parameters == 262_144 * 50
    assert of["IDP"].parameters == 4_096 * (25 + 100)
    # bfloat16 keys and values of 32 layers, 4,096 wide; a row has the longest prompt's slots.
    assert of["prompt"].kv_bytes == of["prompt"].stored_kv_bytes == 50 * 2 * 32 * 4096 * 2
    assert of["IDP"].kv_bytes == 100 * 2 * 32 * 4096 * 2 == of["IDP"].stored_kv_bytes / 2
    assert of["LoRA"].kv_bytes == 0


def test_21_times_fewer_parameters_is_a_matter_of_sizes():
    found = bench(Bench(model=str(MODELS / "llama-7b"), plan=True, chip="h100"))
    tokens = {(row.rank, *row.targets): row.tokens for row in found.equal}
    assert tokens[8, "q", "v"] == 48 and tokens[8, "all"] == 232
    parameters = {(row.rank, *row.targets): row.parameters for row in found.equal}
    assert parameters[16, "q", "v"] == 524_288 * 16
    assert {claim.verdict for claim in found.claims} == {"does not hold"}
    found = bench(
        Bench(model=str(MODELS / "llama-7b"), plan=True, chip="h100", soft_prompt_length=48)
    )
    verdicts = {claim.variant.split()[-1]: claim.verdict for claim in found.claims}
    assert verdicts == {"prompt": "holds", "prefix": "does not hold", "IDP": "does not hold"}


def test_a_plan_loads_and_times_nothing(files, monkeypatch, tmp_path):
    monkeypatch.setattr(room.formats, "load_model", lambda *a, **o: pytest.fail("loaded"))
    monkeypatch.setattr(room, "time_tokens", lambda *a, **o: pytest.fail("timed"))
    out = tmp_path / "plan.json"
    found = bench(settings(files, chip="v5e", compressed=(str(files / "packed"),), out=out))
    assert read(out) == found
    names = [row.name for row in found.variants]
    assert names[:2] == ["model", "model + prompt"] and names[5:7] == ["packed", "packed + prompt"]
    dense, packed = found.variants[0], found.variants[5]
    assert packed.weight_bytes < dense.weight_bytes
    assert "TTFT and TPOT at least" in sheets(found)[0].title


def test_everything_is_timed_in_turns(files, monkeypatch, tmp_path):
    """A round goes once through all variants and batch sizes, in an order of its own."""
    seen = []

    def time_tokens(repaired, ids, *, new_tokens):
        seen.append((id(repaired), ids.shape, ids.tobytes()))
        return np.full(new_tokens, 0.001 * (1 + len(seen)))

    monkeypatch.setattr(room, "time_tokens", time_tokens)
    monkeypatch.setattr(room, "peak_of", lambda *asked: Peak(1e9, 1e9, "none"))
    loaded = []
    load = lambda model, **options: loaded.append(model) or load_model(model, **options)
    monkeypatch.setattr(room.formats, "load_model", load)
    out = tmp_path / "bench.json"
    compressed = (str(files / "packed"),)
    found = bench(settings(files, plan=False, out=out, compressed=compressed))
    assert read(out) == found and loaded == [str(files / "model"), *compressed]
    names = [row.name for row in found.variants]
    assert len(names) == 11 and "model + LoRA, merged" in names
    assert list(found.left_out) == ["packed + LoRA, merged"]
    assert "quantised to 4 bits" in found.left_out["packed + LoRA, merged"]
    cells = 2 * len(names)
    rounds = [seen[start : start + cells] for start in range(0, len(seen), cells)]
    assert len(rounds) == 3  # one is not counted
    orders = [[(who, shape) for who, shape, _ in turn] for turn in rounds]
    assert all(len(set(order)) == cells for order in orders)
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    for turn in rounds:  # the same prompts for all
        assert len({text for _, shape, text in turn if shape == (2, 5)}) == 1
    assert min(found.variants[0].runs[1].ttft_ms) > cells


def test_times_are_those_of_the_definitions():
    timed = Timed.of([np.array([0.5, 0.1, 0.3]), np.array([0.7, 0.2, 0.2])])
    assert timed.values("ttft").tolist() == [500, 700]
    assert np.allclose(timed.values("tpot"), [200, 200])
    assert np.allclose(timed.values("itl"), [100, 300, 200, 200])
    assert np.allclose(timed.values("e2e"), [900, 1100])
    found = timed.summaries
    assert found["ttft"].median == 600 and math.isclose(found["ttft"].std, math.sqrt(2) * 100)
    assert math.isclose(found["e2e"].p90, 1080) and math.isclose(found["e2e"].p99, 1098)
    assert Timed.of([np.array([0.5, 0.1])]).summaries["ttft"].std == 0


def made(name: str, repair, ttft, parameters=1) -> BenchVariant:
    """A variant of which a token takes 1 ms in every round."""
    seconds = [np.array([first, 0.001, 0.001]) for first in ttft]
    facts = {"model": "m", "weight_bytes": 1, "bounds": {1: Bound(1.0, 1.0)}}
    runs = {1: Timed.of(seconds)}
    return BenchVariant(name=name, repair=repair, parameters=parameters, runs=runs, **facts)


def test_a_claim_holds_where_the_whole_interval_says_so():
    slow, quick = (1.0, 1.1, 0.9, 1.05, 1.0), (0.30, 0.31, 0.29, 0.32, 0.30)
    rows = [made("p", "idp", quick, 10), made("l", "lora", slow, 210)]
    found = {claim.quantity: claim for claim in claims(rows)}
    assert found["parameters"].verdict == "holds" and found["parameters"].ratio.value == 21
    assert found["ttft"].verdict == "holds" and math.isclose(found["ttft"].ratio.value, 0.3)
    assert found["tpot"].verdict == "does not hold" and found["tpot"].ratio.value == 1
    wide = (0.1, 0.9, 0.35, 0.6, 0.38)
    rows = [made("p", "idp", wide, 11), made("l", "lora", slow, 210)]
    found = {claim.quantity: claim for claim in claims(rows)}
    assert found["ttft"].verdict == "undecided" and found["parameters"].verdict == "does not hold"
    one = {c.quantity: c for c in claims([made("p", "idp", (0.1,)), made("l", "lora", (1.0,))])}
    assert one["ttft"].verdict == "undecided"


def test_the_ratio_of_medians_is_paired():
    first, second = [1.0, 2.0, 3.0, 40.0, 5.0], [2.0, 4.0, 6.0, 80.0, 10.0]
    found = median_ratio(first, second)
    assert found.value == 0.5 and math.isclose(found.low, 0.5) and math.isclose(found.high, 0.5)


def test_bounds_are_counted_by_hand():
    model = tiny_decoder("llama", num_layers=1)  # 64 wide, 2 of 4 heads with keys, 96, 128 words
    matrices = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert weight_bytes(model) == 4 * (matrices + 128 * 64 + 3 * 64)  # norms; not the embedding
    sizes = {"batch_size": 2, "prompt_length": 10, "new_tokens": 4}
    products = bound(Repaired(model), Peak(1e3, 1e30, ""), **sizes)
    head = 2 * 128 * 64
    attended = 4 * 64 * 5.5
    assert math.isclose(products.ttft_ms, 2 * (10 * (2 * matrices + attended) + head))
    assert math.isclose(products.tpot_ms, 2 * (2 * matrices + 4 * 64 * 12 + head))
    memory = bound(Repaired(model), Peak(1e30, 1e3, ""), **sizes)
    cached = 2 * 2 * 16 * 4  # bytes of a token
    assert math.isclose(memory.ttft_ms, weight_bytes(model) + 2 * 10 * cached)
    assert math.isclose(memory.tpot_ms, weight_bytes(model) + 2 * 12 * cached)
    tied = tiny_decoder("opt", num_layers=1)
    all_bytes = sum(x.nbytes for x in jax.tree.leaves(tied))
    assert weight_bytes(tied) == all_bytes - tied.positions.nbytes
    lora = LoraAdapter.init(model, 2, jax.random.key(0)).repair(model)
    more = bound(lora, Peak(1e3, 1e30, ""), **sizes)
    update = 2 * 2 * (64 + 64 + 64 + 32)
    assert math.isclose(more.tpot_ms - products.tpot_ms, 2 * update)


def test_adapters_from_folders_and_the_command(files, tmp_path, capsys):
    """From the command line to the files, once for real."""
    model = load_model(files / "model")
    save_adapter(tiny_pool(model, 2, 3), tmp_path / "pool", decoder=model)
    lora = LoraAdapter.init(model, 2, jax.random.key(0))
    save_adapter(lora, tmp_path / "lora", decoder=model)
    out, table = tmp_path / "bench.json", tmp_path / "bench.md"
    sizes = ["--batch-sizes", "1", "--prompt-length", "5", "--new-tokens", "3", "--repeats", "2"]
    adapters = ["--adapters", "mine", str(tmp_path / "pool"), "other", str(tmp_path / "lora")]
    command = ["bench", str(files / "model"), *adapters, *sizes, "--out", str(out)]
    main([*command, "--table", str(table)])
    said = " ".join(capsys.readouterr().err.split())
    for word in ("TTFT", "TPOT", "ITL", "E2E", "60% less time, model + mine against model + other"):
        assert word in said
    found = read(out)
    names = ["model", "model + mine", "model + other", "model + other, merged"]
    assert [row.name for row in found.variants] == names
    assert found.variants[1].adapter == str(tmp_path / "pool")
    assert all(len(row.runs[1].itl_ms[0]) == 2 for row in found.variants)
    assert table.read_text() == markdown(found) and out.with_suffix(".png").stat().st_size
    assert json.loads(out.read_text())["environment"]["jax"]
    assert all(line in table.read_text() for line in sentences(found))
    with pytest.raises(SystemExit):
        main(command)
    assert "exists; give another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repeats": 0}, "--repeats 0 must be at least 1"),
        ({"new_tokens": 1}, "--new-tokens 1 must be at least 2"),
        ({"batch_sizes": (1, 1)}, "--batch-sizes names one twice"),
        ({"batch_sizes": ()}, "--batch-sizes"),
        ({"plan": False}, "--out is missing"),
        ({"plan": False, "out": Path("b.json"), "chip": "h100"}, "--chip h100 is of --plan"),
        ({"mesh": Mesh(model=2)}, "times are of one device"),
        ({"out": Path("b.png")}, "figure's name"),
        ({"out": Path("b.json"), "table": Path("b.png")}, "place of another result"),
    ],
)
def test_bad_settings_are_refused(files, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(files, **changes)


def test_what_does_not_fit_a_model_is_refused_before_it_is_loaded(files, tmp_path):
    with pytest.raises(ConfigError, match="two variants are called 'model'"):
        bench(settings(files, compressed=(str(tiny_folder(tmp_path / "model")),)))
    opt = tiny_folder(tmp_path / "opt", "opt")
    with pytest.raises(ValueError, match="learned positions"):
        bench(settings(files, model=str(opt), prompt_length=254))

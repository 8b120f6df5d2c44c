"""The harness's own command line and files: our model in the one, our scores in the other."""

import json
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import lm_eval
import pytest
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from idp_jax.config import ConfigError, Evaluate
from idp_jax.evaluation.job import score
from idp_jax.evaluation.lm_eval_model import IdpJaxLM
from idp_jax.formats import load_model, save_adapter
from tests.evaluation.test_bear import write_facts
from tests.helpers import tiny_folder, tiny_pool

QUIZ = """
task: quiz
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {rows}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["no", "yes"]
doc_to_target: right
tag: quizzes
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
SAY = """
task: say
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {rows}}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: right
generation_kwargs: {{until: ["."], max_gen_toks: 3}}
tag: quizzes
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, a pool of two prompts, and a folder with a task that brings its rows."""
    folder = tmp_path_factory.mktemp("files")
    tiny_folder(folder / "model", max_positions=512, num_layers=1)
    model = load_model(folder / "model")
    save_adapter(tiny_pool(model, 3, 5), folder / "pool", decoder=model)
    rows = folder / "rows.jsonl"
    asked = [{"question": f"Is it {n}?", "right": n % 2} for n in range(4)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "quiz.yaml").write_text(QUIZ.format(rows=rows))
    (folder / "tasks" / "say.yaml").write_text(SAY.format(rows=rows))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Rows that a task reads by `datasets` are kept there."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def samples(folder, task) -> list[dict]:
    (file,) = folder.glob(f"*/samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def settings(files, out, **changes) -> Evaluate:
    common = {"model": str(files / "model"), "out": out, "tasks": "quiz", "batch_size": 4}
    return Evaluate(**{**common, "include_path": files / "tasks", **changes})


@pytest.mark.filterwarnings("ignore")  # the harness's own use of torch and datasets
def test_the_command_line_of_the_harness_scores_as_ours(files, tmp_path, monkeypatch, capsys):
    model = f"pretrained={files / 'model'},adapter={files / 'pool'},selector=first"
    call = ["lm_eval", "--model", "idp_jax", "--model_args", model, "--tasks", "quiz"]
    call += ["--include_path", str(files / "tasks"), "--batch_size", "4", "--log_samples"]
    monkeypatch.setattr(sys, "argv", [*call, "--output_path", str(tmp_path / "theirs")])
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # it sets that itself
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # of the whole process
    cli_evaluate()
    assert "|quiz" in capsys.readouterr().out
    theirs = samples(tmp_path / "theirs", "quiz")
    own = settings(
        files,
        tmp_path / "r.json",
        adapter=files / "pool",
        selector=("first",),
        log_samples=tmp_path / "ours",
    )
    (variant,) = score(own).variants
    ours = samples(tmp_path / "ours", "quiz")
    for row, other in zip(ours, theirs, strict=True):
        for name in ("doc", "doc_hash", "target", "arguments", "acc", "resps"):
            assert row[name] == other[name]
        assert row["prompts"] == [0]
    assert variant.tasks["quiz"].samples["acc"] == [row["acc"] for row in ours]
    odds = variant.tasks["quiz"].samples["gold_log_odds"]
    assert odds == [row["gold_log_odds"] for row in ours]


def test_files_are_in_the_layout_of_the_harness(files, tmp_path):
    write_facts(tmp_path / "data" / "bear")
    log = tmp_path / "logged"
    asked = {"tasks": "bear_templates", "task_data": tmp_path / "data", "log_samples": log}
    (variant,) = score(settings(files, tmp_path / "r.json", limit=0.5, **asked)).variants
    (results,) = log.glob("*/results_*.json")
    tree = json.loads(results.read_text())
    assert tree["config"]["model_args"] == {"pretrained": str(files / "model")}
    for task, found in variant.tasks.items():
        assert tree["results"][task]["acc,none"] == found.metrics["acc"]
    assert tree["groups"]["bear_templates"]["acc,none"] == variant.groups["bear_templates"]["acc"]
    rows = samples(log, "bear_template_3")
    assert len(rows) == 2 and rows[0]["doc"]["relation"] == "P1"
    assert rows[0]["arguments"]["gen_args_1"] == {"arg_0": "", "arg_1": "In Africa there is Nepal."}
    assert len(rows[0]["resps"]) == 3 and "prompts" not in rows[0]
    assert not list(log.glob(".*"))


def test_a_disk_that_takes_no_more_is_told(files, tmp_path, monkeypatch):
    """The harness's own writer only logs what went wrong."""
    monkeypatch.setattr("lm_eval.loggers.evaluation_tracker.sanitize_list", lambda value: 1 / 0)
    with pytest.raises(OSError, match="logged: the files of samples cannot be written"):
        score(settings(files, tmp_path / "r.json", log_samples=tmp_path / "logged"))
    assert not list((tmp_path / "logged").iterdir())


def test_tags_rows_and_options_of_included_tasks(files, tmp_path):
    """Rows come from --task-data where it has a folder of the task, else from the task."""
    (tmp_path / "data" / "quiz").mkdir(parents=True)
    rows = tmp_path / "data" / "quiz" / "validation.jsonl"
    rows.write_text('{"question": "Is it?", "right": 1}\n')
    asked = {"tasks": "quizzes", "task_data": tmp_path / "data"}
    kwargs = "do_sample=true,temperature=2.0,until=[]"
    plain, other = (
        score(settings(files, log / "r.json", gen_kwargs=text, log_samples=log, **asked))
        for text, log in (("", tmp_path / "plain"), (kwargs, tmp_path / "other"))
    )
    assert {n: task.items for n, task in plain.variants[0].tasks.items()} == {"quiz": 1, "say": 4}
    said, sampled = (samples(tmp_path / name, "say") for name in ("plain", "other"))
    assert sampled[0]["arguments"]["gen_args_0"]["arg_1"]["temperature"] == 2.0
    assert [row["resps"] for row in said] != [row["resps"] for row in sampled]
    assert other.config["gen_kwargs"] == kwargs


def test_bad_options_are_refused(files, tmp_path):
    with pytest.raises(ConfigError, match="--include-path .*none is no folder of task files"):
        settings(files, tmp_path / "r.json", include_path=tmp_path / "none")
    for text in ("temperature", "a=[", "{", "[1]"):
        with pytest.raises(ConfigError, match="--gen-kwargs .* is neither KEY=VALUE"):
            settings(files, tmp_path / "r.json", gen_kwargs=text)
    found = settings(files, tmp_path / "r.json", gen_kwargs='{"until": ["a,b"], "top_k": 5}')
    assert found.generation == {"until": ["a,b"], "top_k": 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("dtype=float32", "pretrained=MODEL is missing"),
        ("pretrained=M,peft=a", "no argument 'peft'; there are pretrained, adapter, selector"),
        ("pretrained=M,dtype=float8", "dtype .*float8"),
        ("pretrained={model},selector=first", "selector=first needs a pool"),
        ("pretrained={model},batch_size=many", "batch_size=many is no whole number"),
    ],
)
def test_bad_model_args_are_refused(files, arguments, message):
    with pytest.raises(ValueError, match=message):
        IdpJaxLM.create_from_arg_string(arguments.format(model=files / "model"))


@pytest.mark.filterwarnings("ignore")
def test_the_model_is_found_by_name_and_entry_point(files):
    assert get_model("idp_jax") is IdpJaxLM
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    group = declared["project"]["entry-points"]["lm_eval.models"]
    assert EntryPoint("idp_jax", group["idp_jax"], "lm_eval.models").load() is IdpJaxLM
    found = lm_eval.simple_evaluate(
        model="idp_jax",
        model_args={"pretrained": str(files / "model"), "dtype": "float32"},
        tasks=["quiz"],
        task_manager=TaskManager(include_path=files / "tasks", include_defaults=False),
        batch_size="auto",
        bootstrap_iters=0,
    )
    assert set(found["samples"]) == {"quiz"} and len(found["samples"]["quiz"]) == 4

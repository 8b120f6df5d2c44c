"""`idp-jax generate` on a tiny model: to the terminal, into a file, and what it refuses."""

import json

import pytest

from idp_jax import load_model
from idp_jax.cli import main
from idp_jax.formats import save_adapter
from idp_jax.inference import generate
from tests.helpers import tiny_folder, tiny_pool, tiny_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of one layer, a pool for it, and prompts."""
    folder = tmp_path_factory.mktemp("generate")
    tiny_folder(folder / "model", num_layers=1)
    model = load_model(folder / "model")
    save_adapter(tiny_pool(model, 2, 3), folder / "pool", decoder=model)
    (folder / "prompts.txt").write_text("tide\nthe keeper\na lamp\n")
    (folder / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    return folder


def run(*arguments) -> None:
    """The command in this process."""
    main(["generate", *map(str, arguments)])


def rows(path) -> list[dict]:
    """The lines of a file of texts."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_prompt_is_written_to_the_terminal(files, capsys):
    run(files / "model", "--prompt", "tide", "--max-new-tokens", 8)
    printed = capsys.readouterr()
    model, tokenizer = load_model(files / "model"), tiny_tokenizer()
    expected = generate(model, "tide", tokenizer=tokenizer, max_new_tokens=8)
    assert printed.out == expected + "\n"
    assert "1 text, 8 tokens" in printed.err and "tokens per second" in printed.err


def test_a_file_of_prompts_with_a_pool(files, tmp_path, capsys):
    out = tmp_path / "texts.jsonl"
    drawn = ["--temperature", 0.8, "--top-k", 20, "--top-p", 0.9, "--seed", 3]
    shared = [files / "model", "--adapter", files / "pool", *drawn, "--max-new-tokens", 6]
    many = [*shared, "--prompts", files / "prompts.txt", "--batch-size", 2, "--out", out]
    run(*many)
    found = rows(out)
    assert [row["prompt"] for row in found] == ["tide", "the keeper", "a lamp"]
    assert {row["finish_reason"] for row in found} <= {"stop", "length"}
    assert all(row["chosen_prompt"] in (0, 1) and 0 < row["tokens"] <= 6 for row in found)
    said = capsys.readouterr()
    assert said.out == "" and "3 texts" in said.err and f"written to {out}" in said.err
    run(*shared, "--prompt", "the keeper")
    assert capsys.readouterr().out == found[1]["text"] + "\n"
    with pytest.raises(SystemExit):
        run(*many)
    run(*many, "--overwrite", "--selector", "fixed(index=1)")
    assert {row["chosen_prompt"] for row in rows(out)} == {1}


def test_a_mesh_gives_the_same_text(files, capsys):
    shared = [files / "model", "--prompt", "tide", "--max-new-tokens", 8]
    texts = []
    for mesh in ([], ["--mesh.model", 2, "--mesh.fsdp", 4]):
        run(*shared, *mesh)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


BAD = {
    "none": (["--chat"], "give either --prompt TEXT or --prompts FILE"),
    "empty": (["--prompt", ""], "--prompt '' is empty"),
    "both": (["--prompt", "a", "--prompts", "b.txt"], "give either"),
    "no-out": (["--prompts", "b.txt"], "needs a file for the texts: --out"),
    "no-file": (["--prompts", "none.txt", "--out", "o"], "there is no file of prompts none.txt"),
    "chat": (["--prompt", "a", "--chat"], "the tokenizer has no chat template"),
    "temperature": (["--prompt", "a", "--temperature", "-1"], "--temperature -1.0 must be 0"),
    "top-p": (
        ["--prompt", "a", "--temperature", "1", "--top-p", "1.5"],
        "--top-p 1.5 must be above 0 and at most 1",
    ),
    "top-k": (["--prompt", "a", "--temperature", "1", "--top-k", "0"], "--top-k 0 must be at"),
    "vocabulary": (["--prompt", "a", "--temperature", "1", "--top-k", "300"], "vocabulary of 259"),
    "greedy": (["--prompt", "a", "--top-k", "5"], "--temperature 0 draws nothing"),
    "stop": (["--prompt", "a", "--stop", ""], "--stop '' ends every text"),
    "adapter": (["--prompt", "a", "--adapter", "none"], "none holds no adapter_config.json"),
    "selector": (["--prompt", "a", "--selector", "random"], "needs a pool: give its --adapter"),
    "tokens": (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0 must be at least"),
    "processes": (["--prompt", "a", "--mesh.distributed"], "runs in one process"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_done_is_said_in_one_line(files, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(files / "model", *arguments)
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and message in said[-1], said


def test_messages_need_a_template(files, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(files / "model", "--prompts", files / "chat.jsonl", "--out", tmp_path / "o.jsonl")
    assert "prompt 0: the tokenizer has no chat template" in capsys.readouterr().err

"""Files of prompts."""

import json

import pytest

from idp_jax.data.prompts import read_prompts

MESSAGES = [{"role": "user", "content": "hello"}]


def test_lines_and_rows(tmp_path):
    plain, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("one\n\n two \nthree")
    assert read_prompts(plain) == ["one", " two ", "three"]
    given = [{"prompt": "one\ntwo", "id": 7}, {"messages": MESSAGES}]
    rows.write_text("\n".join(map(json.dumps, given)))
    assert read_prompts(rows) == ["one\ntwo", MESSAGES]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "a", "give a .txt or .jsonl file"),
        ("p.txt", "\n \n", "holds no prompt; give another file"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ""}', "p.jsonl:2 holds no prompt"),
        ("p.jsonl", '{"prompt": 3}', "p.jsonl:1 holds no prompt"),
        ("p.jsonl", '["a"]', "p.jsonl:1 holds no prompt"),
        ("p.jsonl", '{"messages": []}', "p.jsonl:1 holds no prompt"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', "p.jsonl:1 holds no prompt"),
        ("p.jsonl", "{", "p.jsonl:1 is not JSON"),
    ],
)
def test_files_that_hold_none(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match="there is no file of prompts"):
        read_prompts(tmp_path / "none.txt")

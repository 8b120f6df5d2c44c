"""Documents of text files."""

import gzip
import json

import pytest

from idp_jax.data.text import read_documents, read_text


def test_reads_jsonl_fields_and_gz(tmp_path):
    rows = "\n".join(
        json.dumps(row) for row in ({"text": "a\u2028b"}, {"page": "c", "url": ""}, {"text": ""})
    )
    (tmp_path / "a.jsonl").write_text(rows + "\n\n", encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    for name in ("a.jsonl", "b.jsonl.gz"):
        assert read_documents(tmp_path / name) == ["a\u2028b", "c", ""]
        assert read_text(tmp_path / name) == "a\u2028b\n\nc\n\n"


@pytest.mark.parametrize("name", ["a.txt", "a.raw"])
def test_plain_text_is_one_document_as_it_is(tmp_path, name):
    (tmp_path / name).write_bytes(b"one\r\n\n two \n")
    assert read_documents(tmp_path / name) == ["one\r\n\n two \n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "give a .txt, .raw or .jsonl"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff\xfe", "give a UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"body": "a"}', "expected one of text, page"),
        ("a.jsonl.gz", b"plain", "cannot read"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no text file"):
        read_documents(tmp_path / "none.txt")

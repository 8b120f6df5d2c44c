"""Documents of text files: the same whatever the packaging, or one line that names the place."""

import gzip
import json
import re

import numpy as np
import pytest

from idp_jax.data import text as module
from idp_jax.data.text import join_documents, read_documents, read_text

TEXT = "naïve café\n\n 漢字 😀 \u2028 one line, \x85 still \n"


def whole(path, seed=None) -> list[str]:
    """The documents of a file, each as one string."""
    return ["".join(join_documents([document])) for document in read_documents(path, seed)]


def rows(*texts: str, **how) -> str:
    """Lines of a .jsonl file."""
    return "".join(json.dumps({"text": text}, **how) + "\n" for text in texts)


def refusal(path) -> str:
    """What is said of a file that cannot be read: one line, with its name."""
    with pytest.raises(ValueError) as error:
        whole(path)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and str(path) in message
    return message


def test_reads_jsonl_fields_and_gz(tmp_path):
    lines = "\n".join(
        json.dumps(row) for row in ({"text": "a\u2028b"}, {"page": "c", "url": ""}, {"text": ""})
    )
    (tmp_path / "a.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    (tmp_path / "b.JSONL.GZ").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "b.JSONL.GZ"):
        assert whole(tmp_path / name) == ["a\u2028b", "c", ""]
        assert "".join(read_text(tmp_path / name)) == "a\u2028b\n\nc\n\n"


@pytest.mark.parametrize("name", ["a.txt", "a.raw"])
def test_plain_text_is_one_document(tmp_path, name):
    (tmp_path / name).write_bytes(b"one\n\n two \n")
    assert whole(tmp_path / name) == ["one\n\n two \n"]


@pytest.mark.parametrize("block", [1, 2, 3, 7, module._BLOCK])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]
)
def test_the_same_text_whatever_the_packaging(tmp_path, monkeypatch, encoding, ends, block):
    monkeypatch.setattr(module, "_BLOCK", max(block, 4) if encoding != "utf-8" else block)
    plain = TEXT.replace("\n", ends).encode(encoding)
    (tmp_path / "a.txt").write_bytes(plain)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(plain))
    lines = "\n" + rows(TEXT, "b", ensure_ascii=False) + " \n" + rows("c").rstrip("\n")
    (tmp_path / "a.jsonl").write_bytes(lines.replace("\n", ends).encode(encoding))
    assert whole(tmp_path / "a.txt") == whole(tmp_path / "a.txt.gz") == [TEXT]
    assert whole(tmp_path / "a.jsonl") == [TEXT, "b", "c"]


def test_line_ends_that_a_json_string_spells_out_stay(tmp_path):
    (tmp_path / "a.jsonl").write_text(rows("a\r\nb\rc"))
    assert whole(tmp_path / "a.jsonl") == ["a\r\nb\rc"]


def test_files_with_marks_put_behind_one_another(tmp_path):
    one = rows("a").encode("utf-8-sig")
    (tmp_path / "a.jsonl").write_bytes(one + one)
    assert whole(tmp_path / "a.jsonl") == ["a", "a"]


def test_no_more_is_read_than_is_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text(rows(*["word " * 40] * 1000) + "no JSON")
    assert next(iter(read_documents(tmp_path / "a.jsonl"))) == "word " * 40
    (tmp_path / "b.txt").write_bytes(b"a" * 2**18 + b"\xff")
    document = next(iter(read_documents(tmp_path / "b.txt")))
    assert set(next(iter(document))) == {"a"}


@pytest.mark.parametrize("held", [1, 60, 10**6])
def test_a_random_order_is_that_of_all_rows(tmp_path, monkeypatch, held):
    monkeypatch.setattr(module, "_HELD", held)
    texts = [f"document {number}" for number in range(30)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(rows(text) for text in texts))
    order = np.random.default_rng(3).permutation(30)
    assert whole(tmp_path / "a.jsonl", 3) == [texts[index] for index in order]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "give a .txt, .raw or .jsonl"),
        ("a.gz", gzip.compress(b"x", mtime=0), "give a .txt, .raw or .jsonl"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff\xfe", "holds no text"),
        ("a.jsonl", b"\n \n", "holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.txt", "ab\ncafé".encode("latin-1"), "a.txt:2 .* byte 6 .* 0xe9; save it as UTF-8"),
        ("a.jsonl", rows("é", ensure_ascii=False).encode("cp1252"), "a.jsonl:1 .* byte 10 "),
        ("a.txt", b"\xef\xbb\xbfab\xe2\x82", "a.txt:1 .* byte 5 .* 0xe2"),
        ("a.txt", "ab\n".encode("utf-16") + b"\x00\xd8", "a.txt:2 is not UTF-16 .* byte 8 "),
        ("a.jsonl", b'{"text": "a"}\n{"text"', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "a\x0bb"}', r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}", r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", b"[" * 10**5, r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"body": "a"}', "expected one of text, page"),
        ("a.jsonl", b'{"text": null}', "expected one of text, page"),
        ("a.jsonl", b'["text"]', "expected one of text, page"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "ab\\ud83d"}', r"a\.jsonl:2 .*\\ud83d, at 2 of"),
        ("a.jsonl.gz", b"plain", "cannot read"),
        ("a.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-9], "cannot read"),
        ("a.txt.gz", gzip.compress(b"some text" * 99, mtime=0) + b"more", "cannot read"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:10] + b"\xff" * 30, "cannot read"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert re.search(message, refusal(tmp_path / name))


@pytest.mark.parametrize("block", [1, 5])
def test_the_place_of_a_wrong_byte_does_not_depend_on_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    (tmp_path / "a.txt").write_bytes("é\n漢\n".encode() + b"\xf0\x9fab")
    assert "a.txt:3 is not UTF-8 text: byte 7 of the file is 0xf0" in refusal(tmp_path / "a.txt")


def test_a_row_that_a_small_file_unpacks_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_ROW", 10**5)
    data = rows("a").encode() + b'{"text": "' + b"a" * 10**7
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    assert "a.jsonl.gz:2 is longer than 100000 characters" in refusal(tmp_path / "a.jsonl.gz")


def test_missing_file_is_named(tmp_path):
    assert "there is no text file" in refusal(tmp_path / "none.txt")

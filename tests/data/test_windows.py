"""Windows of text: no gaps, the same for the same seed, never both held out and trained on."""

import json
from functools import partial
from itertools import islice

import datasets
import numpy as np
import pytest

from idp_jax.data.self_text import sample_documents
from idp_jax.data.sources import documents
from idp_jax.data.stream import TrainingText
from idp_jax.data.windows import keep_windows, take_windows, windows
from tests.helpers import tiny_decoder

LENGTH = 8


class Letters:
    """A tokenizer of one id per character, with one token before every text."""

    all_special_ids = (0, 1, 2)

    def __call__(self, text, verbose=True):
        return {"input_ids": [1] + [3 + ord(character) % 125 for character in text]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i - 3) for i in ids if i > 2)


def ids_of(text: str) -> list[int]:
    """What a text becomes, without the token before it."""
    return Letters()(text)["input_ids"][1:]


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of several lengths, no two alike."""
    rng = np.random.default_rng(seed)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    return ["".join(rng.choice(letters, rng.integers(1, 40))) for _ in range(count)]


def write(path, rows) -> str:
    """A .jsonl file of documents."""
    from json import dumps

    path.write_text("".join(dumps({"text": text}) + "\n" for text in rows))
    return str(path)


def test_windows_have_no_gaps():
    found = np.concatenate(list(windows(iter(texts(40)), Letters(), LENGTH)))
    whole = Letters()("\n\n".join(texts(40)) + "\n\n")["input_ids"]
    assert found.tolist() == whole[: len(whole) // LENGTH * LENGTH]
    assert found.dtype == np.int32


def test_windows_run_on_over_chunks_of_documents():
    rows = texts(600)  # more than two chunks, each tokenised by itself
    found = np.concatenate(list(windows(iter(rows), Letters(), LENGTH)))
    whole = []
    for first in range(0, 600, 256):
        text = "\n\n".join(rows[first : first + 256]) + "\n\n"
        whole += Letters()(text)["input_ids"]
    assert found.tolist() == whole[: len(whole) // LENGTH * LENGTH]
    assert len(whole) - len(found) < LENGTH


def apart_windows(rows, length=LENGTH) -> np.ndarray:
    """Windows of documents kept apart, int32 [W, 2, length]."""
    return np.stack(list(windows(iter(rows), Letters(), length, apart=True)))


def test_documents_apart_have_no_gaps_and_nothing_between_them():
    rows = texts(40)
    found = apart_windows(rows)
    each = [Letters()(text)["input_ids"] for text in rows]  # its own first token included
    whole = np.concatenate(each).tolist()
    assert found.dtype == np.int32
    assert found[:, 0].ravel().tolist() == whole[: len(whole) // LENGTH * LENGTH]
    document = np.repeat(np.arange(40), [len(ids) for ids in each])[: found[:, 0].size]
    for number, segments in zip(document.reshape(-1, LENGTH), found[:, 1], strict=True):
        assert segments[0] == 0 and (np.diff(segments) == np.diff(number)).all()


def test_a_long_document_that_comes_in_pieces_is_one():
    rows = ["abc" * 30_000, "de"]
    in_pieces = [iter([rows[0][:70_000], rows[0][70_000:]]), "de"]
    found = apart_windows(rows, 90_004)
    assert (found == apart_windows(in_pieces, 90_004)).all()
    assert found[0, 1].tolist() == [0] * 90_001 + [1] * 3


def test_too_few_windows_are_refused():
    with pytest.raises(ValueError, match=r"the text gives 1 of the 9 windows of 8 tokens .*fewer"):
        take_windows(iter(["abcdefghi"]), Letters(), LENGTH, 9, "the text")
    assert take_windows(iter(texts(40)), Letters(), LENGTH, 3, "").shape == (3, LENGTH)


def test_documents_of_a_file(tmp_path):
    source = write(tmp_path / "a.jsonl", texts(30))
    assert list(documents(source)) == texts(30)
    shuffled = list(documents(source, seed=1, shuffle=True))
    assert shuffled != texts(30) and sorted(shuffled) == sorted(texts(30))
    assert shuffled == list(documents(source, seed=1, shuffle=True))
    assert shuffled != list(documents(source, seed=2, shuffle=True))
    with pytest.raises(ValueError, match=r"no text file /no/such\.txt"):
        list(documents("/no/such.txt"))


@pytest.fixture
def hub(monkeypatch):
    """A hub with one streamed dataset; what was asked for is recorded."""
    asked = []

    def load_dataset(name, config=None, *, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist\non the Hub")
        if name == "no/text":
            return datasets.Dataset.from_dict({"text": ["a", None]}).to_iterable_dataset()
        field = "page" if name == "other/field" else "text"
        count = {"some/tiny": 1, "some/small": 12}.get(name, 60)
        rows = datasets.Dataset.from_dict({field: texts(count)})
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_documents_of_the_hub(hub):
    assert list(documents("hub:some/data")) == texts(60)
    assert hub == [("some/data", None, "train", True)]
    assert list(islice(documents("hub:allenai/c4:en"), 2)) == texts(60)[:2]
    assert hub[1] == ("allenai/c4", "en", "train", True)
    shuffled = list(documents("hub:some/data", seed=3, shuffle=True))
    assert shuffled != texts(60) and sorted(shuffled) == sorted(texts(60))
    assert shuffled == list(documents("hub:some/data", seed=3, shuffle=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such", r"dataset no/such cannot be read .*doesn't exist\).*local \.jsonl"),
        ("other/field", "dataset other/field has no field 'text'"),
        ("no/text", r"dataset no/text cannot be read .*row 1 has no text but None"),
    ],
)
def test_datasets_that_cannot_be_read(hub, name, message):
    with pytest.raises(ValueError, match=message) as error:
        list(documents(f"hub:{name}"))
    assert "\n" not in str(error.value)


def opened(
    source: str, seed: int = 0, validation=None, held_out: int = 4, apart: bool = False
) -> TrainingText:
    """Training text of `LENGTH` tokens a window."""
    return TrainingText.open(
        source,
        Letters(),
        LENGTH,
        validation=validation,
        validation_windows=held_out,
        seed=seed,
        apart=apart,
    )


def first_batches(text: TrainingText, count: int) -> list[list]:
    """Batches of three windows as lists."""
    return [batch.tokens.tolist() for batch in islice(text.batches(3), count)]


def with_segments(batches) -> list[tuple]:
    """Batches as lists of tokens and segments."""
    return [(batch.tokens.tolist(), batch.segments.tolist()) for batch in batches]


@pytest.fixture(params=["file", "hub"])
def source(request, tmp_path, hub):
    """Where text comes from."""
    return write(tmp_path / "a.jsonl", texts(60)) if request.param == "file" else "hub:some/data"


def test_batches_follow_the_seed(source):
    batches = first_batches(opened(source), 60)
    assert np.shape(batches) == (60, 3, LENGTH)
    assert batches == first_batches(opened(source), 60)
    assert batches != first_batches(opened(source, seed=1), 60)


def test_batches_go_on_from_a_state(source):
    """Over the end of an epoch too: 60 documents give about 50 batches."""
    whole = first_batches(opened(source), 120)
    for taken in (0, 1, 7, 70):
        first, second = opened(source).batches(3), opened(source).batches(3)
        list(islice(first, taken))
        second.restore(json.loads(json.dumps(first.state())))
        assert second.state() == first.state()
        assert [batch.tokens.tolist() for batch in islice(second, 50)] == whole[taken : taken + 50]


def test_documents_apart_are_batched_with_their_segments_and_go_on(source):
    """Over the end of an epoch too; held-out windows have segments, and are never trained on."""
    text = opened(source, apart=True)
    whole = with_segments(islice(text.batches(3), 90))
    for taken in (0, 7, 50):
        first, second = opened(source, apart=True).batches(3), opened(source, apart=True).batches(3)
        list(islice(first, taken))
        second.restore(json.loads(json.dumps(first.state())))
        assert with_segments(islice(second, 30)) == whole[taken : taken + 30]
    held_out = with_segments(text.validation_batches(2))
    assert np.shape(held_out) == (2, 2, 2, LENGTH)
    in_order = documents(source) if text.local is not None else documents(source, shuffle=True)
    possible = {tuple(window.ravel().tolist()) for window in apart_windows(in_order)}
    rows = lambda batches: {
        (*tokens, *segments) for batch in batches for tokens, segments in zip(*batch, strict=True)
    }
    assert rows(whole) | rows(held_out) <= possible
    assert len(rows(held_out)) == 4 and not rows(held_out) & rows(whole)
    assert any(max(segments) > 0 for _, batch in whole for segments in batch)


def test_a_validation_text_of_its_own_is_kept_apart_too(source, tmp_path):
    other = write(tmp_path / "b.jsonl", texts(60, seed=9))
    text = opened(source, validation=other, held_out=2, apart=True)
    wanted = apart_windows(texts(60, seed=9))[:2]
    (found,) = text.validation_batches(2)
    assert (found.tokens == wanted[:, 0]).all() and (found.segments == wanted[:, 1]).all()


def test_joined_documents_have_no_segments(source):
    text = opened(source)
    assert next(text.batches(3)).segments is None
    assert all(batch.segments is None for batch in text.validation_batches(2))


def test_batches_of_another_size_go_on_with_the_same_windows(source):
    first, second = opened(source).batches(3), opened(source).batches(2)
    list(islice(first, 4))
    second.restore(first.state())
    found = np.concatenate([batch.tokens for batch in islice(second, 3)])
    assert (found == np.concatenate([batch.tokens for batch in islice(first, 2)])).all()


def test_going_on_in_a_local_text_reads_nothing_again(tmp_path):
    text = opened(write(tmp_path / "a.jsonl", texts(60)))
    (tmp_path / "a.jsonl").unlink()
    count = len(text.local)
    batches = text.batches(1)
    batches.restore({"windows": 10**9 * count + 2})
    order = np.random.default_rng([0, 10**9]).permutation(count)
    assert (next(batches).tokens[0] == text.local[order[2]]).all()


def test_validation_batches_are_equal_and_whole(source):
    text = opened(source, held_out=6)
    for size, wanted in ((1, 1), (4, 3), (5, 3), (8, 6)):
        found = [batch.tokens for batch in text.validation_batches(size)]
        assert {len(tokens) for tokens in found} == {wanted}
        assert (np.concatenate(found) == text.validation).all()


def test_validation_batches_are_filled_up_where_devices_share_them(source):
    text = opened(source, held_out=6)
    first, second = text.validation_batches(4, parts=4)
    assert first.tokens.shape == second.tokens.shape == (4, LENGTH)
    assert first.loss_mask.all() and second.loss_mask[:2].all() and not second.loss_mask[2:].any()
    counted = np.concatenate([first.tokens, second.tokens[:2]])
    assert (counted == text.validation).all()
    assert all(batch.loss_mask is None for batch in text.validation_batches(4, parts=2))


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_windows_are_never_trained_on(source, seed):
    text = opened(source, seed)
    held_out = {tuple(window) for window in text.validation.tolist()}
    trained = {tuple(window) for batch in first_batches(text, 150) for window in batch}
    assert len(held_out) == 4 and not held_out & trained
    everything = sum(len(ids_of(t)) + 2 for t in texts(60)) // LENGTH
    assert len(trained) >= everything - 4 - 2
    # Not in other windows either, that a later epoch cuts elsewhere.
    kept = [Letters().decode(window)[1:7] for window in text.validation.tolist()]
    later = " ".join(Letters().decode(window) for window in trained)
    assert not any(fragment in later for fragment in kept if fragment.isalpha())
    assert any(fragment.isalpha() for fragment in kept)


def test_a_validation_text_of_its_own(source, tmp_path):
    other = write(tmp_path / "b.jsonl", texts(60, seed=9))
    text = opened(source, validation=other, held_out=2)
    assert (text.validation == list(islice(windows(documents(other), Letters(), LENGTH), 2))).all()
    alone = {tuple(w) for batch in first_batches(text, 150) for w in batch}
    everything = sum(len(ids_of(t)) + 2 for t in texts(60)) // LENGTH
    assert len(alone) >= everything - 1


def test_tokens_of_a_local_text_lie_in_a_file_without_a_name(tmp_path):
    found = list(windows(iter(texts(60)), Letters(), LENGTH))
    kept = keep_windows(iter(found), LENGTH, tmp_path / "run")
    assert isinstance(kept, np.memmap) and (kept == np.stack(found)).all()
    assert not any((tmp_path / "run").iterdir())
    assert keep_windows(iter([]), LENGTH).shape == (0, LENGTH)


@pytest.mark.parametrize("name", ["a file", "a file/below"])
def test_a_folder_that_cannot_take_the_tokens_is_named(tmp_path, name):
    (tmp_path / "a file").touch()
    with pytest.raises(ValueError, match=r"cannot be kept in .*a file.*; make room there"):
        keep_windows(iter([]), LENGTH, tmp_path / name)


def test_a_local_epoch_holds_every_window_once(tmp_path):
    text = opened(write(tmp_path / "a.jsonl", texts(60)))
    count = len(text.local)
    stream = islice(text.batches(1), 2 * count)
    order = [tuple(batch.tokens[0].tolist()) for batch in stream]
    assert set(order[:count]) == set(order[count:]) == {tuple(w) for w in text.local.tolist()}
    assert order[:count] != order[count:]


@pytest.mark.parametrize(
    ("rows", "held_out", "message"),
    [
        (["abcdefgh" * 4], 4, "gives 4 windows of 8 tokens, too few to train on when 4 are held"),
        (["abc"], 1, "gives 0 windows of 8 tokens, too few"),
    ],
)
def test_a_text_that_is_too_short(tmp_path, rows, held_out, message):
    with pytest.raises(ValueError, match=message):
        opened(write(tmp_path / "a.jsonl", rows), held_out=held_out)


def test_a_text_shorter_than_one_window(tmp_path):
    source, other = tmp_path / "a.txt", tmp_path / "b.txt"
    source.write_text("abc")
    other.write_text("abcdefgh" * 9)
    with pytest.raises(ValueError, match="shorter than one window of 8 tokens; give more text"):
        opened(str(source), validation=str(other))


def test_a_stream_that_is_too_short(hub, tmp_path):
    """Refused instead of read over and over without end."""
    available = len(list(windows(iter(texts(12)), Letters(), LENGTH)))
    with pytest.raises(ValueError, match=r"some/small gives no window .* to train on"):
        first_batches(opened("hub:some/small", held_out=available), 1)
    with pytest.raises(ValueError, match=r"some/tiny gives .* of the 20 windows of 8"):
        opened("hub:some/tiny", held_out=20)


def test_text_of_the_models_own():
    model = tiny_decoder("llama", num_layers=1, max_positions=24)
    calls = []
    progress = lambda done, total: calls.append((done, total))
    found = sample_documents(model, Letters(), 2000, seed=3, progress=progress)
    assert found == sample_documents(model, Letters(), 2000, seed=3)
    assert found != sample_documents(model, Letters(), 2000, seed=4)
    assert len(set(found)) > 60  # every document starts by itself
    assert 2000 <= sum(len(ids_of(text)) for text in found) < 2000 + 33 * 24
    assert all(len(text) <= 24 for text in found)
    assert calls[-1] == (2000, 2000) and [done for done, _ in calls] == sorted(d for d, _ in calls)


def test_text_of_the_models_own_goes_on_as_if_it_had_not_stopped(tmp_path):
    class Stopped(Exception):
        pass

    def stop(done, total):
        if done > 1000:
            raise Stopped

    model = tiny_decoder("llama", num_layers=1, max_positions=8)
    write = partial(sample_documents, model, Letters(), 3000, seed=3, kept=tmp_path / "kept")
    whole = sample_documents(model, Letters(), 3000, seed=3)
    with pytest.raises(Stopped):
        write(progress=stop)
    before = (tmp_path / "kept").read_text()
    assert before.count("\n") == 2
    for cut in (before, before + '{"tokens": 7, "te', before[:-20]):
        (tmp_path / "kept").write_text(cut)
        assert write() == whole
        assert (tmp_path / "kept").read_text().startswith(before)
    calls = []
    assert write(progress=lambda done, total: calls.append(done)) == whole  # nothing to write
    assert calls[0] == 0 and calls[-1] == 3000
    for junk in ("nothing\n", "{}\n", '{"tokens": 1, "texts": 5}\n'):
        (tmp_path / "kept").write_text(junk)
        with pytest.raises(ValueError, match="kept is damaged; remove it"):
            write()

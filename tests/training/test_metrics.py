"""Metrics are on disk when they are written, in order, once."""

from contextlib import closing

from idp_jax.training import JsonLines


def test_lines_are_written_at_once_and_dropped_after_a_step(tmp_path):
    file = tmp_path / "run" / "metrics.jsonl"
    with closing(JsonLines(file)) as sink:
        sink.drop_after(-1)
        for step in range(3):
            sink.write(step, {"loss": step / 2})
        assert file.read_text().splitlines()[-1] == '{"step": 2, "loss": 1.0}'
        sink.drop_after(1)
        sink.write(2, {"loss": 7.0})
    lines = ['{"step": 0, "loss": 0.0}', '{"step": 1, "loss": 0.5}', '{"step": 2, "loss": 7.0}']
    assert file.read_text().splitlines() == lines


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    with closing(JsonLines(file)) as sink:
        sink.drop_after(5)
        sink.write(1, {"loss": 2.0})
    assert file.read_text() == '{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 2.0}\n'

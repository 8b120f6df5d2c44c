"""Comparisons: paired over equal items, refused over others."""

import subprocess
import sys

import pytest

from idp_jax.config import ConfigError
from idp_jax.evaluation import compare, write
from idp_jax.evaluation.comparison import pooled_accuracy
from idp_jax.evaluation.statistics import accuracy_interval, paired_difference, perplexity_ratio
from tests.evaluation.test_results import results, task, text, variant

BEFORE, AFTER = [1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]


def test_tasks_and_text_are_compared_in_pairs(tmp_path):
    first = variant("a", tasks={"t": task(BEFORE), "s": task([1.0, 0.0])})
    second = variant(
        "b", tasks={"t": task(AFTER), "s": task([0.0, 0.0])}, perplexity=text((2, 3, 4))
    )
    found = compare(first, second, seed=3)
    assert (found.first, found.second) == ("a", "b")
    assert found.tasks["t"] == paired_difference(BEFORE, AFTER, seed=3)
    # Tasks in the order of their names.
    assert found.overall == paired_difference([1, 0, *BEFORE], [0, 0, *AFTER], seed=3)
    assert found.perplexity_ratio == perplexity_ratio([3, 3.5, 4], [2, 3, 4], seed=3)
    for name, one in (("a", first), ("b", second)):
        write(results(one), tmp_path / name)
    assert compare(tmp_path / "a", str(tmp_path / "b"), seed=3) == found
    assert compare(results(first), tmp_path / "b", seed=3) == found


def test_what_was_not_measured_is_not_compared():
    bare = variant("a", tasks={}, perplexity=text(digest="other"))
    found = compare(bare, variant("b", tasks={}))
    assert found.tasks == {} and found.overall is None and found.perplexity_ratio is None
    scored = variant("c", tasks={"t": task(samples={"bleu": [0.1, 0.2, 0.3]})})
    assert compare(scored, scored).overall is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"u": task()}, r"the tasks differ \(\['t'\] and \['u'\]\)"),
        (
            {"t": task(documents=["x", "y", "z"])},
            "documents of t differ, 3 of 3 are in 'a'",
        ),
        ({"t": task([1.0, 0.0])}, r"1 of 3 are in 'a' alone \(hash 2 first\); evaluate both"),
        ({"t": task(num_fewshot=5)}, r"the num_fewshot of t differ \(0 and 5\)"),
        ({"t": task(version=2.0)}, r"the version of t differ \(1.0 and 2.0\)"),
    ],
)
def test_other_items_are_refused(other, message):
    with pytest.raises(ConfigError, match=message) as error:
        compare(variant("a"), variant("b", tasks=other))
    assert "'a' and 'b' cannot be compared" in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_several_variants_needs_a_name(tmp_path):
    write(results(variant("a"), variant("b")), tmp_path / "r.json")
    with pytest.raises(ConfigError, match=r"r\.json hold 'a', 'b'; name one: .*variant\(name\)"):
        compare(tmp_path / "r.json", variant("c"))


def test_the_pooled_accuracy_counts_every_item_once():
    found = pooled_accuracy(variant(tasks={"t": task(BEFORE), "s": task([1.0, 1.0])}))
    assert found == accuracy_interval([*BEFORE, 1, 1])
    assert pooled_accuracy(variant(tasks={})) is None


def test_comparing_files_does_not_import_the_harness():
    lines = "import sys, idp_jax.evaluation; assert 'lm_eval' not in sys.modules"
    subprocess.run([sys.executable, "-c", lines], check=True)


def test_names_of_the_package_are_there():
    import idp_jax.evaluation

    for name in idp_jax.evaluation.__all__:
        assert callable(getattr(idp_jax.evaluation, name))
    with pytest.raises(AttributeError, match="no attribute 'score_all'"):
        idp_jax.evaluation.score_all  # noqa: B018

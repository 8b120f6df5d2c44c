"""Comparisons: paired over equal items, refused over others."""

import dataclasses
import subprocess
import sys

import pytest

from idp_jax.config import ConfigError
from idp_jax.evaluation import compare, read, write
from idp_jax.evaluation.comparison import averaged, compare_each, pooled_accuracy
from idp_jax.evaluation.paired import holm, mcnemar
from idp_jax.evaluation.samples import read_runs
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


def flipped(losses, gains, items=200):
    """Scores before and after, of which so many are lost and gained; half of all are right."""
    before = [1.0] * (items // 2) + [0.0] * (items // 2)
    after = [0.0] * losses + before[losses : items - gains] + [1.0] * gains
    return before, after


def pair(**changes):
    """Two variants whose tasks are changed by so many items: name=(lost, gained)."""
    sides = {name: flipped(*counts) for name, counts in changes.items()}
    return [
        variant(letter, tasks={name: task(side[index]) for name, side in sides.items()})
        for index, letter in enumerate("ab")
    ]


def test_verdicts_stand_on_holms_p_and_on_equivalence():
    found = compare(*pair(s=(8, 22), t=(5, 18), u=(0, 0), v=(40, 60)), margin=0.04)
    p_values = [mcnemar(8, 22), mcnemar(5, 18), 1.0, mcnemar(40, 60)]
    tests = [found.tests[name] for name in "stuv"]
    assert [test.p_value for test in tests] == p_values
    assert [test.adjusted for test in tests] == holm(p_values)
    said = ["better", "better", "equivalent", "undecided"]
    assert [test.verdict for test in tests] == said
    assert (tests[0].losses, tests[0].gains) == (8, 22) and found.margin == 0.04
    assert (tests[0].first, tests[0].second) == (0.5, pytest.approx(0.57))
    assert found.pooled.tasks == list("stuv") and found.pooled.verdict == "better"
    assert found.pooled.difference.value == pytest.approx((14 + 13 + 0 + 20) / 800)
    assert compare(*pair(s=(22, 8))).tests["s"].verdict == "worse"


def test_tasks_at_chance_stay_out_of_the_mean():
    first, second = pair(s=(8, 22), t=(0, 40))
    for side in (first, second):
        side.tasks["t"] = dataclasses.replace(side.tasks["t"], chance=0.5)
        side.tasks["s"] = dataclasses.replace(side.tasks["s"], chance=0.25)
    found = compare(first, second)
    assert found.tests["t"].at_chance and not found.tests["s"].at_chance
    assert found.pooled.tasks == ["s"]
    first.tasks["s"] = dataclasses.replace(first.tasks["s"], chance=0.5)
    assert compare(first, second).pooled is None


def test_metrics_that_are_no_shares_have_no_equivalence():
    lower = {"bits_per_byte": [0.9, 0.8, 0.7, 0.9] * 20}
    higher = {"bits_per_byte": [0.5, 0.6, 0.5, 0.7] * 20}
    sides = [
        variant(name, tasks={"t": task(samples=s, documents=[f"{i}" for i in range(80)])})
        for name, s in (("a", lower), ("b", higher))
    ]
    found = compare(*sides)
    test = found.tests["t"]
    assert (test.metric, test.verdict, test.equivalence) == ("bits_per_byte", "better", None)
    assert test.losses is None and found.pooled is None and found.tasks["t"].value < 0
    assert compare(*reversed(sides)).tests["t"].verdict == "worse"
    with pytest.raises(ConfigError, match="t of 'a' has no acc_norm; there is bits_per_byte"):
        compare(*sides, metric="acc_norm")


def test_items_are_joined_by_their_hash():
    before, after = flipped(8, 22)
    documents = [f"hash {i % 190}" for i in range(200)]  # ten documents stand there twice
    first = variant("a", tasks={"t": task(before, documents=documents)})
    turned = variant("b", tasks={"t": task(after[::-1], documents=documents[::-1])})
    straight = variant("b", tasks={"t": task(after, documents=documents)})
    # The second of two equal documents is the second from either side.
    assert compare(first, straight).tests["t"].losses == 8
    whole = compare(first, turned).tests["t"]
    assert (whole.gains - whole.losses, whole.items) == (14, 200)
    short = variant("b", tasks={"t": task(after[:195], documents=documents[:195])})
    with pytest.raises(ConfigError, match=r"5 of 200 are in 'a' alone \(hash 5 first\)"):
        compare(first, short)


def test_clusters_are_a_field_of_the_documents():
    first, second = pair(s=(8, 22))
    groups = {"relation": [f"P{i // 10}" for i in range(200)]}
    labelled = dataclasses.replace(second.tasks["s"], labels=groups)
    second.tasks["s"] = labelled
    found, plain = (compare(first, second, cluster=field) for field in ("relation", None))
    assert found.tests["s"].clusters == 20 and plain.tests["s"].clusters is None
    assert found.cluster == "relation" and found.tests["s"].p_value > plain.tests["s"].p_value
    low, high = found.overall.low, found.overall.high
    assert high - low > plain.overall.high - plain.overall.low
    with pytest.raises(ConfigError, match="no field 'topic' groups the items of s; fields that do"):
        compare(first, second, cluster="topic")


def test_seeds_are_averaged_item_by_item():
    first, better = pair(s=(8, 22))
    same = averaged([better, better], "b")
    found, alone = compare(first, same).tests["s"], compare(first, better).tests["s"]
    assert found.second == alone.second and found.p_value == alone.p_value
    half = averaged([first, better], "half")
    assert half.tasks["s"].samples["acc"][:9] == [0.5] * 8 + [1.0] and half.perplexity is None
    test = compare(first, half).tests["s"]
    assert test.losses is None and test.second == pytest.approx(0.535)
    assert test.p_value == pytest.approx(alone.p_value, abs=0.01) and test.equivalence is not None
    half.tasks["s"] = dataclasses.replace(half.tasks["s"], chance=0.5)
    assert compare(half, better).tests["s"].at_chance
    with pytest.raises(ConfigError, match="the tasks differ"):
        averaged([first, *pair(t=(0, 0))], "c")


def test_comparisons_are_written_and_read(tmp_path):
    found = compare_each(*zip(pair(s=(8, 22)), pair(s=(0, 0)), strict=True), margin=0.03)
    assert [one.tests["s"].verdict for one in found] == ["better", "equivalent"]
    write(results(variant(), comparisons=found), tmp_path / "c.json")
    assert read(tmp_path / "c.json").comparisons == found


def test_an_address_names_a_variant_of_a_file(tmp_path):
    write(results(variant("a"), variant("b + c")), tmp_path / "r.json")
    named = lambda address: [run.name for run in read_runs(f"{tmp_path}/{address}")]
    assert named("r.json") == ["a", "b + c"] and named("r.json:b + c") == ["b + c"]
    for address, message in {
        "r.json:d": "no variant 'd' in these results; there are a, b",
        "s.json": "there is no file or folder .*s.json; give",
    }.items():
        with pytest.raises(ConfigError, match=message):
            named(address)


def test_comparing_files_imports_neither_the_harness_nor_jax(tmp_path):
    for name, change in (("a", (0, 0)), ("b", (8, 22))):
        write(results(variant(name, tasks={"t": task(flipped(*change)[1])})), tmp_path / name)
    lines = (
        "import sys; from idp_jax.cli import main; main(sys.argv[1:]);"
        "assert not {'lm_eval', 'jax', 'datasets'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", lines, "compare", tmp_path / "a", tmp_path / "b"]
    subprocess.run(command, check=True)


def test_names_of_the_package_are_there():
    import idp_jax.evaluation

    for name in idp_jax.evaluation.__all__:
        assert callable(getattr(idp_jax.evaluation, name))
    with pytest.raises(AttributeError, match="no attribute 'score_all'"):
        idp_jax.evaluation.score_all  # noqa: B018

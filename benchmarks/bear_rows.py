"""Writes the BEAR facts as rows of the harness's task `bear`, for --task-data.

    python benchmarks/bear_rows.py --facts DATA/bear --out OUT --per-relation 5
    idp-jax eval --model MODEL --tasks bear --task-data OUT --out bear.json

A row is a fact in one template: the whole sentence once for each option of its relation (Wiland et
al. 2024, arXiv 2404.04113). All of them are 7,731 facts times 27 options on average; a sample of as
many facts of every relation is what a small machine affords.
"""

import argparse
import json
from pathlib import Path

import numpy as np


def rows(folder: Path, per_relation: int | None, template: int, seed: int) -> list[dict]:
    """The chosen facts as rows: the sentences, and "correct", the index of the true one.

    Args:
        folder: holds facts.jsonl (relation, subject, answer) and relations.json (templates with
            [X] and [Y], options).
        per_relation: facts drawn of every relation; None takes all.
        template: 0, 1 or 2.
    """
    relations = json.loads((folder / "relations.json").read_text(encoding="utf-8"))
    facts: dict[str, list[dict]] = {name: [] for name in relations}
    for line in (folder / "facts.jsonl").read_text(encoding="utf-8").splitlines():
        fact = json.loads(line)
        facts[fact["relation"]].append(fact)
    rng, found = np.random.default_rng(seed), []
    for name, relation in relations.items():
        order = rng.permutation(len(facts[name]))[:per_relation]
        for fact in (facts[name][place] for place in sorted(order)):
            sentence = relation["templates"][template].replace("[X]", fact["subject"])
            options = [sentence.replace("[Y]", option) for option in relation["options"]]
            found.append({"relation": name, "text_options": options, "correct": fact["answer"]})
    return found


def main() -> None:
    """Parses the command line, and writes OUT/bear/test.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--facts", type=Path, required=True, help="facts.jsonl, relations.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-relation", type=int, help="facts of every relation (default: all)")
    parser.add_argument("--template", type=int, default=0, choices=range(3))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.per_relation is not None and given.per_relation < 1:
        parser.error(f"--per-relation {given.per_relation} must be at least 1")
    for name in ("facts.jsonl", "relations.json"):
        if not (given.facts / name).is_file():
            parser.error(f"--facts {given.facts} holds no {name}")
    found = rows(given.facts, given.per_relation, given.template, given.seed)
    file = given.out / "bear" / "test.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    file.write_text(text, encoding="utf-8")
    chance = np.mean([1 / len(row["text_options"]) for row in found])
    print(f"{file}: {len(found)} facts, chance {chance:.4f}")


if __name__ == "__main__":
    main()

"""BEAR's facts as rows of the harness's task `bear`: a whole sentence for each option.

BEAR (Wiland et al. 2024, arXiv 2404.04113) asks which sentence about a subject is the likeliest,
one for each answer that its relation has. A folder holds `facts.jsonl` (relation, subject, and the
answer's number among the relation's options) and `relations.json` (by relation: three templates
with [X] for the subject and [Y] for the answer, options, domains). The invariant: rows alternate
over the relations, so that the first ones (`--limit`) are of all of them.
"""

import re
from pathlib import Path
from typing import Any

from idp_jax.evaluation.task_rows import DataError, Rows, read_rows
from idp_jax.jobs.files import read_json

FACTS, RELATIONS = "facts.jsonl", "relations.json"
# By task its template; the harness's own, of which the others are copies, asks the first.
TEMPLATES = {"bear": 0, "bear_template_1": 0, "bear_template_2": 1, "bear_template_3": 2}
_REMEDY = "copy the file again"


def bear_rows(folder: Path, template: int) -> Rows:
    """All facts in one template.

    Args:
        folder: holds `facts.jsonl` and `relations.json`.
        template: 0, 1 or 2.

    Returns:
        Rows of relation, domains, subject, text_options (a sentence an option) and correct, the
        number of the true one; each stands where its fact does.

    Raises:
        ValueError: naming the file and the row, or the relation, that cannot be used.
    """
    facts, path = read_rows(folder / FACTS), folder / RELATIONS
    relations = {
        name: _relation(relation, template, f"{path}: relation {name!r}")
        for name, relation in read_json(path, _REMEDY).items()
    }
    rows, counts = [], dict.fromkeys(relations, 0)
    for index, fact in enumerate(facts.rows):
        row = _row(fact, relations, template, facts.where(index))
        rows.append((counts[row["relation"]], index, row))
        counts[row["relation"]] += 1
    place = {name: number for number, name in enumerate(relations)}
    rows.sort(key=lambda entry: (entry[0], place[entry[2]["relation"]]))
    return Rows(facts.path, [row for *_, row in rows], [facts.lines[i] for _, i, _ in rows])


def _relation(relation: Any, template: int, where: str) -> dict[str, Any]:
    """A relation that sentences can be made of."""
    found: dict[str, Any] = relation if isinstance(relation, dict) else {}
    templates, options = found.get("templates", ""), found.get("options", "")
    if not _texts(templates) or len(templates) <= template:
        raise DataError(f"{where} has no template {template + 1}; {_REMEDY}")
    if sorted(re.findall(r"\[[XY]\]", templates[template])) != ["[X]", "[Y]"]:
        text = templates[template]
        raise DataError(f"{where}: {text!r:.100} does not hold [X] and [Y] once; {_REMEDY}")
    if not _texts(options) or len(set(options)) < max(2, len(options)):
        raise DataError(f"{where} has no list of two options or more, all different; {_REMEDY}")
    if not _texts(found.get("domains", [])):
        raise DataError(f"{where}: the domains are no list of texts; {_REMEDY}")
    return found


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text for text in value)


def _row(fact: dict[str, Any], relations: dict[str, Any], template: int, where: str) -> dict:
    name, subject, answer = (fact.get(key) for key in ("relation", "subject", "answer"))
    if name not in relations:
        raise DataError(f"{where}: the relation is {name!r:.100}, not one of {RELATIONS}")
    options = relations[name]["options"]
    if not isinstance(subject, str) or not subject.strip():
        raise DataError(f"{where}: the subject is {subject!r}, not a text; mend or remove the row")
    if type(answer) is not int or answer not in range(len(options)):
        raise DataError(
            f"{where}: the answer is {answer!r:.100}, which is none of the {len(options)} options; "
            "mend or remove the row"
        )
    sentence = re.split(r"(\[[XY]\])", relations[name]["templates"][template])
    written = lambda option: "".join({"[X]": subject, "[Y]": option}.get(x, x) for x in sentence)
    return {
        "relation": name,
        "domains": relations[name].get("domains", []),
        "subject": subject,
        "text_options": [written(option) for option in options],
        "correct": answer,
    }

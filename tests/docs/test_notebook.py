"""The notebooks: their cells run, and say what the pages show."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers import needs_smollm2

pytestmark = pytest.mark.slow
DOCS = Path(__file__).parents[2] / "docs"


@needs_smollm2
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("name", ["first_minute", "pool_study"])
def test_a_notebook_runs_and_says_what_it_shows(name, capsys):
    cells = json.loads((DOCS / f"{name}.ipynb").read_text())["cells"]
    names: dict = {"__name__": "notebook"}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        exec("".join(cell["source"]), names)
        printed = capsys.readouterr().out
        shown = [line for output in cell["outputs"] for line in output.get("text", [])]
        assert words(printed) == words("".join(shown))


def words(text: str) -> list[str]:
    """The text without its numbers, which seconds and other processors change."""
    return re.sub(r"[-+]?\d+(\.\d+)?", "0", text).split()

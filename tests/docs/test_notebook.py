"""The notebook of a first minute: its cells run, and say what the page shows."""

import json
import re
from pathlib import Path

from tests.helpers import needs_smollm2

NOTEBOOK = Path(__file__).parents[2] / "docs" / "first_minute.ipynb"


@needs_smollm2
def test_the_first_minute_runs_and_says_what_it_shows(capsys):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names: dict = {"__name__": "notebook"}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        exec("".join(cell["source"]), names)
        printed = capsys.readouterr().out
        shown = [line for output in cell["outputs"] for line in output.get("text", [])]
        assert words(printed) == words("".join(shown))


def words(text: str) -> list[str]:
    """The text without its numbers, which seconds and other processors change."""
    return re.sub(r"[-+]?\d+(\.\d+)?", "0", text).split()

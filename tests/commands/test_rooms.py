"""Who may speak: commands print, libraries return."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "idp_jax"
SPEAKERS = {"cli.py", "jobs/progress.py"}
FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def speaks(tree: ast.AST) -> list[str]:
    """What of a module writes to a terminal: print, rich's tables and consoles."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("print", "console"):
            found.append(f"{node.id} in line {node.lineno}")
        module = node.module if isinstance(node, ast.ImportFrom) else None
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [module]
        found += [f"import of {name}" for name in names if str(name).split(".")[0] == "rich"]
    return found


@pytest.mark.parametrize("file", FILES)
def test_libraries_print_nothing(file):
    if file in SPEAKERS or file.startswith("commands/"):
        return
    assert not speaks(ast.parse((PACKAGE / file).read_text()))


def test_every_command_has_a_room():
    from idp_jax.cli import COMMANDS

    for name in COMMANDS:
        tree = ast.parse((PACKAGE / "commands" / f"{name.replace('-', '_')}.py").read_text())
        assert "run" in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]

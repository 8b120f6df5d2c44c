"""Who may import whom: the arrows between the rooms of idp_jax, read from the code."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "idp_jax"
KERNELS = Path(__file__).parents[1] / "kernels"

# Each room with the rooms that it may import; none imports one that stands below it here.
ARROWS = {
    "config": set(),
    "kernels": set(),
    "sharding": set(),
    "jobs": {"config"},
    "cli": {"config", "jobs"},
    "processes": {"jobs", "sharding"},
    "weights": {"kernels", "sharding"},
    "models": {"jobs", "kernels", "sharding", "weights"},
    "recover": {"config", "models", "sharding", "weights"},
    "formats": {
        *("config", "jobs", "kernels", "models", "processes"),
        *("recover", "sharding", "weights"),
    },
    "inference": {"models", "processes", "recover"},
    "data": {"inference", "jobs", "models"},
    "compression": {
        *("config", "data", "formats", "jobs", "kernels"),
        *("models", "processes", "sharding", "weights"),
    },
    "training": {
        *("config", "data", "formats", "jobs", "models"),
        *("processes", "recover", "sharding"),
    },
    "evaluation": {
        *("config", "data", "formats", "inference", "jobs"),
        *("models", "processes", "recover", "sharding", "weights"),
    },
    "pods": {
        "config",
        "data",
        "formats",
        "inference",
        "jobs",
        "kernels",
        "models",
        "recover",
        "sharding",
        "training",
    },
    "analysis": {"config", "evaluation"},
    "experiments": {
        *("analysis", "compression", "config", "data", "evaluation"),
        *("formats", "jobs", "models", "recover", "training"),
    },
    "commands": {
        *("analysis", "compression", "config", "evaluation", "experiments"),
        *("formats", "jobs", "models", "pods", "sharding", "training"),
    },
}


def imports(path: Path) -> set[str]:
    """The modules of idp_jax that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            # `from idp_jax import config` names a room as `from idp_jax.config import X` does.
            bare = module == "idp_jax"
            found |= {f"idp_jax.{a.name}" for a in node.names} if bare else {module}
    found -= {"idp_jax", "idp_jax.__version__"}
    return {name for name in found if name.split(".")[0] == "idp_jax"}


def room(module: str) -> str:
    """The room of a module."""
    return module.split(".")[1]


@pytest.mark.parametrize("name", ARROWS)
def test_a_room_imports_what_lies_below_it(name):
    place = PACKAGE / name
    files = place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]
    arrows = {(room(module), file.name) for file in files for module in imports(file)}
    wrong = {(to, file) for to, file in arrows if to not in {name, *ARROWS[name]}}
    assert not wrong
    assert {to for to, _ in arrows} - {name} == ARROWS[name], "an allowed arrow is not in use"


def test_every_room_has_its_arrows():
    rooms = {
        p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()
    }
    assert rooms - {"__init__"} == set(ARROWS)


def test_arrows_make_no_circle():
    names = list(ARROWS)
    for number, name in enumerate(names):
        assert not ARROWS[name] & set(names[number:]), f"{name} imports what stands below it"


def test_kernels_import_nothing_of_idp_jax():
    files = [path for path in KERNELS.rglob("*.py") if "bench" not in path.parts]
    assert files and not {file.name for file in files if imports(file)}


def test_compression_cores_import_jax_and_each_other():
    known = {"jax", "math", "typing", "collections", "functools"}
    for path in (PACKAGE / "compression" / "cores").glob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
        theirs = {n for n in names if not n.startswith("idp_jax.compression.cores")}
        assert {n.split(".")[0] for n in theirs} <= known, path.name


def test_the_command_line_is_light():
    """What `--help` imports is the configuration alone."""
    for path in [PACKAGE / "cli.py", *(PACKAGE / "config").glob("*.py")]:
        tree = ast.parse(path.read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        heads = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
        heads |= {n.module or "" for n in top if isinstance(n, ast.ImportFrom)}
        assert not {h.split(".")[0] for h in heads} & {"jax", "flax", "numpy", "transformers"}

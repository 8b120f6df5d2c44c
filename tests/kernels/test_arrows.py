"""What kernels may import: themselves, one way."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
OPERATIONS = sorted(path.parent.name for path in KERNELS.glob("*/api.py"))
SHARED = sorted(path.name for path in KERNELS.glob("*.py"))


def _imports(path: Path) -> set[str]:
    """The modules that a file imports, absolute, or relative to kernels/ with a dot in front."""
    found = set()
    folder = path.parent.relative_to(KERNELS).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = [] if node.level == 0 else ["", *folder[: len(folder) - node.level + 1]]
            module = [*above, *([node.module] if node.module else [])]
            found.update(".".join([*module, alias.name]) for alias in node.names)
    return found


def _operations(path: Path) -> set[str]:
    """The operations that a file imports from."""
    return {name for name in OPERATIONS for module in _imports(path) if f".{name}." in f"{module}."}


def test_there_are_operations_and_shared_files():
    assert OPERATIONS == ["quant_matmul", "sparse24_matmul"]
    assert "codes.py" in SHARED and "__init__.py" not in SHARED


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_imports_no_other(operation):
    for path in (KERNELS / operation).glob("*.py"):
        assert _operations(path) <= {operation}, path


@pytest.mark.parametrize("name", SHARED)
def test_shared_files_import_no_operation(name):
    assert not _operations(KERNELS / name)


def test_kernels_import_nothing_of_idp_jax():
    for path in KERNELS.rglob("*.py"):
        # Scripts of bench/ are started by their path, so they name the package of the kernels.
        inside = "idp_jax.kernels." if path.parent.name == "bench" else "nothing"
        for module in _imports(path):
            assert module.split(".")[0] != "idp_jax" or module.startswith(inside), (path, module)


def test_a_backend_imports_no_other():
    kernels = {"pallas_tpu", "mosaic_gpu"}
    for path in KERNELS.glob("*/*.py"):
        if path.stem in kernels:
            for module in _imports(path):
                assert module[0] != "." or kernels.isdisjoint(module.split(".")), (path, module)

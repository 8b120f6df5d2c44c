"""What `import idp_jax` offers."""

import tomllib
from importlib import import_module
from pathlib import Path

import idp_jax


def test_every_public_name_is_a_function_and_no_module():
    # A room of the same name would take a function's place once it is imported.
    for name, module in idp_jax._EXPORTS.items():
        function = getattr(idp_jax, name)
        assert callable(function) and function is getattr(import_module(module), name)
        assert not (Path(idp_jax.__file__).parent / name).exists()


def test_the_version_is_stated_alike():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["version"] == idp_jax.__version__

"""Compiled programs are kept in the user's folder, unless JAX's own variable says otherwise."""

import os

import pytest

from idp_jax.jobs.chips import CHIPS, chip_here
from idp_jax.jobs.compiled import FOLDER, keep_programs


def test_programs_are_kept_in_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_programs()
    folder = os.environ[FOLDER]
    assert folder.startswith(str(tmp_path / "idp-jax")) and os.path.isdir(folder)


def test_the_variable_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for value in ("", "elsewhere"):
        monkeypatch.setenv(FOLDER, value)
        keep_programs()
        assert os.environ[FOLDER] == value and not list(tmp_path.iterdir())


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_programs()
    assert FOLDER not in os.environ


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h100"),
    ],
)
def test_peaks_of_devices_as_jax_names_them(name, kind):
    chip = chip_here(name)
    assert chip is not None and chip.flops == CHIPS[kind].flops


@pytest.mark.parametrize("name", ["cpu", "TPU v3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB"])
def test_other_devices_have_no_peak(name):
    assert chip_here(name) is None

"""What ``import subspace`` offers: light to import, and functions whatever modules share their names."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import subspace
from subspace.adapters.registry import list_methods


@pytest.mark.parametrize("name", subspace._PUBLIC)
def test_a_public_name_resolves(name: str) -> None:
    importlib.import_module(subspace._PUBLIC[name])
    assert callable(getattr(subspace, name))
    assert getattr(subspace, name).__module__ == subspace._PUBLIC[name]
    assert name in dir(subspace)


def test_methods_are_listed_twice_alike() -> None:
    assert subspace.list_methods() == list_methods() == subspace.list_methods()
    assert "lora" in subspace.list_methods()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="injekt"):
        getattr(subspace, "injekt")  # noqa: B009  the spelling is the point


@pytest.mark.processes
def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import subspace, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""In a checkout the repository's own folders are used; an installed package has its copies of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from subspace.common import paths
from subspace.common.paths import (
    REPOSITORY,
    cache_folder,
    checkout,
    declarations_folder,
    engines_folder,
    find_resource,
    recipes_folder,
    resource_name,
)
from subspace.data.tasks import list_mixtures, list_tasks
from subspace.errors import UserError
from subspace.training.logging import git_commit


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a package that lies in ``site-packages``, beside others' ``data``."""
    package = tmp_path / "site-packages" / "subspace"
    package.mkdir(parents=True)
    (package.parent / "data").mkdir()
    monkeypatch.setattr(paths, "PACKAGE", package)
    monkeypatch.setattr(paths, "REPOSITORY", package.parent)
    monkeypatch.delenv("SUBSPACE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return package


def test_a_checkout_has_its_folders_at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBSPACE_CACHE", raising=False)
    assert checkout() == REPOSITORY == Path(__file__).resolve().parents[2]
    assert declarations_folder() == REPOSITORY / "data"
    assert engines_folder() == REPOSITORY / "ds_configs"
    assert recipes_folder() == REPOSITORY / "launch" / "recipes"
    assert cache_folder() == REPOSITORY / "data" / "cache"


def test_an_installed_package_has_its_own(installed: Path) -> None:
    assert checkout() is None
    assert git_commit() is None
    assert declarations_folder() == installed / "resources" / "data"
    assert engines_folder() == installed / "resources" / "engines"
    assert recipes_folder() == installed / "resources" / "recipes"
    assert cache_folder() == installed.parents[1] / "cache" / "subspace"


@pytest.mark.parametrize("name", ["data", "engines", "recipes", "studies"])
def test_the_links_of_the_package_lead_to_the_repository_s_folders(name: str) -> None:
    folders = {
        "data": declarations_folder(),
        "engines": engines_folder(),
        "recipes": recipes_folder(),
        "studies": REPOSITORY / "launch" / "studies",
    }
    assert (REPOSITORY / "subspace" / "resources" / name).resolve() == folders[name]


def test_a_file_is_found_by_its_name_in_the_repository_and_named_so() -> None:
    file = engines_folder() / "zero2.json"
    assert find_resource("ds_configs/zero2.json") == file
    assert resource_name(file) == "ds_configs/zero2.json"
    assert find_resource("ds_configs/none.json") is None
    assert find_resource("zero2.json") is None
    assert resource_name(Path("zero2.json")) is None


def test_an_installed_package_finds_it_by_the_same_name(installed: Path) -> None:
    file = installed / "resources" / "engines" / "zero2.json"
    file.parent.mkdir(parents=True)
    file.touch()
    assert find_resource("ds_configs/zero2.json") == file
    assert resource_name(file) == "ds_configs/zero2.json"


def test_declarations_that_are_not_there_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBSPACE_DATA", str(tmp_path / "none"))
    for read in (list_tasks, list_mixtures):
        with pytest.raises(UserError, match=r"there is no folder .*none.* SUBSPACE_DATA should name one"):
            read()

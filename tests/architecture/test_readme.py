"""The README tells the truth: its table is the register's, its commands parse, its files are there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from subspace import config as config_module
from subspace.adapters import catalog
from subspace.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Return every command of the README's shell blocks, without its comment."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"\s+#.*$", "", line) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


SPOKEN = sorted(command for command in commands() if command.startswith("subspace "))
STARTED = sorted(command for command in commands() if not command.startswith("subspace "))


@pytest.mark.parametrize(
    ("file", "begin", "table", "command"),
    [
        ("subspace/methods/README.md", catalog.BEGIN, catalog.methods_table, "subspace methods --markdown"),
        ("README.md", catalog.BEGIN_SHORT, catalog.short_methods_table, "subspace methods --markdown --short"),
    ],
)
def test_a_table_of_methods_is_current(
    file: str, begin: str, table: Callable[[], str], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    written = (ROOT / file).read_text().partition(begin)[2].partition(catalog.END)[0].strip()
    assert written == table(), f"put what `{command}` prints between the marks of {file}"
    assert cli.main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out.strip() == written


@pytest.mark.parametrize("short", [False, True])
def test_a_table_of_methods_links_to_files(short: bool) -> None:
    table, folder = (
        (catalog.short_methods_table(), ROOT) if short else (catalog.methods_table(), ROOT / catalog.METHODS_FOLDER)
    )
    links = re.findall(r"\]\((?!https:)([^)]+)\)", table)
    assert len(links) == len(catalog.method_infos())
    assert [link for link in links if not (folder / link).is_file()] == []


@pytest.mark.parametrize("command", SPOKEN)
def test_a_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, options = cli.parse(shlex.split(command)[1:])
    if "config" in options:
        config_module.read_config(options.config, options.settings)


@pytest.mark.parametrize("command", STARTED)
def test_what_a_command_starts_is_there(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    missing = [
        word for word in shlex.split(command) if re.search(r"\.(sh|py|yaml)$", word) and not Path(word).is_file()
    ]
    assert not missing


def test_the_readme_shows_every_verb() -> None:
    shown = {shlex.split(command)[1] for command in SPOKEN}
    assert {verb.name for verb in cli.COMMANDS} == shown


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\b([a-z]+\.py)\b", README))))
def test_a_file_that_it_names_is_there(name: str) -> None:
    assert [*ROOT.glob(f"subspace/**/{name}"), *ROOT.glob(f"launch/{name}"), *ROOT.glob(f"tests/{name}")]

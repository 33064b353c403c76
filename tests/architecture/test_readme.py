"""The pages tell the truth: tables are generated, commands parse, files are there, the picture is the contract's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from subspace import config as config_module
from subspace.adapters import catalog
from subspace.cli import main as cli
from subspace.study.config import read_study
from tests.architecture import draw

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [
    *ROOT.glob("*.md"),
    *(
        page
        for folder in ("subspace", "launch", "ds_configs", "data", "tests")
        for page in ROOT.glob(f"{folder}/**/*.md")
    ),
]


def commands(text: str) -> list[str]:
    """Return every command of a page's shell blocks, without its comment."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"\s+#.*$", "", line) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def of_pages(*, ours: bool) -> list[tuple[str, str]]:
    """Return (page, command) for what starts with ``subspace``, or for the others."""
    found = [(str(page.relative_to(ROOT)), command) for page in PAGES for command in commands(page.read_text())]
    return [(page, command) for page, command in found if command.startswith("subspace ") == ours]


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


def test_commands_of_ours_parse_with_their_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shown = of_pages(ours=True)
    assert len(shown) > 15
    for page, command in shown:
        try:
            _, options = cli.parse(shlex.split(command)[1:])
            if "config" in options and "CONFIG" not in command:
                config_module.read_config(options.config, options.settings)
        except Exception as error:
            raise AssertionError(f"{page}: {command}") from error


def test_files_that_commands_start_are_there() -> None:
    words = [(page, word) for page, command in of_pages(ours=False) for word in shlex.split(command)]
    files = [(page, word) for page, word in words if re.search(r"\.(sh|py|yaml)$", word)]
    assert len(files) > 5
    assert [(page, word) for page, word in files if not (ROOT / word).is_file()] == []


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for link in re.findall(
            r"\]\((?!https?:|#)([^)#]+)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        ):
            if not (page.parent / link).exists():
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


def test_the_readme_shows_every_verb() -> None:
    shown = {shlex.split(command)[1] for command in commands(README) if command.startswith("subspace ")}
    assert {command.name for command in cli.COMMANDS} <= shown


def test_the_readme_is_short() -> None:
    """But for the study's table, which has a row for each method."""
    before, table, after = parts_of_readme()
    assert len(f"{before}{after}".splitlines()) <= 150
    study = read_study(ROOT / "launch" / "studies" / "methods.yaml")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    assert {method.label for method in study.methods} == {*rows[2:]}


def parts_of_readme() -> tuple[str, str, str]:
    """Return what stands before the study's table, the table, and what stands after it."""
    before, _, rest = README.partition("<!-- study: ")
    return before, *rest.partition("<!-- end of study -->")[::2]


def test_the_readme_shows_the_file_of_lora_in_full() -> None:
    shown = README.partition('```python\nr"""LoRA')[2].partition("```")[0]
    assert f'r"""LoRA{shown}' == (ROOT / "subspace" / "methods" / "lora.py").read_text()


def test_the_picture_is_current() -> None:
    assert draw.PICTURE.read_text() == draw.draw(), "run `python -m tests.architecture.draw`"

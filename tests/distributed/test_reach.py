"""Hosts on which a run cannot start are named, each with what is wrong there, and nothing starts on the others."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from subspace.distributed import launcher
from subspace.distributed.reach import ensure_reachable, find_troubles
from subspace.errors import UserError

#: Stands for ssh: each host is of its own kind. The last two arguments are the host and what its shell is to do.
SSH = """#!/bin/bash
case "${*: -2:1}" in
    good) cd / && exec bash -c "${*: -1}" ;;
    bare) cd / && exec bash -c "cd() { return 1; }; ${*: -1}" ;;
    *) echo "ssh: connect to host ${*: -2:1} port 22: Connection refused" >&2; exit 255 ;;
esac
"""


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, text in (("ssh", SSH), ("pdsh", "#!/bin/bash\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def test_hosts_that_can_be_used_are_let_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a folder with 'quotes' and $HOME"
    folder.mkdir()
    monkeypatch.chdir(folder)
    ensure_reachable(["good"])


def test_every_host_that_cannot_be_used_is_named() -> None:
    with pytest.raises(UserError) as caught:
        ensure_reachable(["good", "bare", "off", "away"])
    said = str(caught.value)
    assert said.startswith(
        f"cannot start on good, bare, off, away: bare has no folder {Path.cwd()}, or no {sys.executable}"
    )
    assert (
        "; ssh cannot reach off: ssh: connect to host off port 22: Connection refused; ssh cannot reach away: " in said
    )
    assert "`ssh off true` must work without a question" in said


@pytest.mark.parametrize("missing", ["ssh", "pdsh"])
def test_programs_that_are_missing_are_named(programs: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    (programs / missing).unlink()
    monkeypatch.setenv("PATH", str(programs))
    (trouble,) = find_troubles(["good"])
    assert trouble.found.startswith(f"{missing}, which reach")
    assert trouble.advice.startswith(f"apt-get install {missing};")


def test_nothing_starts_on_hosts_of_which_one_cannot_be_used(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "supervise", lambda *_: pytest.fail("it was started"))
    (tmp_path / "hostfile").write_text("good slots=2\noff slots=2\n")
    launch = launcher.build_launch(["train", "x.yaml"], hostfile=str(tmp_path / "hostfile"))
    assert launch is not None
    with pytest.raises(UserError, match="cannot reach off"):
        launch.run()

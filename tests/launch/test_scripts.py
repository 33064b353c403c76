"""The shell scripts: they help, print the exact command, make an environment once, and end what they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "launch/recipes/quickstart.yaml"
SCRIPTS = [*ROOT.glob("launch/*.sh"), ROOT / "tests/run.sh", ROOT / "tests/cluster/run.sh"]

pytestmark = pytest.mark.processes


def bash(*arguments: str | Path, cwd: Path | None = None, **environment: Any) -> subprocess.CompletedProcess[str]:
    # This interpreter stands for python3 where a script finds no .venv.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        ["bash", *arguments],
        cwd=cwd,
        env={**inherited, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_is_sound(script: Path) -> None:
    assert bash("-n", script).returncode == 0


@pytest.mark.parametrize("name", ["quickstart", "cluster", "slurm"])
def test_a_script_helps(name: str) -> None:
    helped = bash(f"launch/{name}.sh", "--help")
    assert helped.returncode == 0
    assert f"launch/{name}.sh" in helped.stdout


@pytest.mark.parametrize("name", ["tests/run.sh", "tests/cluster/run.sh"])
def test_a_script_of_the_tests_helps(name: str) -> None:
    assert f"usage: bash {name}" in bash(ROOT / name, "--help").stdout


def test_the_quickstart_refuses_what_it_does_not_know() -> None:
    refused = bash("launch/quickstart.sh", "--fast")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "'--fast'" in refused.stderr


def test_several_machines() -> None:
    printed = bash("launch/cluster.sh", "launch/hostfile.example", "train", RECIPE, "--dry-run").stdout
    assert "-m subspace.distributed.hosts launch --hostfile launch/hostfile.example" in printed
    assert printed.endswith(f"--module subspace train {RECIPE}\n")


FAILS = "echo 'scontrol: error: no configuration' >&2; exit 1"


@pytest.mark.parametrize("scontrol", [FAILS, 'shift 2; [ "$*" = "$SLURM_JOB_NODELIST" ] && printf "%s\\n" $FIRST next'])
@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[01-04,07],other3", "node01"),
        ("gpu-a,gpu-b[2-3]", "gpu-a"),
        ("gpu-node[3,5]", "gpu-node3"),
        ("alone", "alone"),
    ],
)
def test_slurm_prints_its_command(tmp_path: Path, scontrol: str, nodes: str, first: str) -> None:
    """With a scontrol that works, and with one that lies about without a configuration."""
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\n{scontrol}\n")
    (tmp_path / "scontrol").chmod(0o755)
    job: dict[str, Any] = {
        "SLURM_JOB_ID": "20007",
        "SLURM_JOB_NODELIST": nodes,
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "8",
        "FIRST": first,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }
    printed = bash("launch/slurm.sh", "train", RECIPE, "--dry-run", **job).stdout
    assert printed.startswith(
        f"env MASTER_ADDR={first} MASTER_PORT=20007 LOCAL_SIZE=8 srun --nodes=2 --ntasks-per-node=8 "
        # Otherwise srun ends the others at once, with a status of its own.
        "--kill-on-bad-exit=0 --wait=60 "
    )
    assert printed.rstrip().endswith(f"-m subspace train {RECIPE}")


def test_slurm_needs_a_job() -> None:
    refused = bash("launch/slurm.sh", "train", RECIPE)
    assert refused.returncode == 2
    assert "not a SLURM job" in refused.stderr


def test_slurm_tells_every_rank_who_it_is(tmp_path: Path) -> None:
    """With a stand-in for srun that runs task 3 of 4, the command of that task sees what a launcher would set."""
    srun = tmp_path / "srun"
    srun.write_text(
        '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\n'
        'export SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4\nexec "$@"\n'
    )
    python = tmp_path / "python3"
    python.write_text('#!/bin/bash\necho "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_SIZE $MASTER_ADDR $*"\n')
    for program in (srun, python):
        program.chmod(0o755)
    job: dict[str, Any] = {
        "SLURM_JOB_ID": "5",
        "SLURM_JOB_NODELIST": "a,b",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    # Away from the repository, where there is no .venv.
    ran = bash(
        ROOT / "launch/slurm.sh", "train", "x.yaml", cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", **job
    )
    assert ran.stdout == "3 1 4 2 a -m subspace train x.yaml\n"


SUPERVISES = """
set -euo pipefail
. launch/environment.sh
{before}
supervise bash -c 'sleep 60 & echo $!; wait'
echo not reached
"""

# Signals this script once its command runs and before it does anything else: the instant in which it knows no number.
AT_ONCE = """
set -T
trap 'case "$BASH_COMMAND" in
    "\\"\\$@\\""*) begun=1 ;;
    *) if [ -n "${begun:-}" ]; then begun=; sleep 0.3; kill -TERM $$; fi ;;
esac' DEBUG
"""


@pytest.fixture
def supervised(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Yield a script that supervises a command, and its grandchild; end both after the test, whatever it found."""

    def heed_signals() -> None:
        # In the background signals are ignored; a child inherits that, and bash cannot trap what it inherits so.
        for each in (signal.SIGINT, signal.SIGHUP):
            signal.signal(each, signal.SIG_DFL)

    with subprocess.Popen(
        ["bash", "-c", SUPERVISES.replace("{before}", getattr(request, "param", ""))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    ) as script:
        assert script.stdout
        sleeper = int(script.stdout.readline())
        try:
            yield script, sleeper
        finally:
            script.kill()
            with suppress(ProcessLookupError):
                os.kill(sleeper, signal.SIGKILL)


def expect_the_end_of(supervised: tuple[subprocess.Popen[str], int], number: signal.Signals) -> None:
    script, sleeper = supervised
    rest, said = script.communicate(timeout=20)
    assert (script.returncode, rest, said) == (128 + number, "", "stopped\n")
    end = time.monotonic() + 5
    while time.monotonic() < end and psutil.pid_exists(sleeper):
        time.sleep(0.05)
    assert not psutil.pid_exists(sleeper) or psutil.Process(sleeper).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_to_a_script_ends_all(supervised: tuple[subprocess.Popen[str], int], number: signal.Signals) -> None:
    supervised[0].send_signal(number)
    expect_the_end_of(supervised, number)


@pytest.mark.parametrize("supervised", [pytest.param(AT_ONCE, id="SIGTERM")], indirect=True)
def test_a_signal_as_its_command_starts_ends_it(supervised: tuple[subprocess.Popen[str], int]) -> None:
    expect_the_end_of(supervised, signal.SIGTERM)


def test_a_failure_ends_a_script() -> None:
    ended = bash("-c", "set -e; . launch/environment.sh; supervise bash -c 'exit 3'; echo not reached")
    assert (ended.returncode, ended.stdout) == (3, "")


VENV = """#!/bin/bash
[ "$2" = venv ] || exit 0
mkdir -p .venv/bin
printf '#!/bin/bash\\necho "$@" >> calls\\n' > .venv/bin/python
chmod +x .venv/bin/python
"""


def test_an_environment_is_made_once(tmp_path: Path) -> None:
    """With stand-ins for what makes and installs, what is asked for twice is done once, and again when it changes."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "environment.sh").write_text((ROOT / "launch" / "environment.sh").read_text())
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "requirements.txt").write_text("a==1\n")
    (tmp_path / "python3.11").write_text(VENV)
    (tmp_path / "python3.11").chmod(0o755)
    calls = tmp_path / "calls"

    def make() -> str:
        calls.write_text("")
        script = "set -e; . launch/environment.sh; make_environment requirements.txt"
        made = bash("-c", script, cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHON="")
        assert made.returncode == 0, made.stderr
        return calls.read_text()

    assert "install --disable-pip-version-check -r requirements.txt" in make()
    assert make() == ""
    (tmp_path / "requirements.txt").write_text("a==2\n")
    assert "-r requirements.txt" in make()

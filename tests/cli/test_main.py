"""The command: help at once, one message and status 2 for what the user can mend, and no traceback."""

from __future__ import annotations

import ast
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import subspace
from subspace.adapters import catalog as catalogue
from subspace.adapters.registry import list_methods
from subspace.cli import main as cli
from subspace.cli.command import Command, sign_of_life
from subspace.common.paths import recipes_folder
from subspace.common.progress import show_notices, signs
from subspace.config import read_config
from subspace.distributed import launcher, peers
from subspace.distributed.peers import STATUS_FILE
from subspace.errors import UserError
from tests.helpers.tiny_models import tiny

ROOT = Path(__file__).resolve().parents[2]
VERBS = [verb.name for verb in cli.COMMANDS]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.processes
def test_help_comes_at_once() -> None:
    listed = run("-X", "importtime", "-m", "subspace", "--help")
    assert [verb for verb in VERBS if verb not in listed.stdout] == []
    assert "torch" not in listed.stderr


@pytest.mark.processes
def test_a_command_says_what_it_does_before_libraries_load() -> None:
    blocked = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, *more):\n"
        "        if name == 'torch': raise SystemExit(7)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from subspace.cli.main import main\n"
        "main(['train', 'launch/recipes/quickstart.yaml'])"
    )
    said = run("-c", blocked)
    assert said.returncode == 7
    assert said.stderr == "launch/recipes/quickstart.yaml: reading the settings and loading libraries ...\n"


@pytest.mark.parametrize(
    ("launched", "said", "goes_on"),
    [
        ({}, "run.yaml: reading the settings and loading libraries ...\n", True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "run.yaml: reading the settings and loading libraries ...\n", True),
        ({"RANK": "0", "WORLD_SIZE": "2", STATUS_FILE: "status"}, "", True),  # whoever started it has said so
        ({"RANK": "1", "WORLD_SIZE": "2"}, "", False),
    ],
    ids=["alone", "first", "first of ours", "second"],
)
def test_one_process_of_a_run_shows_that_it_goes_on(
    launched: dict[str, str], said: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    started: list[str] = []
    monkeypatch.setattr(signs, "start", started.append)
    monkeypatch.delitem(sys.modules, "torch")
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    show_notices()
    sign_of_life("run.yaml")
    assert capsys.readouterr().err == said
    assert started == ["run.yaml: reading the settings and loading libraries"] * goes_on


def test_what_several_processes_may_say_at_once_is_one_write_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    assert cli.main(["nosuch"]) == 2
    assert [text.count("\n") for text in written] == [1]
    assert written[0].startswith("error: unknown command 'nosuch'")
    assert written[0].endswith("\n")


def test_nothing_prints_on_standard_error() -> None:
    """What print writes there is two writes, between which another process may write."""
    calls = (
        (file, node)
        for file in sorted((ROOT / "subspace").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    )
    given = [
        f"{file.name}:{node.lineno}"
        for file, node in calls
        if any(key.arg == "file" and "stderr" in ast.unparse(key.value) for key in node.keywords)
    ]
    assert given == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_helps_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([verb, "--help"])
    assert f"subspace {verb}" in capsys.readouterr().out.partition("examples:")[2]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_speaks_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([verb, "--help"])
    assert "--json" in capsys.readouterr().out


def test_train_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    told = capsys.readouterr().out
    assert "train.learning_rate=" in told
    assert "orthogonality=" in told


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train"], "required: CONFIG"),
        (["train", "x.yaml", "--proceses", "2"], "Did you mean '--processes'?"),
        (["train", "x.yaml", "--processes", "none"], "'none' is not a whole number above 0"),
        (["train", "no-such.yaml"], "no configuration file 'no-such.yaml'"),
        (["train", "launch/recipes/quickstart.yaml", "train.lr=1"], "train has no setting 'lr'"),
        (["train", "launch/recipes/quickstart.yaml", "engine=none.json"], "no file none.json"),
        (["evaluate", "evaluate.limit=2"], "nothing to score"),
        (["evaluate", "runs/no-such-run"], "is no run's folder"),
        (["merge", "runs/no-such-run", "--out", "x"], "is no run's folder"),
        (["merge", "runs/no-such-run"], "required: --out"),
        (["methods", "lroa"], "Did you mean 'lora'?"),
        (["methods", "lora", "dora"], "was given lora, dora"),
        (["methods", "lora", "rank=4"], "method lora has no setting 'rank'"),
        (["methods", "rnak=4"], "no method has a setting 'rnak'"),
        (["methods", "lora", "r=0"], "sets r to 0, but it must lie in"),
        (["methods", "lora", "--targets", "q_proj"], "need a model to count parameters in, such as --shape llama-7b"),
        (["methods", "lora", "--shape", "lama-7b"], "Did you mean 'llama-7b'?"),
        (["methods", "ssl", "--shape", "llama-7b", "--budget", "9"], "the size of method ssl cannot be chosen"),
        (["methods", "lora", "--shape", "llama-7b", "--targets", "q_prj"], "Did you mean 'q_proj'?"),
        (["prepare", "--source", "hbu"], "Did you mean 'hub'?"),
        (["recipes", "quickstrat"], "Did you mean 'quickstart'?"),
        (["recipes", "--copy"], "without a recipe's name"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert complaint in said.err


def _failing(error: BaseException) -> list[Command]:
    def fail(_: object) -> int:
        raise error

    return [Command("fail", "", "", lambda parser: None, fail)]


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "COMMANDS", _failing(KeyboardInterrupt()))
    assert cli.main(["fail"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "COMMANDS", _failing(OSError(errno.ENOSPC, "No space left on device", "runs/x")))
    assert cli.main(["fail"]) == 2
    assert "'runs/x': no space is left on the disk" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMMANDS", _failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fail"])


def test_a_rank_leaves_a_failure_to_the_one_that_told_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(STATUS_FILE, str(tmp_path / "status"))
    (tmp_path / "status").write_text("2")
    monkeypatch.setattr(cli, "COMMANDS", _failing(ConnectionError()))
    assert cli.main(["fail"]) == 1
    assert capsys.readouterr().err == ""


def test_a_rank_ends_with_the_status_that_another_one_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a stop by a signal it may find only that the first one, which has saved, is gone."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    watch = peers.PeerWatch(1, ["a", "b"], "token")
    watch.reported = 75
    monkeypatch.setattr(peers, "_watch", watch)
    for error in (RuntimeError("Connection closed by peer"), ValueError("x"), UserError("x")):
        monkeypatch.setattr(cli, "COMMANDS", _failing(error))
        assert cli.main(["fail"]) == 75
    assert capsys.readouterr().err == ""


def test_a_dry_run_prints_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "visible_devices", list)
    arguments = ["launch/recipes/quickstart.yaml", "name=x"]
    assert cli.main(["train", *arguments, "--processes", "2", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "-m deepspeed.launcher.launch --world_info=" in printed
    assert printed.endswith(f"--module subspace train {' '.join(arguments)}\n")
    assert cli.main(["train", *arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out == f"{sys.executable} -m subspace train {' '.join(arguments)}\n"


def test_a_rank_refuses_another_number_of_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", "launch/recipes/quickstart.yaml", "--processes", "3", "--local_rank=0"]) == 2
    assert "--processes 3 was given to one of 2 processes" in capsys.readouterr().err


def test_methods_and_constraints_are_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # as wide as the table
    listed = [*list_methods(), "+mpc-o", "+mpc-d", "+mpc-n"]
    assert cli.main(["methods", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in told] == listed
    assert "+mpc-o" in next(entry for entry in told if entry["name"] == "lora")["composes"]
    assert "lora" in told[-1]["composes"]
    assert cli.main(["methods"]) == 0
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert words[2:] == listed  # below the head and its rule


@pytest.mark.parametrize("name", list_methods())
def test_a_method_has_its_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", name]) == 0
    page = capsys.readouterr().out
    assert all(f"  {setting}=" in page for setting in catalogue.method_info(list_methods()[name]).settings)
    assert "arXiv:" in page
    assert ".. math::" in page


def test_trained_numbers_are_counted_in_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama", tmp_path)
    # q (64, 64), k and v (32, 64), up (128, 64), down (64, 128), in 2 layers, at rank 16.
    expected = 2 * 16 * ((64 + 64) + 2 * (32 + 64) + (128 + 64) + (64 + 128))
    assert cli.main(["methods", "lora", "--shape", str(tmp_path)]) == 0
    assert f"lora trains {expected:,} (" in capsys.readouterr().out
    assert cli.main(["methods", "--shape", str(tmp_path)]) == 0
    assert f" {expected:,} (" in capsys.readouterr().out
    shape = ["--shape", str(tmp_path)]

    assert cli.main(["methods", "rslora", *shape, "--targets", "q_proj,k_proj", "v_proj", "--r", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["settings"]["r"], told["settings"]["rslora"]) == (4, True)
    assert told["trained"] == 2 * 4 * ((64 + 64) + 2 * (32 + 64))

    assert cli.main(["methods", "lora+mpc-n", *shape, "--budget", str(expected + 7), "alpha=8"]) == 0
    page = capsys.readouterr().out
    assert "  r=16 " in page
    assert "  constraint=nonlinear " in page
    assert "  alpha=8.0 " in page

    assert cli.main(["methods", *shape, "--budget", str(expected), "--json"]) == 0
    sizes = {e["name"]: e["settings"][e["size_setting"]] for e in json.loads(capsys.readouterr().out)}
    assert set(sizes) == {name for name, method in list_methods().items() if method.size_setting}
    assert sizes["lora"] == 16


def test_published_shapes_are_counted_without_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "dora", "--shape", "llama3-8b", "r=32"]) == 0
    assert "dora trains 57,409,536 (0.71 %) of llama3-8b" in capsys.readouterr().out


@pytest.mark.processes
@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_entry_points_are_verbs(name: str) -> None:
    assert f"usage: subspace {name}" in run(str(ROOT / "launch" / f"{name}.py"), "--help").stdout


@pytest.mark.processes
def test_a_reader_that_leaves_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m subspace methods --json | head -1", shell=True, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[\n", "")


@pytest.mark.processes
def test_sigint_ends_a_verb(tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text(
        "import sys, time\n"
        "from subspace.cli import main as cli\n"
        "from subspace.cli.command import Command\n"
        "def wait(_):\n    print('here', flush=True)\n    time.sleep(60)\n"
        "cli.COMMANDS = [Command('wait', '', '', lambda parser: None, wait)]\n"
        "sys.exit(cli.main(['wait']))\n"
    )
    waiting = subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Where these tests run in the background, SIGINT is ignored, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert waiting.stdout
    waiting.stdout.readline()
    time.sleep(0.1)
    waiting.send_signal(signal.SIGINT)
    _, said = waiting.communicate(timeout=10)
    assert (waiting.returncode, said) == (130, b"error: interrupted\n")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{subspace.__version__}\n"


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "--json"]) == 0
    listed = {recipe["name"]: recipe for recipe in json.loads(capsys.readouterr().out)}
    recipe = listed["llama-7b-dora-r32"]
    assert (recipe["model"], recipe["method"]) == ("huggyllama/llama-7b", "dora")
    assert recipe["about"].startswith("LLaMA-7B, DoRA r 32")
    assert not [name for name in listed if name.startswith("base-")]


def test_a_recipe_is_copied_and_stands_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "llama-7b-dora-r32", "--copy", "mine.yaml"]) == 0
    assert "next: subspace train mine.yaml" in capsys.readouterr().out
    recipe = read_config(recipes_folder() / "llama-7b-dora-r32.yaml", ["name=mine"])
    assert read_config("mine.yaml") == recipe
    before = Path("mine.yaml").read_text()
    assert before.startswith("# LLaMA-7B, DoRA r 32")
    assert cli.main(["recipes", "llama-7b-dora-r8", "--copy", "mine.yaml"]) == 2
    assert "mine.yaml already exists" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == before

"""``subspace train``: train adapters."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from subspace.cli.command import (
    Command,
    count,
    json_argument,
    launch_arguments,
    launch_or_none,
    say,
    settings_manual,
    sign_of_life,
)
from subspace.common.host_memory import manage_malloc
from subspace.common.locks import in_use
from subspace.distributed import launcher


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="CONFIG|key=value",
        help="files of further runs of the same base, to be trained together; settings instead of the files'",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the run's newest checkpoint, or start if there is none"
    )
    parser.add_argument(
        "--until", type=count, metavar="STEP", help="pause after this step of the run, with a checkpoint to resume from"
    )
    launch_arguments(parser)
    json_argument(parser)


def _run(options: argparse.Namespace) -> int:
    sign_of_life(options.config)
    with launcher.stopping_at_signal():
        return _train(options)


def _train(options: argparse.Namespace) -> int:
    if launcher.under_launcher():
        launcher.init_rank_env()
    from subspace import config as config_module
    from subspace.distributed.collectives import is_main, shutdown
    from subspace.distributed.deepspeed_config import read_engine_file
    from subspace.resumption import ensure_new_run_dir, is_finished
    from subspace.run import train_runs

    files, settings = _sorted([options.config, *options.settings])
    configs = [config_module.read_config(file, settings) for file in files]
    unfinished = []
    for config in configs:
        # Raise errors that need no model before any process starts.
        read_engine_file(config.engine)
        # Each rank looks again, the first one under the lock that it keeps.
        with nullcontext() if launcher.under_launcher() or options.dry_run else in_use(config.folder):
            if options.resume and is_finished(config):
                say(f"{config.folder} is finished: there is nothing left to train", file=sys.stderr)
                continue
            unfinished.append(config)
            if not options.resume:
                ensure_new_run_dir(config.folder)
    how = [*(["--resume"] if options.resume else []), *(["--until", str(options.until)] if options.until else [])]
    status = launch_or_none(options, ["train", options.config, *options.settings, *how]) if unfinished else None
    if status is not None:
        return status
    launcher.init_rank_env()
    manage_malloc()
    if unfinished:
        train_runs(unfinished, resume=options.resume, until=options.until)
    if is_main():
        for config in configs:
            _report(config.folder, options)
    shutdown()
    launcher.write_success_marker()
    return 0


def _sorted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files and the settings among a command's words; the first is a file."""
    first, *rest = words
    settings = [word for word in rest if "=" in word or not (word.endswith((".yaml", ".yml")) or Path(word).is_file())]
    return [first, *(word for word in rest if word not in settings)], settings


def _report(folder: Path, options: argparse.Namespace) -> None:
    """Say how a run has ended."""
    from subspace.training.checkpoint import read_environment

    outcome = read_environment(folder).get("outcome")
    if options.json:
        say(json.dumps({"run": str(folder), **(outcome or {"paused": options.until})}))
    elif outcome is None:
        say(f"paused: {folder} has a checkpoint of step {options.until}, and goes on with --resume")
    else:
        say(f"{outcome['steps']} steps, last loss {outcome['loss']:.4f}, {outcome['seconds'] / 60:.1f} min")
        say(f"adapter: {folder / 'adapter'}")
        say(f"next: subspace evaluate {folder}")


COMMAND = Command(
    "train",
    "train adapters from a configuration",
    """examples:
  subspace train launch/recipes/quickstart.yaml
  subspace train launch/recipes/quickstart.yaml method=dora train.learning_rate=1e-4 name=dora
  subspace train launch/recipes/quickstart.yaml --processes 2 --dry-run
  subspace train launch/recipes/quickstart.yaml --resume   after it was stopped or killed
  subspace train a.yaml b.yaml c.yaml train.steps=100       runs of one base, trained together
  subspace train launch/recipes/quickstart.yaml --until 20 to look at it there; --resume goes on
  deepspeed --num_gpus 2 launch/train.py launch/recipes/quickstart.yaml        the same run""",
    _arguments,
    _run,
    settings_manual,
)

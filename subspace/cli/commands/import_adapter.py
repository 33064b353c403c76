"""``subspace import``: make a run of an adapter that another library wrote."""

from __future__ import annotations

import argparse
import json

from subspace.cli.command import Command, json_argument, say, sign_of_life


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder of HF PEFT's, or its name on the hub")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the run, such as name=mine")
    json_argument(parser)


def _run(options: argparse.Namespace) -> int:
    sign_of_life(options.adapter)
    from subspace.integrations.peft.runs import import_run

    imported = import_run(options.adapter, options.settings)
    say(json.dumps(imported._asdict()) if options.json else str(imported))
    return 0


COMMAND = Command(
    "import",
    "make a run of an adapter of HF PEFT, to be scored, compared and merged as any other",
    """examples:
  subspace import peft-folder                              the base is the one that its adapter_config.json names
  subspace import someone/their-adapter@main name=theirs
  subspace import peft-folder model.path=smollm2-135m data.mixture=commonsense    what it was trained on, if you know
  subspace evaluate runs/peft-folder
  subspace train mine.yaml train.start_from=runs/peft-folder    further, with its method, sizes and targets

Types LORA (rsLoRA, DoRA, patterns of ranks too), ADALORA, IA3, PROMPT_TUNING, P_TUNING, and the DoRA authors' own.""",
    _arguments,
    _run,
)

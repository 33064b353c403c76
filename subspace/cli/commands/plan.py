"""``subspace plan``: estimate a run's memory, disk and time before it starts."""

from __future__ import annotations

import argparse
import json

from subspace.cli.command import Command, count, json_argument, say, settings_manual, sign_of_life
from subspace.errors import UserError


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings instead of the file's")
    parser.add_argument(
        "--processes", type=count, default=1, metavar="N", help="number of processes of the run; default: 1"
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="also find the largest micro-batch that fits a device of this size, such as 24GB",
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="plan for this GPU, which need not be here, such as h100-80gb (data/devices.yaml), or for a size, as 24gb",
    )
    parser.add_argument(
        "--verify", action="store_true", help="train three steps and show the measured values beside the estimate"
    )
    json_argument(parser)


def _run(options: argparse.Namespace) -> int:
    sign_of_life(options.config)
    from subspace import config as config_module
    from subspace.planning import devices, plan, verification

    memory = devices.parse_size(options.memory) if options.memory else None
    on = devices.find_device(options.device) if options.device else None
    if options.verify and on:
        raise UserError(
            f"--verify trains three steps here, but --device {options.device} plans for another machine. Leave out one"
        )
    config = config_module.read_config(options.config, options.settings)
    found: plan.Plan | verification.VerifiedPlan
    if options.verify:
        found = verification.verify_plan(options.config, options.settings, processes=options.processes)
    else:
        found = plan.build_plan(config, processes=options.processes, memory=memory, on=on)
    say(json.dumps(found.as_dict(), indent=2) if options.json else "\n".join(found.lines()))
    return 0


COMMAND = Command(
    "plan",
    "estimate a run before loading anything: memory by part, disk, steps, time",
    """examples:
  subspace plan launch/recipes/quickstart.yaml
  subspace plan launch/recipes/llama-7b-lora-r32.yaml model.quantize=nf4 --memory 24GB
  subspace plan launch/recipes/llama-7b-lora-r32.yaml --device h100-80gb --processes 8
  subspace plan launch/recipes/quickstart.yaml engine=ds_configs/zero3.json --processes 2
  subspace plan launch/recipes/quickstart.yaml train.micro_batch_size=4 --verify""",
    _arguments,
    _run,
    settings_manual,
)

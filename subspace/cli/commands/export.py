"""``subspace export``: write a run's adapter as another library reads it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from subspace.cli.command import Command, json_argument, say, sign_of_life


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings instead of the run's")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--base", metavar="NAME", help="what to call the base model; default: its name on the hub, or its folder's"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the tensors")
    json_argument(parser)


def _run(options: argparse.Namespace) -> int:
    sign_of_life(options.run)
    from subspace.integrations.peft.runs import export_run

    out = Path(options.out)
    config = export_run(Path(options.run), out, base=options.base, dtype=options.dtype, overrides=options.settings)
    if options.json:
        say(json.dumps({"folder": str(out), **config}))
    else:
        say(f"HF PEFT's {config['peft_type']} on {config['base_model_name_or_path']}\nexported: {out}")
    return 0


COMMAND = Command(
    "export",
    "write a run's adapter as HF PEFT's: for PEFT, vLLM and other servers, the hub",
    """examples:
  subspace export runs/quickstart --out peft
  subspace export runs/quickstart --out peft --base HuggingFaceTB/SmolLM2-135M-Instruct --dtype bfloat16
  hf upload me/quickstart peft                             then anyone loads it by that name

LoRA, DoRA and every method whose update is a product of two factors (PiSSA, AdaLoRA, LoRA-Dash, ...), IA3, SSL and
prompts have an equal in PEFT. For others: subspace merge.""",
    _arguments,
    _run,
)

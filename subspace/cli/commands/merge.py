"""``subspace merge``: export base model and adapter as one plain model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from subspace.cli.command import Command, json_argument, say, sign_of_life
from subspace.common.host_memory import manage_malloc
from subspace.common.locks import in_use


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings instead of the run's")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: the run's"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="A", help="a share of the update, from 0 (the base) to 1 (default)"
    )
    parser.add_argument(
        "--as-trained", action="store_true", help="merge into the dequantised weights of a quantised base"
    )
    json_argument(parser)


def _run(options: argparse.Namespace) -> int:
    sign_of_life(options.run)
    from subspace import config as config_module
    from subspace.adapters.export import export_merged

    run, out = config_module.read_run_subject(Path(options.run), options.settings), Path(options.out)
    assert run.adapter
    manage_malloc()
    # The run's, which a training may be replacing; and the new one's, beside it, because it is not to be there yet.
    with in_use(run.folder, reads=True), in_use(out.with_name(f".{out.name}.merging")):
        report = export_merged(
            run.model, run.adapter, out, dtype=options.dtype, as_trained=options.as_trained, scale=options.scale
        )
    say(json.dumps({"folder": str(out), **dataclasses.asdict(report)}) if options.json else f"{report}\nmerged: {out}")
    return 0


COMMAND = Command(
    "merge",
    "write base model and adapter as one plain Hugging Face folder, verified to give equal outputs",
    """examples:
  subspace merge runs/quickstart --out merged
  subspace merge runs/quickstart --out merged --dtype float32
  subspace merge runs/quickstart --out half --scale 0.5      halfway back to the base""",
    _arguments,
    _run,
)

"""Trains what it is told in the processes that a launcher started; tests/distributed/test_zero.py reads the runs."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from subspace import config as config_module
from subspace.distributed.collectives import shutdown
from subspace.distributed.engine import init_distributed
from subspace.kernels import cross_entropy as loss
from subspace.run import train_run


def main() -> None:
    """Train each of the runs that the file lists: the arguments of ``config.read``, and whether it is resumed.

    A second argument is how many logits the loss holds at once; so it comes in parts with models as small as these.
    """
    if len(sys.argv) > 2:
        loss.MAX_LOGITS = int(sys.argv[2])
    init_distributed(minutes=5)
    for file, overrides, *resume in json.loads(Path(sys.argv[1]).read_text()):
        train_run(config_module.read_config(file, overrides), resume=any(resume))
        gc.freeze()  # what is imported by now, so that the engines' full collections are short
    shutdown()


if __name__ == "__main__":
    main()

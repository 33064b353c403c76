"""Kill a random rank of a training at random moments, again and again; what it ends with must be the undisturbed run's.

    python -m tests.bench.soak                        20 kills, every other one while a checkpoint is being written
    python -m tests.bench.soak --kills 5 --seed 1

It trains a tiny model in two processes under ZeRO-2 (AdaLoRA, whose schedule has a memory, with accumulation). Each
life is killed (SIGKILL) some steps after it began, and the next goes on by ``--resume``. The ranks are forked from a
process that has imported everything, which is all that differs from ranks that a launcher starts. Prints a JSON line;
status 1 if the adapters differ by a byte, or the logs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

from subspace import run  # noqa: F401  (what the ranks will need is imported once)
from subspace.adapters.serialization import TENSORS
from subspace.cli import main as cli
from subspace.distributed import launcher
from subspace.distributed.peers import STATUS_FILE
from tests.helpers.material import logged, make_material

RANKS = 2
SETTINGS = ["method=adalora", "method.every=2", "train.micro_batch_size=2", "train.save_every=2"]
STEPS_A_LIFE = 4


class Life:
    """The ranks of a run, from a start to a kill or to the run's end."""

    def __init__(self, material: Path, name: str, steps: int) -> None:
        root = material.parent
        settings = [f"runs={root}", f"name={name}", f"train.steps={steps}", f"engine={root / 'zero2.json'}"]
        self.folder, port = root / name, str(launcher.free_port())
        self.ranks: list[int] = []  # process numbers
        for rank in range(RANKS):
            if pid := os.fork():
                self.ranks.append(pid)
                continue
            log = os.open(root / f"said-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_SIZE=str(RANKS))
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, STATUS_FILE: str(root / "status")})
            os._exit(cli.main(["train", str(material), *settings, *SETTINGS, "--resume"]))

    def step(self) -> int:
        """Return the last step that the log tells of."""
        try:
            return int(logged(self.folder, "step")[-1])
        except (OSError, ValueError, IndexError):
            return 0

    def is_saving(self) -> bool:
        """Tell whether a checkpoint is being written."""
        return any((self.folder / "checkpoints").glob("*.partial"))

    def kill(self, draw: random.Random, *, saving: bool) -> bool:
        """Wait for a few more steps, or then for a save, and kill a rank; tell whether a save was under way."""
        wanted = self.step() + draw.randint(1, STEPS_A_LIFE)
        while self.step() < wanted:
            self.check()
            time.sleep(0.01)
        if not saving:
            time.sleep(draw.random() / 10)
        while saving and not self.is_saving():
            self.check()
        victim = draw.choice(self.ranks)
        os.kill(victim, signal.SIGKILL)
        caught = self.is_saving()
        os.waitpid(victim, 0)
        self.ranks.remove(victim)
        for pid in self.ranks:  # as DeepSpeed's launcher does once it has noticed
            os.kill(pid, signal.SIGTERM)
        self.wait()
        return caught

    def check(self) -> None:
        """Stop everything if a rank has ended by itself."""
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            raise SystemExit(f"a rank ended by itself: {(self.folder.parent / 'said-0.txt').read_text()[-3000:]}")

    def wait(self) -> list[int]:
        """Wait for all ranks and return their statuses."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.ranks]


def main() -> int:
    """Train twice, once with kills, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, began = random.Random(options.seed), time.monotonic()
    steps = (options.kills + 1) * (STEPS_A_LIFE + 4)

    with tempfile.TemporaryDirectory(prefix="subspace-soak-") as root:
        material = make_material(Path(root))
        whole = Life(material, "whole", steps)
        assert whole.wait() == [0] * RANKS, (Path(root) / "said-0.txt").read_text()[-3000:]
        during_saves = 0
        for number in range(options.kills):
            life = Life(material, "killed", steps)
            during_saves += life.kill(draw, saving=number % 2 == 1)
            print(f"kill {number + 1} at step {life.step()}", file=sys.stderr, flush=True)
        last = Life(material, "killed", steps)
        said = [(Path(root) / f"said-{rank}.txt") for rank in range(RANKS)]
        assert last.wait() == [0] * RANKS, said[0].read_text()[-3000:]

        folders = [whole.folder, last.folder]
        outcome = {
            "steps": steps,
            "kills": options.kills,
            "during_saves": during_saves,
            "damaged_checkpoints_found": said[0].read_text().count("cannot be used"),
            "same_adapter": len({(folder / "adapter" / TENSORS).read_bytes() for folder in folders}) == 1,
            "same_log": logged(folders[0]) == logged(folders[1]),
            "tracebacks": sum(file.read_text().count("Traceback") for file in said),
            "minutes": round((time.monotonic() - began) / 60, 1),
        }
    print(json.dumps(outcome))
    return 0 if outcome["same_adapter"] and outcome["same_log"] else 1


if __name__ == "__main__":
    sys.exit(main())

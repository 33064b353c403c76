"""Half an hour of a GPU: does everything run there, is it right, and how fast is it?

    python tests/gpu/check.py                          on the first GPU; outcomes in runs/gpu
    python tests/gpu/check.py --steps 1,2 --minutes 10
    python tests/gpu/check.py --device cpu --tiny      the same in small, to see that the check itself works
    python tests/gpu/check.py --again failed           those that failed, after a repair

Needs Python 3.11 or newer, torch and the project's other packages, in the environment or in a folder of PYTHONPATH
(tests/gpu/carry.sh fills one); no network, no installed project, no prepared data. Four steps, the most informative
first, each under ten minutes. Every item is a process of its own with a time limit, and what it finds is written at
once: OUT/check.json and OUT/report.md after each item, OUT/items/NAME.jsonl after each case, what was printed in
OUT/logs; OUT/work holds models and runs, 14 GB, until everything has passed. Started again, it goes on where it was.
Status 0 if all passed or was left out for a reason, 1 if something failed or did not end, 2 if there is no such device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # started as a file, whose folder stands first on the path
    sys.path[0] = str(REPOSITORY)

from tests.gpu.cases import POISONED, end_case, read_cases, unfinished_case
from tests.gpu.items import ITEMS, STEPS, Item
from tests.gpu.report import write_report

Json = dict[str, Any]
#: What a launcher, a batch system or a test may have set.
NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
#: Seconds of an item with tiny shapes, where a loaded machine or a compiler may take longer than with true ones.
TINY_SECONDS = 1200


class Run:
    """A check under way: what is asked for, and what was found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + 60 * options.minutes
        self.found: Json = {"device": options.device, "tiny": options.tiny, "items": {}}
        file = self.out / "check.json"
        if file.exists():
            before = json.loads(file.read_text())
            if (before["device"], before["tiny"]) != (options.device, options.tiny):
                raise SystemExit(
                    f"{self.out} holds a check of {before['device']}{' with tiny shapes' * before['tiny']}. "
                    "Give this one another folder: --out DIR"
                )
            self.found = before

    def selected(self) -> list[Item]:
        """Return the items that are asked for, with those whose files they read."""
        wanted = {item.name for item in ITEMS if item.step in self.options.steps}
        if self.options.items:
            wanted = set(self.options.items)
        if self.options.device == "cuda" and "machine" not in self.found["items"]:
            wanted.add("machine")  # which finds out whether there is a device at all
        for item in reversed(ITEMS):
            if item.name in wanted:
                wanted |= set(item.after)
        return [item for item in ITEMS if item.name in wanted]

    def all(self) -> int:
        """Run what is not done, and return the check's status."""
        for item in self.selected():
            before = self.found["items"].get(item.name)
            again = self.options.again == "all" or (self.options.again == "failed" and failed(before))
            if before and not again:
                continue
            if self.end - time.monotonic() < 5:
                print(f"{item.name}: no time is left; started again, the check goes on here", flush=True)
                self.write()
                return 1
            if again:
                self.file(item).unlink(missing_ok=True)
            self.one(item)
            if item.name == "machine" and not self.has_device():
                del self.found["items"]["machine"]
                self.file(item).unlink()
                self.write()
                return 2
        self.write()
        if not any(failed(self.found["items"].get(item.name)) for item in ITEMS):
            shutil.rmtree(self.out / "work", ignore_errors=True)  # a model of 13.5 GB among it
        return 1 if any(failed(self.found["items"].get(item.name)) for item in self.selected()) else 0

    def one(self, item: Item) -> None:
        """Run an item in as many processes as it takes, until its cases have ended or its time is up."""
        began = time.monotonic()
        limit = TINY_SECONDS if self.options.tiny else item.seconds
        end = min(began + limit, self.end)
        print(f"{item.step} {item.name:<15} {item.title} ...", flush=True)
        self.file(item).parent.mkdir(parents=True, exist_ok=True)
        status, progress = None, -1
        while True:
            cases = read_cases(self.file(item))
            if status == 0 or len(cases) == progress or time.monotonic() > end:
                break
            progress = len(cases)
            status = self.process(item, end)
            why = "it took too long" if status is None else f"its process ended with status {status}"
            if status not in (0, POISONED) and (case := unfinished_case(self.file(item))):
                end_case(self.file(item), case, f"{why}: {self.last_words(item)}")
        outcome: Json = {"step": item.step, "title": item.title, "seconds": round(time.monotonic() - began, 1)}
        outcome["ended"] = status == 0
        outcome["cases"] = read_cases(self.file(item))
        if status != 0:
            outcome["error"] = self.last_words(item)
        self.found["items"][item.name] = outcome
        self.write()
        counts = [case["status"] for case in outcome["cases"].values()]
        told = ", ".join(f"{counts.count(kind)} {kind}" for kind in ("passed", "failed", "left out") if kind in counts)
        print(f"  {told or 'nothing'}{'' if status == 0 else ', did not end'}, {outcome['seconds']} s", flush=True)

    def process(self, item: Item, end: float) -> int | None:
        """Run an item's process until it ends or the time comes; return its status, None if it was ended."""
        device = "cpu" if item.on_cpu else self.options.device
        command = [sys.executable, "-m", "tests.gpu", item.name, "--out", str(self.out), "--device", device]
        self.log(item).parent.mkdir(parents=True, exist_ok=True)
        with self.log(item).open("a") as log:
            started = subprocess.Popen(
                command + ["--tiny"] * self.options.tiny, cwd=self.out, env=self.environment(device),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            try:
                return started.wait(timeout=max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                return None
            finally:  # also processes that it started, and when this one is interrupted
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(started.pid, signal.SIGKILL)
                started.wait()

    def environment(self, device: str) -> dict[str, str]:
        """Return an environment in which nothing is inherited that would change what is found."""
        inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        given = filter(None, inherited.get("PYTHONPATH", "").split(os.pathsep))
        path = os.pathsep.join([str(REPOSITORY), *map(os.path.abspath, given)])  # items have another working folder
        own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        own |= {"SUBSPACE_CACHE": str(self.out / "work" / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
        own |= {"DS_ENV_FILE": "no-such-deepspeed-env", "PYTHONFAULTHANDLER": "1"}
        return {**inherited, **own, **({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})}

    def has_device(self) -> bool:
        """Tell whether the first item has seen the device that is asked for; say so if not."""
        case = self.found["items"]["machine"]["cases"].get("device", {})
        if self.options.device == "cpu" or case.get("status") == "passed":
            return True
        print(f"there is no CUDA device: {case.get('error', 'see ' + str(self.out / 'logs/machine.txt'))}")
        print("The same on a CPU, in small: python tests/gpu/check.py --device cpu --tiny --out DIR")
        return False

    def file(self, item: Item) -> Path:
        """Return the file of an item's cases."""
        return self.out / "items" / f"{item.name}.jsonl"

    def log(self, item: Item) -> Path:
        """Return the file of what an item's processes print."""
        return self.out / "logs" / f"{item.name}.txt"

    def last_words(self, item: Item) -> str:
        """Return the end of what an item's processes printed."""
        return self.log(item).read_text(errors="replace")[-1500:].strip()

    def write(self) -> None:
        """Write what was found, whole or not at all, and the report of it."""
        partial = self.out / "check.json.partial"
        partial.write_text(json.dumps(self.found, indent=1) + "\n")
        partial.replace(self.out / "check.json")
        write_report(self.found, self.out / "report.md")


def failed(outcome: Json | None) -> bool:
    """Tell whether an item, or one of its cases, failed or was not run."""
    if outcome is None or not outcome["ended"]:
        return True
    return any(case["status"] == "failed" for case in outcome["cases"].values())


def main(arguments: list[str] | None = None) -> int:
    """Run the check and return its status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "gpu", help="folder of the outcomes")
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="some of the steps, as 1,2")
    parser.add_argument("--items", type=lambda text: text.split(","), help="some of the items instead, as train,nf4")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to check the check")
    parser.add_argument("--minutes", type=float, default=30.0, help="of all items together")
    parser.add_argument(
        "--again", nargs="?", const="all", choices=("all", "failed"), help="run them again, or those that failed"
    )
    options = parser.parse_args(arguments)
    try:
        options.steps = [int(step) for step in options.steps.split(",")]
    except ValueError:
        parser.error(f"--steps {options.steps}: the steps are {', '.join(map(str, STEPS))}")
    if unknown := [step for step in options.steps if step not in STEPS]:
        parser.error(f"--steps: there is no step {unknown[0]}; the steps are {', '.join(map(str, STEPS))}")
    names = [item.name for item in ITEMS]
    if unknown_items := [name for name in options.items or [] if name not in names]:
        parser.error(f"--items: there is no item '{unknown_items[0]}'; the items are {', '.join(names)}")
    run = Run(options)
    status = run.all()
    print(f"{run.out / 'report.md'}")
    return status


if __name__ == "__main__":
    sys.exit(main())

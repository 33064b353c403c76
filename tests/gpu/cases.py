"""The cases of an item: run one by one, with a line of JSON before and after each.

A case that fails does not end the others. After an error of the device, which stays with a process for good, this one
ends with status 3, and check.py starts another for the cases that are left.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.items import Item

Figures = dict[str, Any]

POISONED = 3
#: Words of errors after which nothing on the device works any more in a process.
POISONS = ("CUDA error", "device-side assert", "cublas", "cudnn", "illegal memory access", "unspecified launch failure")
LONGEST = 3000  # characters of an error that are kept


class LeftOut(Exception):
    """A case that this machine, or these versions, cannot show; its text says why."""


class Missed(Exception):
    """A case whose outcome is wrong; its figures are kept."""

    def __init__(self, why: str, **figures: Any) -> None:
        super().__init__(why)
        self.figures = figures


@dataclass
class Check:
    """What an item is told, and the record of its cases."""

    item: Item
    out: Path
    device: str
    tiny: bool

    def __post_init__(self) -> None:
        self.file = self.out / "items" / f"{self.item.name}.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.done = set(read_cases(self.file))
        self.root.mkdir(parents=True, exist_ok=True)

    @property
    def root(self) -> Path:
        """A folder for what it makes."""
        return self.folder(self.item.name)

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return self.device == "cuda"

    def folder(self, item: str) -> Path:
        """Return the folder of what an item makes."""
        return self.out / "work" / item

    def case(self, name: str, function: Callable[..., Figures | None], *arguments: Any, **named: Any) -> None:
        """Run a case, unless it was run before, and record what it returns or how it fails."""
        if name in self.done:
            return
        self._write({"case": name, "status": "began"})
        began, poisoned = time.perf_counter(), False
        outcome: Figures = {}
        try:
            outcome = {"status": "passed", "figures": function(*arguments, **named) or {}}
        except LeftOut as reason:
            outcome = {"status": "left out", "error": str(reason)}
        except Missed as missed:
            outcome = {"status": "failed", "figures": missed.figures, "error": str(missed)}
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            text = "".join(traceback.format_exception(error))
            outcome = {"status": "failed", "error": f"{type(error).__name__}: {error}", "trace": text[-LONGEST:]}
            poisoned = is_poison(error)
        self._write({"case": name, **outcome, "seconds": round(time.perf_counter() - began, 2)})
        self.done.add(name)
        if poisoned:
            print(f"{name}: the device can no longer be used by this process", file=sys.stderr, flush=True)
            os._exit(POISONED)  # also where destructors would wait for the device

    def _write(self, line: Figures) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")


def is_poison(error: BaseException) -> bool:
    """Tell whether an error is one of the device that stays; running out of memory is not."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in text:
        return False
    return type(error).__name__ == "AcceleratorError" or any(word.lower() in text for word in POISONS)


def read_cases(file: Path) -> dict[str, Figures]:
    """Return the outcomes in an item's file by case; what only began is not among them."""
    return {line["case"]: line for line in _lines(file) if line["status"] != "began"}


def unfinished_case(file: Path) -> str | None:
    """Return the case that began last, if it has no outcome."""
    last = _lines(file)[-1:]
    return last[0]["case"] if last and last[0]["status"] == "began" else None


def end_case(file: Path, case: str, error: str) -> None:
    """Record that a case ended its process."""
    with file.open("a") as opened:
        opened.write(json.dumps({"case": case, "status": "failed", "error": error}) + "\n")


def _lines(file: Path) -> list[Figures]:
    found = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:  # a line that a killed process did not finish
            continue
    return found

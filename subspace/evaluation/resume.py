"""What of a task is scored already, so that a scoring that was killed goes on where it was.

Each process appends the batches that it has scored to a file of its own next to the task's, and the next scoring reads
all of them, whichever processes wrote them and however many there are now. A line that the kill tore is thrown away.
Batches are kept whole and are cut as they were, so the file of items at the end is the one of an undisturbed scoring.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from subspace.common.files import write_file
from subspace.distributed.collectives import barrier, broadcast_object, gather_objects, is_main, rank, world_size
from subspace.evaluation.records import ItemRecord


class ResumableResults:
    """The items of a task that are scored, in files next to ``file`` (None: nowhere). All ranks use it alike.

    Args:
        file: where the task's items will be when all are scored.
        key: of everything that the records depend on; what was kept under another one is thrown away.
        budget: tokens of a batch, or None for those of what was kept, else ``default``.
        default: tokens of a batch where nothing else says how many.
    """

    def __init__(self, file: Path | None, key: str, budget: int | None, default: int) -> None:
        self.file = file
        self.handle: IO[str] | None = None
        self.records: dict[int, ItemRecord] = {}
        kept = list(self._read(key, budget)) if file else []
        found = [one for ranks in gather_objects(kept) for one in ranks]
        wanted = budget or (found[0][0] if found else default)
        self.budget: int = broadcast_object(wanted)
        for size, records in found:
            if size == self.budget:
                self.records.update(records)
        if file:
            self._start(key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.handle:
            self.handle.close()

    def add(self, numbers: Sequence[int], records: Iterable[ItemRecord]) -> None:
        """Keep a batch that this process has scored."""
        new = dict(zip(numbers, records, strict=True))
        self.records.update(new)
        if self.handle:
            self.handle.write("".join(map(_line, new.items())))
            self.handle.flush()

    def gather(self) -> None:
        """Bring what all processes have scored together, on each of them."""
        for others in gather_objects(self.records):
            self.records.update(others)

    def remove(self) -> None:
        """Take the files away, once the task's own file is written."""
        if self.handle:
            self.handle.close()
            barrier()
        if not self.file:
            return
        # The first process takes away what others left, too: an earlier scoring may have had more processes.
        for file in self._files() if is_main() else [_own(self.file, rank())]:
            file.unlink(missing_ok=True)

    def _read(self, key: str, budget: int | None) -> Iterator[tuple[int, dict[int, ItemRecord]]]:
        for file in self._files():
            head, *lines = [line for line in _lines(file) if line is not None] or [None]
            if isinstance(head, dict) and head.get("key") == key and budget in (None, head["budget"]):
                yield head["budget"], dict(lines)

    def _start(self, key: str) -> None:
        """Begin this process's file anew, without torn lines. The first process's takes over what all files held."""
        assert self.file
        own = _own(self.file, rank())
        known = self.records if is_main() else {}
        text = "".join(map(_line, [{"key": key, "budget": self.budget}, *known.items()]))
        if is_main():
            write_file(own, text)
            for file in {*self._files()} - {_own(self.file, other) for other in range(world_size())}:
                file.unlink(missing_ok=True)
        barrier()
        if not is_main():  # only now: the first process has on the disk what this file held
            write_file(own, text)
        self.handle = own.open("a", encoding="utf-8")

    def _files(self) -> list[Path]:
        return sorted(self.file.parent.glob(f"{self.file.name}.partial-*")) if self.file else []


def _own(file: Path, number: int) -> Path:
    return file.with_name(f"{file.name}.partial-{number}")


def _line(value: Any) -> str:
    return f"{json.dumps(value, ensure_ascii=False)}\n"


def _lines(file: Path) -> Iterator[Any]:
    """Yield what a file's whole lines hold, and None for one that is torn."""
    with contextlib.suppress(OSError):
        for line in file.read_bytes().split(b"\n"):
            try:
                yield json.loads(line) if line else None
            except ValueError:
                yield None

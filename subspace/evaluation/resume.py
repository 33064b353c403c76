"""Partial results on disk, from which an interrupted scoring resumes.

Each process appends the batches that it has scored to a file of its own next to the task's, and the next scoring reads
all of these files, whatever the number of processes then and now. An incomplete last line is discarded. Only complete
batches are stored, and batches are planned as before, so the final file equals that of an uninterrupted scoring.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from subspace.common.files import open_log, write_file
from subspace.common.foreign.text import MOST_RESULT_BYTES, read_bytes
from subspace.distributed.collectives import barrier, broadcast_object, gather_objects, is_main, rank, world_size
from subspace.errors import UserError
from subspace.evaluation.records import ItemRecord


class ResumableResults:
    """Scored items of a task, stored in files next to ``file``. Collective: all ranks use it alike.

    Args:
        file: path of the task's final items file; None stores nothing.
        key: checksum of everything that the records depend on; stored records with another key are discarded.
        budget: tokens of a batch; None for the budget of the stored records, or else ``default``.
        default: tokens of a batch if there are no stored records.
        fits: returns True for what is a record of the item of a number; others are discarded.
    """

    def __init__(
        self, file: Path | None, key: str, budget: int | None, default: int, fits: Callable[[int, Any], bool]
    ) -> None:
        self.file, self.fits = file, fits
        self.handle: IO[str] | None = None
        self.records: dict[int, ItemRecord] = {}
        readable = list(self._read(key, budget)) if file else []
        stored = [part for parts in gather_objects(readable) for part in parts]
        self.budget: int = broadcast_object(budget or (stored[0][0] if stored else default))
        for stored_budget, records in stored:
            if stored_budget == self.budget:
                self.records.update(records)
        if file:
            self._start(key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.handle:
            self.handle.close()

    def add(self, numbers: Sequence[int], records: Iterable[ItemRecord]) -> None:
        """Store the records of a batch that this process has scored."""
        new = dict(zip(numbers, records, strict=True))
        self.records.update(new)
        if self.handle:
            self.handle.write("".join(map(_line, new.items())))
            self.handle.flush()

    def gather(self) -> None:
        """Merge the records of all processes on each of them."""
        for others in gather_objects(self.records):
            self.records.update(others)

    def remove(self) -> None:
        """Delete the partial files, once the task's items file is written."""
        if self.handle:
            self.handle.close()
            barrier()
        if not self.file:
            return
        # The first process deletes all of them: an earlier scoring may have had more processes.
        for file in self._files() if is_main() else [_rank_file(self.file, rank())]:
            file.unlink(missing_ok=True)

    def _read(self, key: str, budget: int | None) -> Iterator[tuple[int, dict[int, ItemRecord]]]:
        for file in self._files():
            head, *lines = [line for line in _lines(file) if line is not None] or [None]
            match head:
                case {"key": stored_key, "budget": int(stored)} if stored_key == key and stored >= 1:
                    if budget in (None, stored):
                        yield int(stored), dict(filter(self._is_record, lines))

    def _is_record(self, line: Any) -> bool:
        """Return True for the number of an item with its record, and not for what a damaged file may have there."""
        match line:
            case [int(number), dict(record)]:
                return self.fits(number, record)
        return False

    def _start(self, key: str) -> None:
        """Rewrite this process's file without incomplete lines; the first process's takes over the records of all."""
        assert self.file
        path = _rank_file(self.file, rank())
        known = self.records if is_main() else {}
        text = "".join(map(_line, [{"key": key, "budget": self.budget}, *known.items()]))
        if is_main():
            write_file(path, text)
            for file in {*self._files()} - {_rank_file(self.file, number) for number in range(world_size())}:
                file.unlink(missing_ok=True)
        barrier()
        if not is_main():  # only after the first process has saved the records of this file
            write_file(path, text)
        self.handle = open_log(path)

    def _files(self) -> list[Path]:
        return sorted(self.file.parent.glob(f"{self.file.name}.partial-*")) if self.file else []


def _rank_file(file: Path, number: int) -> Path:
    return file.with_name(f"{file.name}.partial-{number}")


def _line(value: Any) -> str:
    return f"{json.dumps(value, ensure_ascii=False)}\n"


def _lines(file: Path) -> Iterator[Any]:
    """Yield the value of each complete line of a file, and None for an incomplete one."""
    with contextlib.suppress(OSError, UserError):
        for line in read_bytes(file, most=MOST_RESULT_BYTES).split(b"\n"):
            try:
                yield json.loads(line) if line else None
            except (ValueError, RecursionError):
                yield None

"""A generator of malformed and hostile inputs: every kind of file that the product reads, settings, and environment.

:func:`all_cases` makes the same thousand and more for the same seed. A :class:`Case` writes what it needs into a folder
of its own and gives it to the product's own verb or reader, in this process. :func:`judge` says what was wrong with the
answer: a traceback, a hang, several messages or none, something that was accepted, executed, or left behind.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from subspace.cli import main as cli
from subspace.errors import UserError, printable

#: Seconds after which an input counts as a hang.
HANG_S = 10
#: Characters that an answer may have.
MOST_SAID = 20_000


@dataclass(frozen=True)
class Place:
    """What the cases share: valid inputs, made once, that they spoil copies of.

    Attributes:
        config: a run's configuration, valid.
        engine: its engine file.
        model: a tiny model's folder.
        adapter: an adapter of that model.
        scored: a folder with results and items.
        canary: a file that hostile inputs try to make; it must never exist.
    """

    config: Path
    engine: Path
    model: Path
    adapter: Path
    scored: Path
    canary: Path


@dataclass(frozen=True)
class Case:
    """One input: ``give`` writes it into a folder, lets the product read it, and returns the status.

    ``refused`` says that only a refusal is right; others may be understood too. ``kind`` is that of the input.
    """

    kind: str
    name: str
    give: Callable[[Place, Path], int]
    refused: bool = True
    environment: dict[str, str] = field(default_factory=dict)


class _Hang(BaseException):
    pass


def judge(case: Case, place: Place, folder: Path) -> list[str]:
    """Give the product one input and return what was wrong with its answer; nothing if it was right."""
    folder.mkdir(parents=True)
    said = io.StringIO()
    status, faults = _give(case, place, folder, said)
    text = said.getvalue()
    wrong = {
        "a traceback": "Traceback" in text,
        "an escape sequence on the terminal": "\x1b" in text or "\x9b" in text,
        "no message": status not in (None, 0) and "error: " not in text and "stopped: " not in text,
        f"status {status}": status not in (None, 0, 1, 2),
        f"accepted: {text[:200]}": case.refused and status == 0,
        f"{len(text)} characters of message": len(text) > MOST_SAID,
        "executed": place.canary.exists(),
    }
    faults += [fault for fault, is_so in wrong.items() if is_so]
    place.canary.unlink(missing_ok=True)
    partial = (path for path in folder.rglob("*") if path.suffix in (".partial", ".lock"))
    if left := [*_strangers(Path.cwd()), *partial]:
        faults.append(f"left behind: {sorted(map(str, left))[:3]}")
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return faults


def _give(case: Case, place: Place, folder: Path, said: io.StringIO) -> tuple[int | None, list[str]]:
    """Return the status of an answer, None where there was none, and why."""
    environment = dict(os.environ)
    os.environ.update(case.environment)
    handler = signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return case.give(place, folder), []
    except _Hang:
        return None, [f"hangs for {HANG_S} s"]
    except UserError as error:
        said.write(f"error: {printable(str(error))}\n")  # as the command does
        return error.status, []
    except OSError as error:  # which the command answers in one message, whatever reads
        said.write(f"error: {error.strerror}\n")
        return UserError.status, []
    except SystemExit as error:  # --help
        return int(error.code or 0), []
    except BaseException:
        return None, [traceback.format_exc(limit=-4)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        os.environ.clear()
        os.environ.update(environment)


def _strangers(folder: Path) -> list[Path]:
    """Return what lies in a test's own folder besides what it shows of the repository."""
    return [path for path in folder.iterdir() if path.name not in ("launch", "ds_configs")]


def _give_up(number: int, frame: FrameType | None) -> None:
    raise _Hang


def command(*arguments: str) -> int:
    """Run a command of the product in this process and return its status."""
    return cli.main(list(arguments))


def written(file: Path, content: str | bytes) -> Path:
    """Write a file and return its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return file


def spoilt(text: bytes, rng: random.Random) -> bytes:
    """Return a text with some bytes removed, doubled, exchanged or put in."""
    data = bytearray(text)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                del data[at : at + rng.randint(1, 30)]
            case 1:
                data[at:at] = rng.choice(MORSELS)
            case 2:
                data[at:at] = data[at : at + rng.randint(1, 60)]
            case 3:
                data[at:at] = bytes([rng.randrange(256)])
            case 4:
                data[at : at + 8] = data[at : at + 8][::-1]
            case 5:
                data[at:at] = rng.choice(MORSELS) * rng.randint(2, 2000)
    return bytes(data[: 1 << 20])


MORSELS = (
    *(b"\0", b"\x1b[2J", b"\xff\xfe", b"\t", b"\r", b"\n", b": ", b"- ", b"{", b"}", b"[", b"]", b'"', b"'"),
    *(b"&a ", b"*a ", b"!!python/object/apply:os.system [id]", b"<<: ", b"? ", b"|\n", b"%YAML 9.9\n", b"---\n"),
    *(b"1e999", b"9" * 400, b"-1", b"NaN", b"null", b"true", b"\\ud800", "\u202e".encode(), "é".encode(), b"..", b"/"),
)

#: A value of another type than any one setting's: each setting refuses those that are not its own.
OTHERS: dict[str, Any] = {
    "true": True,
    "number": 3,
    "negative": -7,
    "fraction": 2.5,
    "huge": 10**30,
    "word": "nonsense",
    "list": [1, [2]],
    "mapping": {"a": {"b": 1}},
    "nothing": None,
    "nan": float("nan"),
    "infinity": float("inf"),
    "escape": "\x1b]0;x\x07",
}


def replaced(tree: Any, path: Sequence[str | int], value: Any) -> Any:
    """Return a copy of nested values with another one at a path."""
    tree = json.loads(json.dumps(tree))
    at = tree
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return tree


def paths_in(tree: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every value inside nested values."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield (*above, key)
        yield from paths_in(value, (*above, key))

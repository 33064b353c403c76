"""Execution of Python files from outside the package, with a record of the sources that this user has run.

The record distinguishes a file that the user has named before from one that came with somebody else's run folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

from subspace.errors import UserError


@dataclass(frozen=True)
class PythonFile:
    """The path and source of a Python file, read once."""

    path: Path
    source: bytes = field(repr=False)

    @property
    def sha256(self) -> str:
        """The SHA-256 of the source."""
        return hashlib.sha256(self.source).hexdigest()


def run_python_file(file: PythonFile, module: str, check: Callable[[], None]) -> None:
    """Execute a file as a module of this name, add it to ``sys.modules`` and record its source.

    Args:
        file: the file.
        module: the module's name.
        check: called after the file ran; its errors are reported as the file's.

    Raises:
        UserError: an error in the file, with its line. The module is then removed from ``sys.modules``.
    """
    path, namespace = str(file.path), types.ModuleType(module)
    namespace.__file__ = str(file.path.resolve())
    sys.modules[module] = namespace  # dataclasses look up their annotations there
    try:
        exec(compile(file.source, path, "exec"), vars(namespace))
        check()
    except Exception as error:
        del sys.modules[module]
        raise UserError(f"the file '{path}' cannot be used: {_explain(error, path)}") from error
    _remember(file)


def _explain(error: Exception, path: str) -> str:
    """Return a description of an error in a file, with its line."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"line {error.lineno}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{error}" if isinstance(error, UserError) else f"{where}{type(error).__name__}: {error}"


def was_run_before(file: PythonFile) -> bool:
    """Return True if this user has run a file with exactly this source on this machine."""
    try:
        lines = _list_of_sources().read_text(encoding="utf-8").splitlines()
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return False
    return file.sha256 in {line.partition(" ")[0] for line in lines}


def _remember(file: PythonFile) -> None:
    if was_run_before(file):
        return
    # If the record cannot be written, the user has to name files each time.
    with contextlib.suppress(OSError, RuntimeError):
        _list_of_sources().parent.mkdir(parents=True, exist_ok=True)
        with _list_of_sources().open("a", encoding="utf-8") as lines:
            lines.write(f"{file.sha256}  {file.path.resolve()}\n")


def _list_of_sources() -> Path:
    """Return the record's path, ``~/.local/state/subspace/python_files``; each line begins with a source's SHA-256."""
    return Path(platformdirs.user_state_dir("subspace")) / "python_files"

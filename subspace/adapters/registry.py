"""The register of methods: the package's own, those of installed packages, and those in a file of the user's.

A method registers its class with :func:`register`, wherever it lives:

- a file of ``subspace/methods``, found by itself;
- a module that an installed package names as an entry point of the group ``subspace.methods``;
- one file anywhere, named by ``method.file`` in a configuration, or given to :func:`load_method_file`;
- the running program, a notebook say.

**Which files are run.** Loading a method file runs it, so a file is run only because this call names it: in the
configuration that the user passes, on the command line, or in Python. A run's folder keeps a copy of its method's file
with the SHA-256 of the source, and so does no more than name it: ``subspace evaluate RUN`` runs the copy without being
asked only where this user has run that very source before, of which ``~/.local/state/subspace`` keeps a list. The copy
in a folder that came from somebody else, or that was changed, is refused until the user has read it and names it
(``method.file=RUN/method/my_method.py``). An ``adapter.json`` tells which source its method had; no code is ever run
because of what stands there.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import logging
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from subspace.adapters.base import FAMILIES, ROLES, SITES, Adapter, Family, MethodConfig
from subspace.common.files import write_file
from subspace.common.python_files import PythonFile, run_python_file, was_run_before
from subspace.common.synonyms import hint
from subspace.errors import UserError, nearest, shown

logger = logging.getLogger("subspace")

_Class = TypeVar("_Class", bound=type[Adapter])
Presets = Mapping[str, Any]

#: The paper's matrix pattern constraints, by the word that follows a method's name: ``lora+mpc-o``.
CONSTRAINTS: dict[str, Presets] = {
    "mpc-o": {"constraint": "orthogonal"},
    "mpc-d": {"constraint": "diagonal"},
    "mpc-n": {"constraint": "nonlinear"},
}

ENTRY_POINTS = "subspace.methods"
#: What a method's ``num_params`` may name besides its settings.
SITE_SIZES = ("n_in", "n_out", "n_kv", "n_values", "heads")
#: Settings that stand beside a method's own in a configuration.
RESERVED_SETTINGS = ("name", "file", "sha256", "targets", "patterns")

_BUILTIN = "subspace.methods."
_FILE_MODULE = "subspace_method_file_"
_methods: dict[str, type[Adapter]] = {}
_files: dict[str, MethodFile] = {}  # by the SHA-256 of their source


# Registering.


def register(
    name: str, *, family: Family, num_params: str, aliases: Mapping[str, Presets] | None = None
) -> Callable[[_Class], _Class]:
    """Enter a method's class into the register.

    Args:
        name: as users write it: small letters, digits and ``-``.
        family: one of ``FAMILIES``.
        num_params: the number of trained values at one site as an expression over the method's settings and ``n_in``,
            ``n_out`` (the layer's features; of an embedding, its rows and its width), ``n_kv`` and ``heads``
            (key-value heads times head dimension, and query heads, at an attention) or ``n_values`` (those of the
            module itself).
        aliases: other names, and the settings that they stand for: ``{"rslora": {"rslora": True}}``.

    Raises:
        UserError: a class that does not fulfil the contract of a method, or a name that is taken.
    """

    def enter(cls: _Class) -> _Class:
        _check_class(cls, name)
        _check_declaration(cls, name, family, num_params)
        for word in (name, *(aliases or {})):
            _check_name(cls, word)
        cls.name, cls.family, cls.num_params, cls.aliases = name, family, num_params, aliases or {}
        _methods[name] = cls
        return cls

    return enter


def _check_class(cls: type[Adapter], name: str) -> None:
    where = f"@register({name!r}) at class {cls.__name__}"
    if not issubclass(cls, Adapter):
        raise UserError(f"{where}: it derives from no adapter. Derive it from LinearAdapter, say")
    if not (isinstance(cls.Config, type) and issubclass(cls.Config, MethodConfig)):
        raise UserError(f"{where}: its Config is not a MethodConfig. Write `class Config(MethodConfig):` in it")
    annotations = vars(cls.Config).get("__annotations__", {})
    fields = [field.name for field in dataclasses.fields(cls.Config)]
    if undeclared := [key for key in annotations if key not in fields]:
        raise UserError(
            f"{where}: its Config is no dataclass of its own, so '{undeclared[0]}' is no setting. Write "
            "`@dataclass(frozen=True, kw_only=True)` above it"
        )
    if taken := [key for key in fields if key in RESERVED_SETTINGS]:
        raise UserError(f"{where}: a setting is called '{taken[0]}', which every method has already. Rename it")
    if not hasattr(cls, "roles"):
        raise UserError(
            f"{where}: it does not say which tensors it trains. Add `roles: ClassVar = {{'A': 'down'}}`, with a role "
            f"for each. Roles are {', '.join(ROLES)}"
        )
    for tensor, role in cls.roles.items():
        if role not in ROLES:
            raise UserError(f"{where}: the role of {tensor} is {role!r}. {nearest(str(role), ROLES)}")
    if cls.site not in SITES:
        raise UserError(f"{where}: its site is {cls.site!r}. {nearest(str(cls.site), SITES)}")


def _check_declaration(cls: type[Adapter], name: str, family: str, num_params: str) -> None:
    where = f"@register({name!r})"
    if family not in FAMILIES:
        raise UserError(f"{where}: the family is {family!r}. {nearest(str(family), FAMILIES)}")
    try:
        tree = ast.parse(num_params, mode="eval")
    except (SyntaxError, TypeError):
        raise UserError(
            f"{where}: num_params is {num_params!r}, but is the number of trained values at one site as an expression, "
            "as 'r * (n_in + n_out)'"
        ) from None
    known = {field.name for field in dataclasses.fields(cls.Config)} | {*SITE_SIZES, "min", "max"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in known:
            raise UserError(f"{where}: num_params names '{node.id}'. {nearest(node.id, known)}")


def _check_name(cls: type[Adapter], word: str) -> None:
    """Refuse a name that nobody could write, or that another method has."""
    if not re.fullmatch(r"[^\s_+=/A-Z]+", word):  # as resolve_method reads names
        raise UserError(f"a method cannot be called {word!r}: small letters, digits and '-' make a name")
    if is_builtin(cls):
        return
    _import_builtin_methods()
    for other in _methods.values():
        if other.__module__ == cls.__module__ or word not in (other.name, *other.aliases):
            continue
        # Two files of the user's may hold two versions of a method: each is found by its file.
        if not (other.__module__.startswith(_FILE_MODULE) and cls.__module__.startswith(_FILE_MODULE)):
            raise UserError(
                f"the method {word!r} of {_describe(cls)} cannot have this name: it is that of {_describe(other)}. "
                "Give it another"
            )


# Finding.


@cache
def _import_builtin_methods() -> None:
    """Import every file of ``subspace.methods``, which registers what it defines. Once a process."""
    package = importlib.import_module("subspace.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


@cache
def _import_entry_points() -> tuple[str, ...]:
    """Import what installed packages offer as methods, and return what of it failed. Once a process.

    A package that cannot be imported must not keep anybody from using the other methods.
    """
    failed = []
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:
            package = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
            failed.append(f"{point.name} of {package} cannot be imported: {type(error).__name__}: {error}")
            logger.warning(f"method {failed[-1]}")
    return tuple(failed)


def list_methods() -> dict[str, type[Adapter]]:
    """Return every registered method by name."""
    _import_builtin_methods()
    _import_entry_points()
    return dict(sorted(_methods.items()))


def resolve_method(method: str | type[Adapter], file: MethodFile | None = None) -> tuple[type[Adapter], Presets]:
    """Return a method by name or alias, and the settings that the alias, or a constraint behind it, stands for.

    Letter case is free, and ``_`` stands for ``-``: ``LoRA+MPC_o`` is LoRA with ``constraint: orthogonal``. A class
    stands for itself.

    Args:
        method: the name; of a method file that registers one method, also "".
        file: look among the methods of this file instead of all.
    """
    if isinstance(method, type):
        return method, {}
    known = file.methods if file else list_methods()
    if file and not method and len(known) == 1:
        return next(iter(known.values())), {}
    by_name: dict[str, tuple[type[Adapter], Presets]] = {name: (cls, {}) for name, cls in known.items()}
    for cls in known.values():
        by_name |= {alias: (cls, presets) for alias, presets in cls.aliases.items()}
    word, plus, constraint = method.casefold().replace("_", "-").partition("+")
    if word not in by_name:
        raise UserError(_unknown(method, word, by_name, file))
    cls, presets = by_name[word]
    if not plus:
        return cls, presets
    if constraint not in CONSTRAINTS:
        raise UserError(f"'{method}' asks for a constraint '{constraint}'. {nearest(constraint, CONSTRAINTS)}")
    if "constraint" not in cls.Config.__dataclass_fields__:
        able = [name for name, other in list_methods().items() if "constraint" in other.Config.__dataclass_fields__]
        raise UserError(
            f"'{method}': {constraint} constrains two factors, which {cls.name} has not. {nearest('', able)}"
        )
    return cls, {**presets, **CONSTRAINTS[constraint]}


def _unknown(method: str, word: str, known: Mapping[str, Any], file: MethodFile | None) -> str:
    if file and not method:
        return f"{file.file.path} registers several methods: {', '.join(known)}. Name one of them as method.name"
    if file:
        return f"{file.file.path} registers no method '{method}'. {nearest(word, known)}"
    if word.endswith(".py"):
        return f"'{method}' is a file, and a method's name was asked for. Load it: method.file={method}"
    broken = "".join(f". The method {failure}" for failure in _import_entry_points())
    return f"no method is called {shown(method)}. {hint('method', method, known, 'subspace methods')}{broken}"


def configure(cls: type[Adapter], settings: Mapping[str, Any]) -> MethodConfig:
    """Build a method's Config from a mapping; unknown keys are refused with the nearest known one."""
    return cls.Config.build(settings, owner=f"method {cls.name}")


# Files of the user's own.


class MethodFile(NamedTuple):
    """A Python file outside the package that registers methods; this process has run it once."""

    file: PythonFile
    methods: Mapping[str, type[Adapter]]


class FoundMethod(NamedTuple):
    """A method, the settings that the name it was found by stands for, and the file that registers it."""

    cls: type[Adapter]
    presets: Presets
    file: PythonFile | None = None


def load_method_file(path: str | os.PathLike[str], *, trusted: bool = True) -> MethodFile:
    """Run a file that registers methods, and return them. A source that this process has run is not run again.

    Args:
        path: the file. It must do with itself: it is copied into the folders of runs.
        trusted: False where not the user named the file but the folder of a run did. It is then run only if this user
            has run the same source before; see the module's docstring.

    Raises:
        UserError: no such file, one that fails or registers nothing, or one that may not be run.
    """
    path = Path(path)
    try:
        file = PythonFile(path, path.read_bytes())
    except OSError as error:
        raise UserError(f"the method file '{path}' cannot be read: {error.strerror}. Name another") from None
    if file.sha256 in _files:
        return _files[file.sha256]
    if not trusted and not was_run_before(file):
        raise UserError(
            f"'{path}' holds the method of a run, and loading it would run code that you have not run before (SHA-256 "
            f"{file.sha256[:12]}). Read it; if you trust it, name it: method.file={path}"
        )
    before, module = dict(_methods), f"{_FILE_MODULE}{file.sha256[:16]}"
    methods: dict[str, type[Adapter]] = {}

    def collect() -> None:
        methods.update({cls.name: cls for cls in _methods.values() if cls.__module__ == module})
        if not methods:
            raise UserError("it registers no method. Write @register(NAME, family=..., num_params=...) above a class")

    try:
        run_python_file(file, module, collect)
    except UserError:
        _methods.clear()
        _methods.update(before)
        raise
    _files[file.sha256] = MethodFile(file, methods)
    return _files[file.sha256]


def loaded_method_file(sha256: str | None) -> MethodFile | None:
    """Return the method file with a source of this SHA-256, if this process has run it."""
    return _files.get(sha256 or "")


def find_method(name: str, file: str, folder: Path, sha256: str | None = None, *, trusted: bool = True) -> FoundMethod:
    """Return the method of a file that a configuration names.

    Args:
        name: the method's name or alias, or "" where the file registers but one.
        file: the file's path, from ``folder`` or from the working directory.
        folder: that of the configuration.
        sha256: what the SHA-256 of the source must be; None for any.
        trusted: as of :func:`load_method_file`.
    """
    path = next((path for path in (folder / file, Path(file)) if path.is_file()), folder / file)
    found = load_method_file(path, trusted=trusted)
    if sha256 not in (None, found.file.sha256):
        raise UserError(
            f"the method file '{path}' was changed: its SHA-256 is {found.file.sha256}, and the configuration asks for "
            f"{sha256}. Restore the file, or name another: method.file=FILE"
        )
    return FoundMethod(*resolve_method(name, found), found.file)


def write_method_files(folder: Path, files: Iterable[tuple[str, str]]) -> None:
    """Write loaded method files into a folder: the path there, and the SHA-256, of each."""
    written: dict[str, str] = {}
    for name, sha256 in files:
        if written.setdefault(name, sha256) != sha256:
            raise UserError(f"two different method files of a run are called {Path(name).name}. Rename one")
        write_file(folder / name, _files[sha256].file.source)


# Where a method came from.


def is_builtin(cls: type[Adapter]) -> bool:
    """Return True for a method of this package."""
    return cls.__module__.startswith(_BUILTIN)


def method_origin(cls: type[Adapter]) -> dict[str, str]:
    """Return where a method's class came from, for ``adapter.json``: a file's name and SHA-256, or a distribution.

    Nothing for the package's own methods.
    """
    module = cls.__module__
    if is_builtin(cls):
        return {}
    for file in _files.values():
        if cls in file.methods.values():
            return {"file": file.file.path.name, "sha256": file.file.sha256}
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.module.partition(".")[0] == module.partition(".")[0] and point.dist:
            return {"entry_point": point.value, "distribution": point.dist.name, "version": point.dist.version}
    return {"module": module}


def resolve_recorded_method(method: str, origin: Mapping[str, str]) -> type[Adapter]:
    """Return the method that an ``adapter.json`` names; it must have been registered already.

    Raises:
        UserError: an unknown method, with what to do; nothing is run because a file asks for it.
    """
    if origin.get("sha256") in _files:
        return resolve_method(method, _files[origin["sha256"]])[0]
    known = list_methods()
    if not origin or method in known:
        cls = resolve_method(method)[0]
        now = method_origin(cls)
        if origin.get("sha256") != now.get("sha256"):
            logger.warning(f"method {method} was trained as {_origin_text(origin)}, and is used as {_origin_text(now)}")
        return cls
    if "file" in origin:
        cure = f"name that file: method.file={origin['file']}, or subspace.load_method_file('{origin['file']}')"
    elif "distribution" in origin:
        cure = f"install it: pip install {origin['distribution']}=={origin['version']}"
    else:
        cure = "import the module that registers it, or move the class into a file and name that as method.file"
    raise UserError(f"no method is called '{method}' here. It is that of {_origin_text(origin)}: {cure}")


def _origin_text(origin: Mapping[str, str]) -> str:
    if "file" in origin:
        return f"the file {origin['file']} (SHA-256 {origin['sha256'][:12]})"
    if "distribution" in origin:
        return f"the package {origin['distribution']} {origin['version']}"
    return f"the module {origin['module']}" if origin else "subspace itself"


def _describe(cls: type[Adapter]) -> str:
    if cls.__module__.startswith(_FILE_MODULE):  # it may be running still
        return f"the file {sys.modules[cls.__module__].__file__}"
    return _origin_text(method_origin(cls))

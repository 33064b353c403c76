"""A run's configuration, composed from a YAML file, its base files and ``key=value`` overrides.

The settings themselves are declared and checked elsewhere: by :class:`ModelConfig`, by the method's own ``Config``, and
so on. This module merges layers: each maps setting names (``train.steps``, ``method.0.r``) to values, and every value
remembers the file or command line it came from, for error messages.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subspace.adapters import registry
from subspace.adapters.base import Adapter, MethodConfig
from subspace.common.declarations import write_yaml
from subspace.common.foreign.yaml_files import read_yaml
from subspace.common.layers import COMMAND_LINE, Given, Layer, merge_layers, only_typed, parse_override
from subspace.common.paths import find_resource, recipes_folder, resource_name
from subspace.common.settings import (
    Rename,
    SettingInfo,
    Settings,
    check_settings,
    declared_settings,
    one_notice_per_origin,
    setting,
    suggest_setting,
)
from subspace.data.config import DataConfig
from subspace.errors import UserError, nearest
from subspace.evaluation.config import EvaluateConfig, EvaluationSubject, PublishedScores
from subspace.models.config import ModelConfig
from subspace.training.checkpoint import own_adapter
from subspace.training.config import TrainConfig

SECTIONS: dict[str, type[Settings]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
}
DEFAULT_METHOD = "lora"
METHOD = "method"  # the section of a single method; several methods are method.0, method.1, ...
BASE = "base"  # key that names a file's base file


@dataclass(frozen=True, kw_only=True)
class MethodEntry(Settings):
    """One method of a run: its name, settings, target layers, and settings for some of them."""

    name: str
    settings: MethodConfig
    file: str | None = setting(None, "Python file that registers the method, if it is not built in")
    sha256: str | None = setting(None, "required SHA-256 of the file; null accepts any")
    targets: list[str] | None = setting(
        None, "layers that get an adapter, as q_proj or all-linear; null for the method's own"
    )
    patterns: dict[str, dict[str, Any]] = setting({}, "settings by layer name: {REGEX: {r: 8}}; the last match wins")

    @property
    def adapter_class(self) -> type[Adapter]:
        """The method's adapter class."""
        return registry.resolve_method(self.name, registry.loaded_method_file(self.sha256))[0]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values in the form of the YAML file."""
        own = dataclasses.asdict(self.settings)
        source = {"file": self.file, "sha256": self.sha256} if self.file else {}
        return {"name": self.name, **source, **own, "targets": self.targets, "patterns": self.patterns}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """The full configuration of one run."""

    name: str = setting("", "name of the run, saved in RUNS/NAME; by default the configuration file's name")
    runs: str = setting("runs", "parent folder of the run folders")
    model: ModelConfig = field(default_factory=ModelConfig)
    method: tuple[MethodEntry, ...]  # in the file one section, with the targets beside it, or a list of sections
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: str = setting("ds_configs/zero1.json", "DeepSpeed configuration, a JSON file")
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    published: PublishedScores | None = setting(
        None, "published scores for this setting, in percent: {boolq: 68.9, ..., average: 74.7, source: WHERE}"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[\w.+-]+", self.name) or self.name in (".", ".."):
            raise UserError(f"name is '{self.name}', but names a folder: letters, digits and . _ + - only")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs) / self.name

    @property
    def methods(self) -> str:
        """The names of the run's methods."""
        return ", ".join(entry.name for entry in self.method)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values in the form of the YAML file."""
        plain = dataclasses.asdict(self)
        plain[METHOD] = [entry.as_dict() for entry in self.method]
        if len(self.method) == 1:
            (only,) = plain[METHOD]
            plain |= {METHOD: only, "targets": only.pop("targets")}
        if self.published is None:
            del plain["published"]
        return plain


def all_settings(methods: Mapping[str, type[Adapter]]) -> dict[str, SettingInfo]:
    """Return every setting of a run by name, such as ``train.steps``; ``methods`` are its methods by section."""
    found: dict[str, SettingInfo] = {}
    for name, info in declared_settings(RunConfig).items():
        if name in SECTIONS:
            found |= {f"{name}.{key}": own for key, own in declared_settings(SECTIONS[name]).items()}
        elif name == METHOD:
            for place, method in methods.items():
                own = {"name": SettingInfo("name", str, DEFAULT_METHOD, "the method; `subspace methods` lists them")}
                own |= declared_settings(method.Config)
                entry = declared_settings(MethodEntry)
                own |= {key: entry[key] for key in ("file", "sha256", "patterns")}
                found |= {f"{place}.{key}": setting for key, setting in own.items()}
                found["targets" if place == METHOD else f"{place}.targets"] = entry["targets"]
        else:
            found[name] = info
    return found


# Reading.


def read_config(file: Path | str, overrides: Sequence[str] = (), *, found_in_run: bool = False) -> RunConfig:
    """Read a run's configuration; raise UserError if it is invalid.

    Args:
        file: The YAML file, a user's or the one in a run's folder.
        overrides: ``key=value``, such as ``train.steps=100``. ``method=dora`` drops the file's method and its settings.
        found_in_run: True if the user named the folder and not the file itself. A method file that the configuration
            names is then run only if the user has run the same source before; see ``adapters/registry.py``.
    """
    file = Path(file)
    if not file.is_file():
        file = find_resource(file) or file
    values = _override(_read_file(file), overrides)
    return _compose({"name": Given(file.stem, str(file)), **values}, file.parent, found_in_run=found_in_run)


def read_given(file: Path) -> dict[str, Any]:
    """Return the settings given in a configuration file and its base files, without defaults, as a nested mapping."""
    nested: dict[str, Any] = {}
    for name, given in _read_file(file).items():
        section, _, key = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = given.value
    entries = [nested.pop(section) for section in list(nested) if section.startswith(f"{METHOD}.")]
    return {**nested, METHOD: entries} if entries else nested


def read_data_config(what: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a training data configuration: a run's, or defaults with the given mixture, task or data file."""
    is_yaml = Path(what).suffix in (".yaml", ".yml")
    if is_yaml and not (Path(what).exists() and "parts" in read_yaml(Path(what))):
        return read_config(what, overrides)
    return read_defaults("data", "data.mixture", what, overrides)


def read_run_subject(folder: Path, overrides: Sequence[str] = ()) -> EvaluationSubject:
    """Return the model and adapter of a finished run, for evaluation."""
    if not (folder / "config.yaml").is_file():
        runs = [str(file.parent) for file in folder.parent.glob("*/config.yaml")]
        hint = nearest(str(folder), runs) if runs else "`subspace train CONFIG` makes one"
        raise UserError(f"'{folder}' is no run's folder: it holds no config.yaml. {hint}")
    config = read_config(folder / "config.yaml", overrides, found_in_run=True)
    adapter, data = own_adapter(folder), config.data
    return EvaluationSubject(
        config.model, config.evaluate, folder, adapter, config.methods, data.mixture, data.columns,
        chat_template=data.chat_template, date=data.date,
    )  # fmt: skip


def read_subject(what: str, overrides: Sequence[str] = ()) -> EvaluationSubject:
    """Return what to evaluate: a run, the base model of a configuration, or a model given by name or path."""
    if (Path(what) / "config.yaml").is_file() or (Path(what).parent.name == "runs" and not Path(what).exists()):
        return read_run_subject(Path(what), overrides)
    if Path(what).suffix in (".yaml", ".yml"):
        config = read_config(what, overrides)
    else:
        config = read_defaults("base", "model.path", what, overrides)
    given = "-".join(filter(None, (config.model.path, config.model.revision)))
    name = re.sub(r"[^\w.+-]+", "-", given).strip("-")
    if not name.strip("."):  # the folder that the command is given in, or one above it
        name = Path(given).resolve().name or "model"
    return EvaluationSubject(
        config.model, config.evaluate, Path(config.runs) / name,
        chat_template=config.data.chat_template, date=config.data.date,
    )  # fmt: skip


def read_defaults(name: str, key: str, value: str, overrides: Sequence[str]) -> RunConfig:
    """Return a configuration of defaults, one given setting, and overrides."""
    values = {"name": Given(name, COMMAND_LINE), key: Given(value, COMMAND_LINE)}
    return _compose(_override(values, overrides), Path())


def portable(config: RunConfig) -> dict[str, Any]:
    """Return a configuration's values, with a shipped engine file by its name on every machine."""
    return config.as_dict() | {"engine": resource_name(Path(config.engine)) or config.engine}


def write_config(config: RunConfig, file: Path) -> None:
    """Write a configuration and copies of its method files, so that :func:`read_config` restores it on any machine."""
    registry.write_method_files(file.parent, [(e.file, e.sha256) for e in config.method if e.file and e.sha256])
    write_yaml(file, portable(config))


def _override(values: Layer, overrides: Sequence[str]) -> Layer:
    """Apply command-line overrides to the settings."""
    own: Layer = {}
    for name, given in map(parse_override, overrides):
        if re.fullmatch(r"method(\.\d+)?", name):  # another method: drop the old one's settings, keep its targets
            values = {k: v for k, v in values.items() if not k.startswith(f"{name}.") or k == f"{name}.targets"}
            name = f"{name}.name"
        elif re.fullmatch(r"method(\.\d+)?\.file", name):  # another source
            values = {k: v for k, v in values.items() if k != name.replace(".file", ".sha256")}
        elif name == "model.path":  # the revision is of the model that it replaces
            values = {k: v for k, v in values.items() if k != "model.revision"}
        own[name] = given
    return merge_layers(values, _names_first(own))


def _names_first(layer: Layer) -> Layer:
    """Sort the methods' names first: an alias stands for settings, which explicit ones override."""
    return dict(sorted(layer.items(), key=lambda item: not re.fullmatch(r"method(\.\d+)?\.name", item[0])))


def _read_file(file: Path, above: Sequence[Path] = ()) -> Layer:
    """Read a YAML file and its base files; ``above`` are the files that build on it, to detect a cycle."""
    if not file.exists():
        recipes = [f"launch/recipes/{path.name}" for path in recipes_folder().glob("*.yaml")]
        near = nearest(str(file), recipes).partition("There ")[0]  # too many to list
        raise UserError(f"there is no configuration file '{file}'. {near}`subspace recipes` lists them")
    if file.resolve() in above:
        raise UserError(f"{file} builds on itself: its '{BASE}:' leads back to it")
    content = read_yaml(file)
    base = content.pop(BASE, None)
    own = _names_first(_flatten(content, str(file)))
    if base is None:
        return own
    if not isinstance(base, str):
        raise UserError(
            f"{file} sets {BASE} to {base!r}, but it takes the path of a YAML file, relative to {file.parent}"
        )
    below = _read_file(file.parent / base, [*above, file.resolve()])
    below.pop("name", None)
    # A file that names its method inherits no method settings, and one that gives a list no targets either.
    if any(re.fullmatch(r"method(\.\d+)?\.(name|file)", name) for name in own):
        several = any(name.startswith(f"{METHOD}.0.") for name in own)
        below = {k: v for k, v in below.items() if not k.startswith(f"{METHOD}.") and not (several and k == "targets")}
    if "model.path" in own:
        below.pop("model.revision", None)
    return merge_layers(below, own)


def _flatten(content: Mapping[str, Any], file: str) -> Layer:
    """Return ``{'train.steps': ...}`` for a file's content."""
    content = dict(content)
    methods = content.get(METHOD)
    if methods == []:
        raise UserError(
            f"{file}: method is an empty list, so nothing would be trained. {nearest('', registry.list_methods())}"
        )
    if isinstance(methods, list):
        del content[METHOD]
        content |= {f"{METHOD}.{number}": entry for number, entry in enumerate(methods)}
    values: Layer = {}
    for name, value in content.items():
        is_method = re.fullmatch(r"method(\.\d+)?", str(name))
        if is_method and isinstance(value, str):
            value = {"name": value}
        if name not in SECTIONS and not is_method:
            values[str(name)] = Given(value, file)
        elif isinstance(value, dict):
            values |= {f"{name}.{key}": Given(inner, file) for key, inner in value.items()}
        elif value is not None or (is_method and name != METHOD):
            raise UserError(f"{file}: {name} is {value!r}, but is a section: lines 'key: value' below '{name}:'")
    return values


# Composing.


def _compose(values: Layer, beside: Path, *, found_in_run: bool = False) -> RunConfig:
    """Compose settings by name into a configuration; a relative engine path may start from the folder ``beside``."""
    values = only_typed(values, "model.trust_remote_code", harmful=True)
    numbers = sorted({int(found[1]) for name in values if (found := re.match(r"method\.(\d+)\.", name))})
    places = [f"{METHOD}.{number}" for number in numbers] or [METHOD]
    below: dict[str, Layer] = {place: {} for place in (*SECTIONS, *places)}
    top: Layer = {}
    unknown: list[str] = []
    for name, given in values.items():
        section, _, key = name.rpartition(".")
        if section in below:
            below[section][key] = given
        elif name == "targets" and places == [METHOD]:
            below[METHOD][name] = given
        elif not section and name in declared_settings(RunConfig) and name not in below:
            top[name] = given
        else:
            unknown.append(name)
    methods = {place: _resolve(place, below[place], found_in_run=found_in_run) for place in places}
    if unknown:
        known = all_settings({place: method.cls for place, method in methods.items()})
        raise UserError(f"{values[unknown[0]].origin} sets '{unknown[0]}', but {suggest_setting(unknown[0], known)}")

    engine = top.get("engine", Given(declared_settings(RunConfig)["engine"].default, ""))
    if isinstance(engine.value, str):
        top["engine"] = engine._replace(value=_find_engine(engine.value, (beside, Path(engine.origin).parent)))
    with one_notice_per_origin() as renames:
        entries = [_method_entry(place, below[place], methods[place], renames) for place in places]
        sections: dict[str, Any] = {
            name: cls(**_checked(cls, below[name], name, renames=renames)) for name, cls in SECTIONS.items()
        }
        return RunConfig(**_checked(RunConfig, top), **sections, method=tuple(entries))


def _checked(
    cls: type[Settings], layer: Layer, section: str = "", owner: str = "", *, renames: list[Rename] | None = None
) -> dict[str, Any]:
    declared = declared_settings(cls)
    return check_settings(
        cls,
        {key: given.value_for(declared.get(key)) for key, given in layer.items()},
        section=section,
        owner=owner,
        origin={key: given.origin for key, given in layer.items()},
        renames=renames,
    )


def _resolve(place: str, layer: Layer, *, found_in_run: bool) -> registry.FoundMethod:
    """Return the method of a configuration section."""
    name, file = layer.get("name"), layer.get("file")
    if name and str(name.value).endswith(".py"):  # method: my_method.py
        name, file = None, file or name
    if file and file.value is not None:
        # Paths on the command line are relative to the working directory.
        folder, sha256 = Path(file.origin).parent, layer["sha256"].value if "sha256" in layer else None
        trusted = file.origin == COMMAND_LINE or not (found_in_run or _is_of_run(Path(file.origin)))
        return registry.find_method(str(name.value) if name else "", str(file.value), folder, sha256, trusted=trusted)
    if place != METHOD and not name:
        origin = next(iter(layer.values())).origin
        raise UserError(f"{origin}: each of several methods needs its name, and {place} has none")
    return registry.FoundMethod(*registry.resolve_method(str(name.value) if name else DEFAULT_METHOD))


def _is_of_run(file: Path) -> bool:
    """Return True for the configuration in a run's folder, which a run wrote: the user has not, and may not know it."""
    beside = ("environment.json", "log.jsonl", "adapter", "checkpoints", "method", "results.json")
    return file.name == "config.yaml" and any((file.parent / name).exists() for name in beside)


def _method_entry(place: str, layer: Layer, found: registry.FoundMethod, renames: list[Rename]) -> MethodEntry:
    method, presets, file = found
    own: Layer = {}
    for key, given in layer.items():  # an alias's settings come with its name; later ones override them
        aliased = {preset: Given(value, given.origin) for preset, value in presets.items()}
        own = merge_layers(own, aliased if key == "name" else {key: given})
    where: dict[str, Any] = {}
    sections = {"targets": "" if place == METHOD else place, "patterns": place, "file": place, "sha256": place}
    for key, section in sections.items():
        if key in own:
            where |= _checked(MethodEntry, {key: own.pop(key)}, section)
    owner = f"method {method.name}"
    settings = method.Config(**_checked(method.Config, own, place, owner, renames=renames))
    for pattern, changes in where.get("patterns", {}).items():
        origin = f"{place}.patterns, for {pattern!r},"
        changes = check_settings(method.Config, changes, section=place, owner=owner, origin=origin, renames=renames)
        where["patterns"][pattern] = changes
    if file:
        where |= {"file": f"{METHOD}/{file.path.name}", "sha256": file.sha256}  # the copy in the run's folder
    return MethodEntry(name=method.name, settings=settings, **where)


def _find_engine(path: str, folders: Sequence[Path]) -> str:
    """Return the engine file's path: relative to the current folder, to a configuration's, or shipped with the project.

    If there is none, return the path unchanged: only training opens it, evaluation does not.
    """
    found = next((folder / path for folder in (Path(), *folders) if (folder / path).is_file()), None)
    found = found or find_resource(path)
    return str(found.resolve()) if found else path

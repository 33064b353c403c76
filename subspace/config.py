"""A run's configuration: one YAML file and ``key=value`` overrides, typed by the settings that each part declares.

This file only composes them: the keys, types, defaults, bounds and explanations are those of :class:`ModelConfig`, of
the method's own ``Config``, and so on. jsonargparse converts and checks types. Unknown keys are refused with the
nearest known one.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from subspace.adapters.base import Adapter, MethodConfig
from subspace.adapters.registry import list_methods, resolve_method
from subspace.common.files import write_file
from subspace.common.paths import find_resource, recipes_folder, resource_name
from subspace.common.settings import Settings, setting
from subspace.data.config import DataConfig
from subspace.errors import UserError, nearest
from subspace.evaluation.config import EvaluateConfig, EvaluationSubject
from subspace.models.config import ModelConfig
from subspace.training.config import TrainConfig

SECTIONS: dict[str, type[Settings]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
}
DEFAULT_METHOD = "lora"
SINGLE_METHOD = "method"  # where a run's only method stands; one of several stands at method.0, method.1, ...


@dataclass(frozen=True, kw_only=True)
class MethodEntry(Settings):
    """One method of a run: which, its own settings, where it sits, and which sites have other settings."""

    name: str
    settings: MethodConfig
    targets: list[str] | None = setting(None, "layers that get an adapter, as q_proj; null for the usual ones")
    patterns: dict[str, dict[str, Any]] = setting({}, "settings for some sites: {REGEX: {r: 8}}; the last match counts")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values in the form of the YAML file."""
        own = dataclasses.asdict(self.settings)
        return {"name": self.name, **own, "targets": self.targets, "patterns": self.patterns}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """Everything about one run."""

    name: str = setting("", "name of the run, whose folder is RUNS/NAME; by default the configuration file's")
    runs: str = setting("runs", "folder in which the runs' folders lie")
    model: ModelConfig = field(default_factory=ModelConfig)
    method: tuple[MethodEntry, ...]  # in the file one section, with the targets beside it, or a list of sections
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: str = setting("ds_configs/zero1.json", "DeepSpeed's own configuration, a JSON file")
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs) / self.name

    @property
    def methods(self) -> str:
        """The names of the run's methods."""
        return ", ".join(part.name for part in self.method)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values in the form of the YAML file."""
        plain: dict[str, Any] = {}
        for name, value in dataclasses.asdict(self).items():
            parts = [part.as_dict() for part in self.method]
            if name != "method":
                plain[name] = value
            elif len(parts) > 1:
                plain["method"] = parts
            else:
                plain |= {"method": parts[0], "targets": parts[0].pop("targets")}
        return plain


@dataclass(frozen=True)
class SettingInfo:
    """One setting by its name in the file, as ``train.learning_rate``."""

    name: str
    type: Any
    default: Any
    doc: str
    choices: tuple[str, ...] = ()

    @property
    def takes(self) -> str:
        """What it takes, in words."""
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
        union = isinstance(self.type, types.UnionType) or typing.get_origin(self.type) is typing.Union
        members = typing.get_args(self.type) if union else (self.type,)
        kinds = {list: "a list", dict: "a mapping"}
        return " or ".join(words.get(m) or kinds[typing.get_origin(m) or m] for m in members)


def all_settings(parts: Mapping[str, type[Adapter]]) -> dict[str, SettingInfo]:
    """Return every setting of a run by name; ``parts`` are its methods by where they stand, as ``method.0``."""
    found = [_declared(RunConfig, "")[name] for name in ("name", "runs", "engine")]
    for section, declaration in SECTIONS.items():
        found += _declared(declaration, f"{section}.").values()
    for part, method in parts.items():
        found += [SettingInfo(f"{part}.name", str, DEFAULT_METHOD, "the method; `subspace methods` lists them")]
        found += _declared(method.Config, f"{part}.").values()
        # One method alone has its targets beside it.
        found += [
            _declared(MethodEntry, f"{part}.")["patterns"],
            _declared(MethodEntry, "" if part == SINGLE_METHOD else f"{part}.")["targets"],
        ]
    order = [f.name for f in dataclasses.fields(RunConfig)]
    return {key.name: key for key in sorted(found, key=lambda key: order.index(_section(key.name)))}


def _section(name: str) -> str:
    return SINGLE_METHOD if name == "targets" else name.partition(".")[0]


def _declared(declaration: type[Settings], prefix: str) -> dict[str, SettingInfo]:
    types_of, found = typing.get_type_hints(declaration), {}
    for f in dataclasses.fields(declaration):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        doc, choices = f.metadata.get("doc", ""), f.metadata.get("choices", ())
        found[f.name] = SettingInfo(prefix + f.name, types_of[f.name], default, doc, choices)
    return found


def settings_manual() -> str:
    """Return every setting with its default and what it means, and every method's own settings with theirs."""
    lines = ["settings, in the configuration or as key=value:"]
    own_keys = {f"method.{f.name}" for f in dataclasses.fields(resolve_method(DEFAULT_METHOD)[0].Config)}
    for key in all_settings({SINGLE_METHOD: resolve_method(DEFAULT_METHOD)[0]}).values():
        if key.name not in own_keys:
            values = " | ".join(key.choices) or key.takes
            lines += [f"  {key.name}={_as_yaml(key.default)}", f"      {key.doc} ({values})"]
    lines += [
        "",
        "`method:` may be a list of such sections, each with its own targets; their keys are then method.0.r and so on",
        "",
        "each method's own, below `method.`; `subspace methods NAME` says what they mean:",
    ]
    for method in list_methods().values():
        own = [f"{name}={_as_yaml(key.default)}" for name, key in _declared(method.Config, "").items()]
        lines.append(f"  {method.name:<12} {' '.join(own) or '(none)'}")
    return "\n".join(lines)


def method_settings(name: str | None, overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return a method's settings by its name, or those of all methods, from ``key=value`` each and what an alias says.

    What only some of all methods have is set in those.
    """
    wanted = [resolve_method(name)] if name else [(method, {}) for method in list_methods().values()]
    declared = {method.name: _declared(method.Config, "") for method, _ in wanted}
    found = {method.name: dict(presets) for method, presets in wanted}
    for override in overrides:
        key, _, text = override.partition("=")
        able = [method for method in declared if key in declared[method]]
        if not able:
            owner = f"method {wanted[0][0].name}" if name else "no method"
            raise UserError(
                f"{owner} has {'no' if name else 'a'} setting '{key}'. {nearest(key, set().union(*declared.values()))}"
            )
        for method in able:
            found[method][key] = _convert(declared[method][key], text, "the command line", is_text=True)
    return found


def _as_yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True)
    return text.removesuffix("...\n").strip()


def read_config(file: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration; UserError where it cannot be what it says.

    Args:
        file: The YAML file, a user's or the one in a run's folder.
        overrides: ``key=value`` each, as ``train.steps=100``. ``method=dora`` drops the file's method and its settings.
    """
    file = Path(file)
    if not file.is_file():
        file = find_resource(file) or file
    return _resolve({"name": file.stem, **_from_file(file)}, overrides, str(file), file.parent)


def read_data_config(what: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read what a run would train on: its configuration, or a mixture, task or data file with all else by default."""
    if Path(what).suffix in (".yaml", ".yml") and "parts" not in _from_file(Path(what)):
        return read_config(what, overrides)
    return _resolve({"data.mixture": what, "name": "data"}, overrides, "the command line", Path())


def read_run_subject(folder: Path, overrides: Sequence[str] = ()) -> EvaluationSubject:
    """Read what a run trained."""
    if not (folder / "config.yaml").is_file():
        runs = [str(file.parent) for file in folder.parent.glob("*/config.yaml")]
        hint = nearest(str(folder), runs) if runs else "`subspace train CONFIG` makes one"
        raise UserError(f"'{folder}' is no run's folder: it holds no config.yaml. {hint}")
    config = read_config(folder / "config.yaml", overrides)
    adapter = folder / "adapter"
    if not adapter.is_dir():
        raise UserError(f"the run {folder} has no adapter: its training did not reach the end. Train it again")
    return EvaluationSubject(config.model, config.evaluate, folder, adapter, config.methods, config.data.mixture)


def read_subject(what: str, overrides: Sequence[str] = ()) -> EvaluationSubject:
    """Read what is to be scored: a run's folder, a configuration (then its base model), or a model's name or path."""
    if (Path(what) / "config.yaml").is_file() or (Path(what).parent.name == "runs" and not Path(what).exists()):
        return read_run_subject(Path(what), overrides)
    if Path(what).suffix in (".yaml", ".yml"):
        config = read_config(what, overrides)
    else:
        config = _resolve({"model.path": what, "name": "base"}, overrides, "the command line", Path())
    name = re.sub(r"[^\w.+-]+", "-", config.model.path).strip("-")
    return EvaluationSubject(config.model, config.evaluate, Path(config.runs) / name)


def _resolve(values: dict[str, Any], overrides: Sequence[str], where: str, beside: Path) -> RunConfig:
    """Compose values and overrides into a configuration.

    Args:
        values: Settings by name, as YAML gives them.
        overrides: ``key=value`` each.
        where: What the values come from, for messages.
        beside: A folder from which the engine's file may be named.
    """
    numbers = {int(found[1]) for name in values if (found := re.match(r"method\.(\d+)\.", name))}
    texts: dict[str, str] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"'{override}' stands where settings do, as key=value")
        if re.fullmatch(r"method(\.\d+)?", name):
            values = {k: v for k, v in values.items() if not k.startswith(f"{name}.") or k == f"{name}.targets"}
            numbers = set() if name == SINGLE_METHOD else numbers
            name = f"{name}.name"
        texts[name] = text

    parts: dict[str, type[Adapter]] = {}
    presets: dict[str, Any] = {}
    for part in [f"method.{number}" for number in sorted(numbers)] or [SINGLE_METHOD]:
        name = f"{part}.name"
        if numbers and name not in {**values, **texts}:
            raise UserError(f"{where}: each of several methods needs its name, and {part} has none")
        parts[part], aliased = resolve_method(str({name: DEFAULT_METHOD, **values, **texts}[name]))
        presets |= {f"{part}.{key}": value for key, value in aliased.items()}
    known = all_settings(parts)
    given: dict[str, Any] = {}
    for source, origin in ((values, where), (texts, "the command line")):
        # An alias's settings come with its name, so before those that stand beside the name.
        given |= {name: value for name, value in presets.items() if f"{name.rpartition('.')[0]}.name" in source}
        for name, value in source.items():
            if name not in known:
                raise UserError(f"{origin} sets '{name}', but {_suggest(name, known, parts)}")
            given[name] = _convert(known[name], value, origin, is_text=source is texts)
    given["engine"] = _find_engine(given.get("engine", known["engine"].default), beside)
    return _build(given, parts, known)


def write_config(config: RunConfig, file: Path) -> None:
    """Write a configuration so that :func:`read_config` gives it back, here and on another machine."""
    plain = config.as_dict()
    engine = Path(config.engine)
    plain["engine"] = resource_name(engine) or str(engine)
    write_file(file, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120))


class _StrictLoader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which a key that stands twice is an error; plain YAML lets the last one win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' stands here twice", problem_mark=key.start_mark)
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _from_file(file: Path) -> dict[str, Any]:
    """Read a YAML file into ``{'train.steps': 100}``."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        recipes = [f"launch/recipes/{path.name}" for path in recipes_folder().glob("*.yaml")]
        near = nearest(str(file), recipes).partition("There are: ")[0]  # there are too many to list
        raise UserError(f"there is no configuration file '{file}'. {near}Recipes lie in launch/recipes") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the configuration file '{file}' cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line} is not YAML that can be understood: {error.problem}") from None

    if not isinstance(content, dict):
        raise UserError(f"{file} holds no settings. It should have sections as 'train:', each with lines 'key: value'")
    values: dict[str, Any] = {}
    if content.get(SINGLE_METHOD) == []:
        raise UserError(f"{file}: method is an empty list, so nothing would be trained. {nearest('', list_methods())}")
    several = isinstance(content.get(SINGLE_METHOD), list)
    if several:
        content |= {f"{SINGLE_METHOD}.{number}": part for number, part in enumerate(content.pop(SINGLE_METHOD))}
    for name, value in content.items():
        is_method = name == SINGLE_METHOD or (several and str(name).startswith(f"{SINGLE_METHOD}."))
        if is_method and isinstance(value, str):
            value = {"name": value}
        if name not in SECTIONS and not is_method:
            values[str(name)] = value
        elif isinstance(value, dict):
            values.update({f"{name}.{key}": inner for key, inner in value.items()})
        elif value is not None or several:
            raise UserError(f"{file}: {name} is {value!r}, but is a section: lines 'key: value' below '{name}:'")
    return values


def _convert(key: SettingInfo, value: Any, where: str, *, is_text: bool) -> Any:
    """Convert what the file or the command line gives to the setting's type."""
    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_argument("--value", type=key.type)
    value = _as_list(key, value)
    try:
        # Text is read as YAML would read it; what comes out of a YAML file has been.
        parsed = parser.parse_args([f"--value={value}"]) if is_text else parser.parse_object({"value": value})
    except ArgumentError:
        raise UserError(f"{where} sets {key.name} to {value!r}, but it takes {key.takes}: {key.doc}") from None
    return parsed["value"]


def _as_list(key: SettingInfo, value: Any) -> Any:
    """Let ``q_proj,v_proj`` stand for a list where text alone is not allowed."""
    plain_text = isinstance(value, str) and not value.startswith("[") and value not in ("", "null")
    return f"[{value}]" if plain_text and "a list" in key.takes and "text" not in key.takes else value


def _build(given: Mapping[str, Any], parts: Mapping[str, type[Adapter]], known: Mapping[str, SettingInfo]) -> RunConfig:
    top = {key: value for key, value in given.items() if "." not in key and key != "targets"}
    config = RunConfig(
        **top,
        method=tuple(_part(given, part, method, known) for part, method in parts.items()),
        **{name: _declare(declaration, _below(name, given), name) for name, declaration in SECTIONS.items()},
    )
    if not re.fullmatch(r"[\w.+-]+", config.name) or config.name in (".", ".."):
        raise UserError(f"name is '{config.name}', but names a folder: letters, digits and . _ + - only")
    return config


def _part(given: Mapping[str, Any], part: str, method: type[Adapter], known: Mapping[str, SettingInfo]) -> MethodEntry:
    below = _below(part, given)
    own = {f.name: below[f.name] for f in dataclasses.fields(method.Config) if f.name in below}
    settings, typed = _declare(method.Config, own, part), {}
    for pattern, changes in below.get("patterns", {}).items():
        where = f"{part}.patterns, for {pattern!r},"
        for key in changes:
            if key not in dataclasses.asdict(settings):
                raise UserError(f"{where} sets '{key}', but {_suggest(f'{part}.{key}', known, {part: method})}")
        typed[pattern] = {k: _convert(known[f"{part}.{k}"], v, where, is_text=False) for k, v in changes.items()}
        _declare(partial(dataclasses.replace, settings), typed[pattern], part)
    targets = (given if part == SINGLE_METHOD else below).get("targets")
    return MethodEntry(name=method.name, settings=settings, targets=targets, patterns=typed)


def _below(section: str, given: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{section}."
    return {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}


def _declare(declaration: Callable[..., Any], values: Mapping[str, Any], section: str) -> Any:
    try:
        return declaration(**values)
    except UserError as error:  # names the class's field; the user knows it by its key
        raise UserError(re.sub(r"^[\w.]+\.(?=\w+ is )", f"{section}.", str(error))) from None


def _suggest(name: str, known: Mapping[str, SettingInfo], parts: Mapping[str, type[Adapter]]) -> str:
    """Say what there is instead of an unknown setting: in its section, or elsewhere, or which sections."""
    section, _, word = name.rpartition(".")
    inside = {key.removeprefix(f"{section}."): key for key in known if key.startswith(f"{section}.")}
    if inside and (section != SINGLE_METHOD or SINGLE_METHOD in parts):
        owner = f"method {parts[section].name}" if section in parts else section
        beside = f"'{word}' stands beside the section. " if word in known else ""
        return f"{owner} has no setting '{word}'. {beside}{nearest(word, inside)}"
    if any(key.startswith(f"{name}.") for key in known):
        return f"{name} is a section. Its settings are given one by one, as {name}.KEY=VALUE"
    same = [key for key in known if key.rpartition(".")[2] == word]
    sections = {key.partition(".")[0] for key in known}
    hint = f"Did you mean '{same[0]}'?" if same else nearest(name, sections)
    return f"there is no such setting. {hint}"


def _find_engine(path: str, beside: Path) -> str:
    """Find the engine's file from the current folder, from the configuration's, or among the project's own.

    Where there is none, the path stays: only training opens it, and a run is scored without.
    """
    found = next((place / path for place in (Path(), beside) if (place / path).is_file()), None) or find_resource(path)
    return str(found.resolve()) if found else path

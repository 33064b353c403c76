"""A run's configuration: one YAML file and ``key=value`` overrides, typed by the settings that each part declares.

This file only composes them: the keys, types, defaults, bounds and explanations are those of :class:`ModelConfig`, of
the method's own ``Config``, and so on. jsonargparse converts and checks types. Unknown keys are refused with the
nearest known one.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from subspace.batches import DataConfig
from subspace.errors import UserError, nearest
from subspace.evaluate import EvaluateConfig
from subspace.method import Adapter, MethodConfig, find_method, methods
from subspace.model import ModelConfig
from subspace.paths import REPOSITORY
from subspace.settings import Settings, setting
from subspace.train import TrainConfig

SECTIONS: dict[str, type[Settings]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
}
DEFAULT_METHOD = "lora"


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """Which method, and its own settings."""

    name: str
    settings: MethodConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """Everything about one run."""

    name: str = setting("", "name of the run, whose folder is RUNS/NAME; by default the configuration file's")
    runs: str = setting("runs", "folder in which the runs' folders lie")
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodChoice
    targets: list[str] | None = setting(None, "layers that get an adapter, as q_proj; null for the usual ones")
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: str = setting("ds_configs/zero1.json", "DeepSpeed's own configuration, a JSON file")
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs) / self.name

    def as_dict(self) -> dict[str, Any]:
        """Return plain values in the form of the YAML file."""
        plain = dataclasses.asdict(self)
        plain["method"] = {"name": self.method.name, **plain["method"]["settings"]}
        return plain


@dataclass(frozen=True)
class Key:
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
        return " or ".join(words.get(member, "a list") for member in members)


def keys(method: type[Adapter]) -> dict[str, Key]:
    """Return every setting of a run with this method, by name."""
    found = [_declared(RunConfig, "")[name] for name in ("name", "runs", "targets", "engine")]
    found += [Key("method.name", str, DEFAULT_METHOD, "the method; `subspace methods` lists them")]
    for section, declaration in {**SECTIONS, "method": method.Config}.items():
        found += _declared(declaration, f"{section}.").values()
    order = [f.name for f in dataclasses.fields(RunConfig)]
    return {key.name: key for key in sorted(found, key=lambda key: order.index(key.name.split(".")[0]))}


def _declared(declaration: type[Settings], prefix: str) -> dict[str, Key]:
    types_of, found = typing.get_type_hints(declaration), {}
    for f in dataclasses.fields(declaration):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        doc, choices = f.metadata.get("doc", ""), f.metadata.get("choices", ())
        found[f.name] = Key(prefix + f.name, types_of[f.name], default, doc, choices)
    return found


def manual() -> str:
    """Return every setting with its default and what it means, and every method's own settings with theirs."""
    lines = ["settings, in the configuration or as key=value:"]
    for key in keys(find_method(DEFAULT_METHOD)).values():
        if not key.name.startswith("method.") or key.name == "method.name":
            values = " | ".join(key.choices) or key.takes
            lines += [f"  {key.name}={_as_yaml(key.default)}", f"      {key.doc} ({values})"]
    lines += ["", "each method's own, below `method.`; `subspace methods NAME` says what they mean:"]
    for method in methods().values():
        own = [f"{f.name}={_as_yaml(f.default)}" for f in dataclasses.fields(method.Config)]
        lines.append(f"  {method.name:<10} {' '.join(own) or '(none)'}")
    return "\n".join(lines)


def _as_yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True)
    return text.removesuffix("...\n").strip()


def read(file: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration; UserError where it cannot be what it says.

    Args:
        file: The YAML file, a user's or the one in a run's folder.
        overrides: ``key=value`` each, as ``train.steps=100``. ``method=dora`` drops the file's method and its settings.
    """
    file = Path(file)
    return _resolve({"name": file.stem, **_from_file(file)}, overrides, str(file), file.parent)


@dataclass(frozen=True)
class Subject:
    """What is scored: a model as it is, or with the adapters of a run."""

    model: ModelConfig
    evaluate: EvaluateConfig
    folder: Path  # where the results go
    adapter: Path | None = None
    method: str = ""


def read_run(folder: Path, overrides: Sequence[str] = ()) -> Subject:
    """Read what a run trained."""
    if not (folder / "config.yaml").is_file():
        runs = [str(file.parent) for file in folder.parent.glob("*/config.yaml")]
        hint = nearest(str(folder), runs) if runs else "`subspace train CONFIG` makes one"
        raise UserError(f"'{folder}' is no run's folder: it holds no config.yaml. {hint}")
    config = read(folder / "config.yaml", overrides)
    adapter = folder / "adapter"
    if not adapter.is_dir():
        raise UserError(f"the run {folder} has no adapter: its training did not reach the end. Train it again")
    return Subject(config.model, config.evaluate, folder, adapter, config.method.name)


def read_subject(what: str, overrides: Sequence[str] = ()) -> Subject:
    """Read what is to be scored: a run's folder, a configuration (then its base model), or a model's name or path."""
    if (Path(what) / "config.yaml").is_file() or (Path(what).parent.name == "runs" and not Path(what).exists()):
        return read_run(Path(what), overrides)
    if Path(what).suffix in (".yaml", ".yml"):
        config = read(what, overrides)
    else:
        config = _resolve({"model.path": what, "name": "base"}, overrides, "the command line", Path())
    name = re.sub(r"[^\w.+-]+", "-", config.model.path).strip("-")
    return Subject(config.model, config.evaluate, Path(config.runs) / name)


def _resolve(values: dict[str, Any], overrides: Sequence[str], where: str, beside: Path) -> RunConfig:
    """Compose values and overrides into a configuration.

    Args:
        values: Settings by name, as YAML gives them.
        overrides: ``key=value`` each.
        where: What the values come from, for messages.
        beside: A folder from which the engine's file may be named.
    """
    texts: dict[str, str] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"'{override}' stands where settings do, as key=value")
        if name == "method":
            values = {key: value for key, value in values.items() if not key.startswith("method.")}
            name = "method.name"
        texts[name] = text

    method = find_method(str(texts.get("method.name", values.get("method.name", DEFAULT_METHOD))))
    known = keys(method)
    given: dict[str, Any] = {}
    for source, origin in ((values, where), (texts, "the command line")):
        for name, value in source.items():
            if name not in known:
                raise UserError(f"{origin} sets '{name}', but {_suggest(name, known, method)}")
            given[name] = _convert(known[name], value, origin, is_text=source is texts)
    given["method.name"] = method.name
    given["engine"] = _find_engine(given.get("engine", known["engine"].default), beside)
    return _build(given, method)


def write(config: RunConfig, file: Path) -> None:
    """Write a configuration so that :func:`read` gives it back, here and on another machine."""
    plain = config.as_dict()
    engine = Path(config.engine)
    if engine.is_relative_to(REPOSITORY):
        plain["engine"] = str(engine.relative_to(REPOSITORY))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120))
    os.replace(partial, file)  # noqa: PTH105


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
        recipes = [str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "launch" / "recipes").glob("*.yaml")]
        hint = f". {nearest(str(file), recipes)}" if recipes else ""
        raise UserError(f"there is no configuration file '{file}'{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the configuration file '{file}' cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line} is not YAML that can be understood: {error.problem}") from None

    if not isinstance(content, dict):
        raise UserError(f"{file} holds no settings. It should have sections as 'train:', each with lines 'key: value'")
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name == "method" and isinstance(value, str):
            value = {"name": value}
        if name not in SECTIONS and name != "method":
            values[str(name)] = value
        elif isinstance(value, dict):
            values.update({f"{name}.{key}": inner for key, inner in value.items()})
        elif value is not None:
            raise UserError(f"{file}: {name} is {value!r}, but is a section: lines 'key: value' below '{name}:'")
    return values


def _convert(key: Key, value: Any, where: str, *, is_text: bool) -> Any:
    """Convert what the file or the command line gives to the setting's type."""
    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_argument(f"--{key.name}", type=key.type)
    value = _as_list(key, value)
    try:
        # Text is read as YAML would read it; what comes out of a YAML file has been.
        parsed = parser.parse_args([f"--{key.name}={value}"]) if is_text else parser.parse_object({key.name: value})
    except ArgumentError:
        raise UserError(f"{where} sets {key.name} to {value!r}, but it takes {key.takes}: {key.doc}") from None
    return parsed[key.name]


def _as_list(key: Key, value: Any) -> Any:
    """Let ``q_proj,v_proj`` stand for a list where text alone is not allowed."""
    plain_text = isinstance(value, str) and not value.startswith("[") and value not in ("", "null")
    return f"[{value}]" if plain_text and "a list" in key.takes and "text" not in key.takes else value


def _build(given: Mapping[str, Any], method: type[Adapter]) -> RunConfig:
    def section(name: str, declaration: type[Any]) -> Any:
        prefix = f"{name}."
        own = {
            key.removeprefix(prefix): value
            for key, value in given.items()
            if key.startswith(prefix) and key != "method.name"
        }
        try:
            return declaration(**own)
        except UserError as error:  # names the class's field; the user knows it by its key
            raise UserError(str(error).replace(f"{declaration.__qualname__}.", prefix)) from None

    top = {key: value for key, value in given.items() if "." not in key}
    choice = MethodChoice(name=method.name, settings=section("method", method.Config))
    config = RunConfig(
        **top, method=choice, **{name: section(name, declaration) for name, declaration in SECTIONS.items()}
    )
    if not re.fullmatch(r"[\w.+-]+", config.name) or config.name in (".", ".."):
        raise UserError(f"name is '{config.name}', but names a folder: letters, digits and . _ + - only")
    return config


def _suggest(name: str, known: Mapping[str, Key], method: type[Adapter]) -> str:
    """Say what there is instead of an unknown setting: in its section, or elsewhere, or which sections."""
    section, _, word = name.rpartition(".")
    inside = {key.removeprefix(f"{section}."): key for key in known if key.startswith(f"{section}.")}
    if inside:
        owner = f"method {method.name}" if section == "method" else section
        return f"{owner} has no setting '{word}'. {nearest(word, inside)}"
    if any(key.startswith(f"{name}.") for key in known):
        return f"{name} is a section. Its settings are given one by one, as {name}.KEY=VALUE"
    same = [key for key in known if key.rpartition(".")[2] == word]
    sections = {key.partition(".")[0] for key in known}
    hint = f"Did you mean '{same[0]}'?" if same else nearest(name, sections)
    return f"there is no such setting. {hint}"


def _find_engine(path: str, beside: Path) -> str:
    """Find the engine's file from the current folder, from the configuration's, or in the repository.

    Where there is none, the path stays: only training opens it, and a run is scored without.
    """
    places = (Path(), beside, REPOSITORY)
    return next((str((place / path).resolve()) for place in places if (place / path).is_file()), path)

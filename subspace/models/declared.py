"""Models and architectures declared in YAML: embedded models, and shapes for counting parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from subspace.common import paths
from subspace.common.declarations import Declaration, build, find_declared, read_folder
from subspace.common.foreign.yaml_files import read_yaml


@dataclass(frozen=True)
class EmbeddedModel(Declaration):
    """A model that a wheel on PyPI contains as a GGUF file."""

    name: str
    title: str
    aliases: tuple[str, ...]
    license: str
    parameters: int
    wheel: str
    file: str
    pad: str


@dataclass(frozen=True)
class ModelShape(Declaration):
    """The config.json values that determine the shapes of a model's tensors, and the checkpoints that have them."""

    checkpoints: tuple[str, ...]
    parameters: int
    config: Mapping[str, Any]


def embedded_models() -> dict[str, EmbeddedModel]:
    """Return the models that are available without the hub."""
    return read_folder("models", EmbeddedModel)


def embedded_model(name: str) -> EmbeddedModel:
    """Return an embedded model by its name or an alias."""
    return find_declared(name, embedded_models(), "embedded model")


def model_shapes() -> dict[str, ModelShape]:
    """Return the architectures whose parameters can be counted without model files."""
    declared = read_yaml(paths.declarations_folder() / "shapes.yaml")
    return {name: build(ModelShape, shape, "shapes.yaml") for name, shape in declared.items()}

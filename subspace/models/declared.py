"""Models and architectures that are declared in YAML: the embedded ones, and shapes to count in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from subspace.common import paths
from subspace.common.declarations import Declaration, build, find_declared, read_folder, read_yaml


@dataclass(frozen=True)
class EmbeddedModel(Declaration):
    """A model that a wheel on PyPI carries as a GGUF file."""

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
    """What decides the shapes of a model's tensors: the values of its config.json, and which checkpoints have them."""

    checkpoints: tuple[str, ...]
    parameters: int
    config: Mapping[str, Any]


def embedded_models() -> dict[str, EmbeddedModel]:
    """Return the models that come with no hub."""
    return read_folder("models", EmbeddedModel)


def embedded_model(name: str) -> EmbeddedModel:
    """Return one of these models by its name or an alias."""
    return find_declared(name, embedded_models(), "embedded model")


def model_shapes() -> dict[str, ModelShape]:
    """Return the architectures that can be counted in without any file of a model."""
    declared = read_yaml(paths.declarations_folder() / "shapes.yaml")
    return {name: build(ModelShape, shape, "shapes.yaml") for name, shape in declared.items()}

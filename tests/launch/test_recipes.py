"""The recipes of published rows: each opens, names its sources, and trains what was published, on the true shape."""

from __future__ import annotations

import functools
import re

import pytest
from torch import nn

from subspace import config as config_module
from subspace.adapters.parameter_count import count_trained
from subspace.common.paths import REPOSITORY
from subspace.data.tasks import list_tasks
from subspace.models.config import ModelConfig
from subspace.models.loading import declared_shapes, open_shape

FOLDER = REPOSITORY / "launch" / "recipes"

# Trained numbers; what was published of them: a share in per cent of model and adapters, or how many more than LoRA of
# that rank, in thousands. The integers are those of the formulas, over q, k, v, up and down: a LLaMA-7B has 876,544
# inputs and as many outputs there, a LLaMA-13B 1,372,160, a LLaMA3-8B 983,040 and 786,432.
ROWS: dict[str, tuple[int, float | None, float | None]] = {
    "llama-7b-prefix": (7_864_320, 0.11, None),
    "llama-7b-series": (67_108_864, 0.99, None),
    "llama-7b-parallel": (247_463_936, 3.54, None),
    "llama-7b-lora-r32": (56_098_816, 0.83, 0),
    "llama-7b-dora-r4": (7_888_896, None, 877),
    "llama-7b-dora-r8": (14_901_248, None, None),
    "llama-7b-dora-r16": (28_925_952, None, None),
    "llama-7b-dora-r32": (56_975_360, 0.84, 877),
    "llama-7b-adalora-r32": (56_103_936, None, 5.1),
    "llama-7b-flora-r32": (56_262_656, None, 164),
    "llama-7b-lora-dash-r32": (56_100_096, None, 1.3),
    "llama-7b-liera-r32": (56_098_816, None, 0),
    "llama-13b-lora-r32": (87_818_240, 0.67, 0),
    "llama-13b-parallel": (387_973_120, 2.89, None),
    "llama-13b-dora-r32": (89_190_400, 0.68, None),
    "llama2-7b-lora-r32": (56_098_816, 0.83, 0),
    "llama2-7b-dora-r16": (28_925_952, None, None),
    "llama2-7b-dora-r32": (56_975_360, None, None),
    "llama2-7b-pissa-r32": (56_098_816, None, None),
    "llama2-7b-milora-r32": (56_098_816, None, None),
    "llama3-8b-lora-r16": (28_311_552, 0.35, 0),
    "llama3-8b-lora-r32": (56_623_104, 0.70, 0),
    "llama3-8b-dora-r16": (29_097_984, None, 786),
    "llama3-8b-dora-r32": (57_409_536, None, 786),
    "llama3-8b-adalora-r16": (28_314_112, None, 2.6),
    "llama3-8b-flora-r16": (28_352_512, None, 41),
    "llama3-8b-pissa-r32": (56_623_104, None, 0),
    "llama3-8b-milora-r32": (56_623_104, None, 0),
    "llama3-8b-lora-dash-r16": (28_312_832, None, 1.3),
    "llama3-8b-lora-dash-r32": (56_624_384, None, 1.3),
    "llama3-8b-liera-r32": (56_623_104, None, 0),
}


@functools.cache
def shape(path: str) -> nn.Module:
    return open_shape(ModelConfig(path=path))


@functools.cache
def size(path: str) -> int:
    return sum(parameter.numel() for parameter in shape(path).parameters())


def test_every_recipe_of_a_llama_is_in_the_table() -> None:
    assert {file.stem for file in FOLDER.glob("llama*.yaml")} == set(ROWS)


def test_every_recipe_trains_what_was_published() -> None:
    for name, (trained, share, more) in ROWS.items():
        hold(name, trained, share, more)


def hold(name: str, trained: int, share: float | None, more: float | None) -> None:
    """Count what a recipe trains and compare it with the published number, share and surplus over LoRA."""
    run = config_module.read_config(FOLDER / f"{name}.yaml")
    (part,) = run.method
    counted = functools.partial(count_trained, shape(run.model.path), targets=part.targets)
    assert counted(part.name, part.settings) == trained, name
    if share is not None:
        # Rounded, except for prefix tuning's, which was cut.
        assert 100 * trained / (size(run.model.path) + trained) == pytest.approx(share, abs=0.0071), name
    if more is not None:
        lora = counted("lora", {"r": part.settings.r})  # type: ignore[attr-defined]
        assert (trained - lora) / 1000 == pytest.approx(more, abs=0.05 if more < 10 else 0.5), name


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_says_where_its_score_and_settings_are_from(name: str) -> None:
    comments = re.findall(r"^# (.*)$", (FOLDER / f"{name}.yaml").read_text(), re.MULTILINE)
    assert re.fullmatch(r"\S.*, on the commonsense tasks(, with [\d.]+ % trained)?\.", comments[0])
    assert re.fullmatch(r"Settings: \S.*, \S.*\.", comments[1])
    published = config_module.read_config(FOLDER / f"{name}.yaml").published
    assert published is not None
    assert published["source"]
    scores = [score for task, score in published.items() if task in list_tasks() and isinstance(score, float)]
    assert len(scores) in (0, 8)
    assert len(scores) == len(published) - 2
    if scores:
        assert sum(scores) / len(scores) == pytest.approx(published["average"], abs=0.1)


@pytest.mark.parametrize("name", ["llama-7b", "llama-13b", "llama2-7b", "llama3-8b"])
def test_a_declared_shape_has_the_size_of_its_checkpoints(name: str) -> None:
    declared = declared_shapes()[name]
    assert {size(path) for path in (name, *declared.checkpoints[:1])} == {declared.parameters}

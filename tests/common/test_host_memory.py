"""How the process allocates is changed by the command line only, and its memory is told as the system counts it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from subspace.cli.main import main
from subspace.common import host_memory
from subspace.common.host_memory import (
    LARGE,
    LARGEST,
    MMAP_THRESHOLD,
    NEVER,
    TRIM_THRESHOLD,
    manage_malloc,
    resident_memory,
    set_malloc_trim,
)
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model
from tests.helpers.material import make_material
from tests.helpers.tiny_models import tiny_llama


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What is set of malloc from now on, in a process that nothing was set of."""
    seen: list[tuple[int, int]] = []
    libc = SimpleNamespace(mallopt=lambda option, value: seen.append((option, value)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(host_memory, "_managed", False)
    return seen


def test_nothing_is_set_where_no_program_asked(options: list[tuple[int, int]]) -> None:
    set_malloc_trim(True)
    set_malloc_trim(False)
    assert options == []


def test_a_program_has_freed_memory_returned_or_kept(options: list[tuple[int, int]]) -> None:
    manage_malloc()
    set_malloc_trim(True)
    assert options == [(MMAP_THRESHOLD, LARGE), (TRIM_THRESHOLD, LARGE)]
    options.clear()
    set_malloc_trim(False)
    assert options == [(MMAP_THRESHOLD, LARGEST), (TRIM_THRESHOLD, NEVER)]


def test_opening_a_model_from_python_leaves_malloc_alone(options: list[tuple[int, int]], tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    open_model(ModelConfig(path=str(tmp_path)))
    assert options == []


@pytest.mark.parametrize(("keeps", "threshold"), [("true", NEVER), ("false", LARGE)])
def test_a_training_command_keeps_freed_memory_or_has_it_returned(
    options: list[tuple[int, int]], tmp_path: Path, keeps: str, threshold: int
) -> None:
    config = make_material(tmp_path)
    settings = [f"runs={tmp_path / 'runs'}", "train.steps=1", f"train.keep_memory={keeps}"]
    assert main(["train", str(config), *settings]) == 0
    assert options[-1] == (TRIM_THRESHOLD, threshold)


def test_resident_memory_grows_with_what_is_held() -> None:
    before = resident_memory()
    held = torch.ones(1 << 25)
    assert resident_memory() - before >= 0.9 * held.nbytes
    assert resident_memory("VmHWM") >= resident_memory("VmRSS") > 0
    assert resident_memory("no such line") == 0

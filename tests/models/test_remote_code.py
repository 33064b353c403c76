"""Code that comes with a model or a run runs where this call's command line says so, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from subspace.adapters.inject import inject
from subspace.adapters.serialization import save_adapter
from subspace.config import read_config, read_data_config, read_run_subject, read_subject
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model, open_tokenizer
from tests.helpers.tiny_models import tiny_llama

FLAG = "model.trust_remote_code=true"
METHOD = """
from pathlib import Path
Path({canary!r}).touch()
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import nn
from subspace.adapters.base import LinearAdapter, MethodConfig
from subspace.adapters.registry import register
@register("theirs", family="tuning", num_params="n_in")
class Theirs(LinearAdapter):
    roles: ClassVar = {{"v": "down"}}
"""


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def theirs(tmp_path: Path, canary: Path) -> Path:
    """Return somebody else's run: its model brings code, its configuration trusts it."""
    model = tmp_path / "model"
    adapted = tiny_llama(model)
    inject(adapted, "lora", {"r": 4}, targets=["q_proj"])
    config = json.loads((model / "config.json").read_text())
    autos = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "theirs", "auto_map": autos}))
    code = f"from pathlib import Path\nPath({str(canary)!r}).touch()\nclass Config:\n    pass\n"
    (model / "evil.py").write_text(code)
    run = tmp_path / "runs" / "theirs"
    save_adapter(adapted, run / "adapter")
    about = {"model": {"path": str(model), "dtype": "float32", "trust_remote_code": True}, "method": {"name": "lora"}}
    (run / "config.yaml").write_text(yaml.safe_dump(about))
    return run


def open_all(config: ModelConfig) -> None:
    open_tokenizer(config)
    open_model(config)


def readers(run: Path, settings: Sequence[str] = ()) -> dict[str, ModelConfig]:
    """Return the model's settings as each verb reads them: from a run, from the file itself, from one built on it."""
    file = run / "config.yaml"
    above = run.parent / "mine.yaml"
    above.write_text("base: theirs/config.yaml\n")
    return {
        "evaluate": read_subject(str(run), settings).model,
        "merge": read_run_subject(run, settings).model,
        "train": read_config(file, settings).model,
        "resume": read_config(file, settings, found_in_run=True).model,
        "data": read_data_config(str(file), settings).model,
        "built on it": read_config(above, settings).model,
        "evaluate the file": read_subject(str(file), settings).model,
    }


def test_no_file_makes_a_models_code_run(theirs: Path, canary: Path) -> None:
    for verb, config in readers(theirs).items():
        assert config.trust_remote_code is False, verb
        with pytest.raises(UserError, match=f"`{FLAG}` on the command line runs it"):
            open_all(config)
    assert not canary.exists()


def test_the_command_line_does(theirs: Path, canary: Path) -> None:
    assert all(config.trust_remote_code for config in readers(theirs, [FLAG]).values())
    with pytest.raises(UserError):  # it is no model
        open_all(read_run_subject(theirs, [FLAG]).model)
    assert canary.exists()


def test_what_is_passed_over_is_told_once(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        read_config(theirs / "config.yaml")
    told = capsys.readouterr().err
    assert told.count("sets model.trust_remote_code, which counts on the command line only") == 1


@pytest.mark.parametrize("beside", ["environment.json", "adapter/", "checkpoints/", "method/", "log.jsonl"])
def test_a_methods_file_in_a_runs_folder_is_not_run_by_naming_its_configuration(
    beside: str, tmp_path: Path, canary: Path
) -> None:
    run = tmp_path / "runs" / "theirs"
    run.mkdir(parents=True)
    made = run / beside
    made.mkdir() if beside.endswith("/") else made.touch()
    (run / "theirs.py").write_text(METHOD.format(canary=str(canary)) + f"# {beside}\n")
    about: dict[str, Any] = {"method": {"name": "theirs", "file": "theirs.py"}}
    (run / "config.yaml").write_text(yaml.safe_dump(about))
    (run.parent / "mine.yaml").write_text("base: theirs/config.yaml\n")
    for file in (run / "config.yaml", run.parent / "mine.yaml"):
        with pytest.raises(UserError, match="code that you have not run before"):
            read_config(file)
    assert not canary.exists()

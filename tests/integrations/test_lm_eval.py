"""lm-evaluation-harness on a run's adapters: its own tasks, scored as this project scores them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from subspace.adapters.inject import inject, trained_parameters
from subspace.adapters.serialization import save_adapter
from subspace.common.paths import REPOSITORY
from subspace.data import tasks as tasks_module
from subspace.errors import UserError
from subspace.evaluation.protocols.likelihood import Likelihood
from tests.helpers.items import items
from tests.helpers.tiny_models import bpe_tokenizer, tiny_llama

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the harness warns of when it is imported
    pytest.importorskip("lm_eval", reason="needs lm-eval")  # the library alone: a helper that has moved must fail
    from subspace.integrations.lm_eval import SubspaceLM
    from tests.helpers import lm_eval_harness as harness


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Leave what a run of LoRA on a tiny model leaves."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    tiny_llama(folder / "base")
    model = tiny_llama()
    inject(model, "lora")
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save_adapter(model, folder / "adapter")
    config = {"model": {"path": str(folder / "base"), "dtype": "float32"}, "method": {"name": "lora"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def adapted() -> Any:
    model = tiny_llama()
    inject(model, "lora")
    for parameter in trained_parameters(model).values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return model


@torch.no_grad()
def test_the_harness_scores_the_adapters(run: Path) -> None:
    made, task = items("arc_easy", 12), tasks_module.find_task("arc_easy")
    theirs = harness.harness_scores(SubspaceLM(run=str(run), batch_size=4), harness.harness_task("arc_easy", made))
    flat = [score for scores in theirs for score in scores]

    def ours(model: Any) -> list[float]:
        records = Likelihood(model, bpe_tokenizer(), task, made).score(model, range(12))
        return [score for record in records for score in record["scores"]]

    assert flat == pytest.approx(ours(adapted()), abs=1e-3)
    assert flat != pytest.approx(ours(tiny_llama()), abs=0.1)


def test_settings_of_the_model_are_taken(run: Path) -> None:
    assert SubspaceLM(run=str(run), dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(UserError, match="model has no setting 'dtyp'"):
        SubspaceLM(run=str(run), dtyp="bfloat16")


@pytest.mark.long
@pytest.mark.processes
def test_the_harness_s_command_takes_it(run: Path, tmp_path: Path) -> None:
    rows = [{"q": item["question"], "c": item["choices"], "a": item["label"]} for item in items("openbookqa", 8)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    own = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "{{a}}",
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    command = [sys.executable, "-m", "subspace.integrations.lm_eval", "--model", "subspace", "--tasks", "own"]
    command += ["--model_args", f"run={run}", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("out/**/results*.json")
    assert 0 <= json.loads(file.read_text())["results"]["own"]["acc,none"] <= 1

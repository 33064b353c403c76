"""What people type: the names of other programs, and of habit, are answered with the name here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from subspace.adapters.registry import list_methods, resolve_method
from subspace.cli import main as cli
from subspace.common.settings import split_names
from subspace.common.synonyms import SETTINGS, VALUES, setting_elsewhere
from subspace.config import METHOD, all_settings, read_config

KNOWN = all_settings({METHOD: list_methods()["lora"]})
OF_METHODS = {name for method in list_methods().values() for name in all_settings({METHOD: method})}


def settings_in(advice: str) -> list[str]:
    return [word.partition("=")[0] for word in advice.partition(":")[0].split() if not word.isupper()]


def test_every_answer_names_settings_that_there_are() -> None:
    options = {"--resume", "--processes"}
    answers = [*SETTINGS.values(), *VALUES["method"].values()]
    unknown = {name for advice in answers for name in settings_in(advice)} - OF_METHODS - options - {"method"}
    assert unknown == set()


@pytest.mark.parametrize("setting", sorted(set(VALUES) - {"method", "targets"}))
def test_every_answer_to_a_value_is_one_that_the_setting_takes(setting: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("{}")
    for value in set(VALUES[setting].values()):
        assert read_config(file, [f"{setting}={value}"])


def test_every_answer_to_a_method_is_one_that_there_is() -> None:
    for advice in VALUES["method"].values():
        found = re.match(r"method=(\S+)", advice)
        assert found
        assert resolve_method(found[1])


def test_no_name_of_ours_is_taken_for_one_of_elsewhere() -> None:
    for setting, known in VALUES.items():
        choices = set(KNOWN[setting].choices) if setting in KNOWN else set()
        assert not choices & set(known), setting
    for name in KNOWN:
        advice = setting_elsewhere(name)
        assert advice is None or name.rpartition(".")[2] in split_names(advice.replace(".", ",").replace("=", ",")), (
            name
        )


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("method=qlora", "method=lora model.quantize=nf4"),
        ("method.rank=8", "method.r"),
        ("model.dtype=bf16", "model.dtype=bfloat16"),
        ("model.quantize=4bit", "model.quantize=nf4"),
        ("bf16=true", "model.dtype=bfloat16"),
        ("train.trackers=none", "train.trackers=[]"),
        ("train.schedule=cosine_with_restarts", "train.schedule=cosine"),
        ("train.optimizer=adamw_torch", "train.optimizer=adamw"),
        ("model.attention=flash_attn", "model.attention=flash_attention_2"),
        ("train.per_device_train_batch_size=4", "train.micro_batch_size"),
        ("gradient_accumulation_steps=4", "train.batch_size"),
        ("num_train_epochs=3", "train.epochs"),
        ("lora_alpha=16", "method.alpha"),
        ("lora_target=q_proj", "targets"),
        ("cutoff_len=512", "data.max_length"),
        ("sequence_len=512", "data.max_length"),
        ("load_in_4bit=true", "model.quantize=nf4"),
        ("report_to=none", "train.trackers"),
        ("model_name_or_path=x", "model.path"),
        ("base_model=x", "model.path"),
        ("--lr", "train.learning_rate"),
        ("--learning_rate", "train.learning_rate"),
        ("--nproc_per_node", "--processes"),
        ("--resume_from_checkpoint", "--resume"),
    ],
)
def test_a_word_from_elsewhere_is_answered_with_what_to_write(
    typed: str, answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {trackers: []}\n")
    assert cli.main(["train", str(file), typed, "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert f"Here it is {answer}" in told
    assert max(map(len, told.splitlines())) < 400

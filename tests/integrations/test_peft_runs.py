"""Runs made of HF PEFT's adapters, and PEFT's folders made of runs: the same model, the same refusals, nothing half."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace.adapters.inject import adapters
from subspace.adapters.serialization import load_adapter, read_description
from subspace.cli.main import main
from subspace.config import read_run_subject
from subspace.errors import UserError
from subspace.evaluation.subjects import check_contamination
from subspace.integrations.peft.reading import CONFIG
from subspace.integrations.peft.runs import export_run, import_run
from subspace.models.loading import open_model
from tests.helpers.hub import serving
from tests.helpers.tiny_models import tiny, tiny_llama

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", reason="the oracle is a test requirement: pip install -r tests/requirements.txt")

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[5, 9, 33, 7, 120, 64, 3, 17]])


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of PEFT's, saved as ``theirs`` beside its base ``base``."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_dora=True)
    model = peft.get_peft_model(tiny_llama(), config)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "theirs")
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def opened(folder: str | Path) -> Any:
    subject = read_run_subject(Path(folder), ["model.dtype=float32"])
    assert subject.adapter
    model = open_model(subject.model)
    load_adapter(model, subject.adapter)
    return model


def test_an_imported_run_is_a_run(theirs: Any) -> None:
    made = import_run("theirs")
    assert (made.folder, made.methods, made.sites) == ("runs/theirs", ["dora"], 4)
    assert made.trained == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert torch.allclose(logits(opened(made.folder)), logits(theirs), atol=2e-4)
    assert (logits(theirs) - logits(tiny_llama())).abs().max() > 0.05
    described = read_description(Path(made.folder) / "adapter")
    assert described["base"]["weights"]  # so that another base is noticed from now on
    assert described["about"]["imported"] == "theirs"


def test_a_run_comes_back_as_pefts(theirs: Any) -> None:
    run = Path(import_run("theirs").folder)
    config = export_run(run, Path("again"), base="someone/base")
    assert config["base_model_name_or_path"] == "someone/base"
    assert "base_model: someone/base" in Path("again/README.md").read_text()
    assert str(Path.cwd()) not in "".join(Path("again", name).read_text() for name in ("README.md", CONFIG))
    again = peft.PeftModel.from_pretrained(tiny_llama(), "again").eval()
    assert torch.allclose(logits(again), logits(theirs), atol=2e-4)
    with pytest.raises(UserError, match="it exists"):
        export_run(run, Path("again"))
    halves = export_run(run, Path("halves"), dtype="bfloat16")
    assert halves["base_model_name_or_path"] == "base"
    again = peft.PeftModel.from_pretrained(tiny_llama(), "halves").eval()
    assert torch.allclose(logits(again), logits(theirs), atol=0.1)


def test_the_base_is_compared_from_then_on(theirs: Any) -> None:
    run = Path(import_run("theirs").folder)
    tiny_llama(Path("other"), seed=5)
    with pytest.raises(UserError, match="other"):
        export_run(run, Path("out"), overrides=[f"model.path={Path('other').absolute()}"])
    assert not Path("out").exists()


def test_what_it_was_trained_on_is_not_made_up(
    theirs: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("subspace"), "propagate", True)
    unknown = read_run_subject(Path(import_run("theirs").folder))
    assert unknown.mixture == ""
    with caplog.at_level(logging.WARNING):
        check_contamination(unknown, [])
    assert "what runs/theirs was trained on is not known" in caplog.text
    known = import_run("theirs", ["name=known", "data.mixture=commonsense"])
    assert read_run_subject(Path(known.folder)).mixture == "commonsense"


def test_a_base_under_another_name(theirs: Any) -> None:
    config = json.loads(Path("theirs", CONFIG).read_text())
    Path("theirs", CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "/somebody's/llama"}))
    with pytest.raises(UserError, match=r"names /somebody's/llama.*model\.path=NAME"):
        import_run("theirs")
    assert not Path("runs").exists()
    assert import_run("theirs", ["model.path=base"]).sites == 4
    Path("theirs", CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match=r"names no base model.*model\.path=NAME"):
        import_run("theirs", ["name=other"])


@pytest.mark.parametrize(
    ("source", "overrides", "said"),
    [
        ("nowhere", [], "no folder 'nowhere'"),
        ("base", [], f"{CONFIG} is not there"),
        ("theirs", ["model.path=small"], "does not fit"),
        ("theirs", ["name=../x"], "names a folder"),
        ("theirs", ["method.r=8"], "an import takes name"),
        ("theirs", ["train.steps=8"], "an import takes name"),
        ("theirs", ["model.pth=base"], "has no setting 'pth'"),
    ],
)
def test_a_refusal_leaves_nothing(theirs: Any, source: str, overrides: list[str], said: str) -> None:
    tiny("qwen2", Path("small"), hidden_size=32)
    with pytest.raises(UserError, match=said):
        import_run(source, overrides)
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


def test_an_existing_run_is_left_alone(theirs: Any) -> None:
    folder = Path(import_run("theirs").folder)
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        import_run("theirs", ["model.dtype=float16"])
    assert (folder / "config.yaml").read_bytes() == before


def test_an_adapter_on_the_hub(theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as hub:
        hub.use(monkeypatch, tmp_path / "hub")
        hub.commit("someone/theirs", Path("theirs"), "main", "v1")
        made = import_run("someone/theirs@v1")
        assert made.folder == "runs/someone-theirs-v1"
        assert torch.allclose(logits(opened(made.folder)), logits(theirs), atol=2e-4)
        with pytest.raises(UserError, match="no model someone/else"):
            import_run("someone/else")


def test_commands(theirs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "theirs", "name=mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == "runs/mine"
    assert main(["export", "runs/mine", "--out", "peft"]) == 0
    captured = capsys.readouterr()
    assert "exported: peft" in captured.out
    assert "the base has no name on the hub" in captured.err
    assert main(["export", "runs/mine", "--out", "peft"]) == 2
    assert adapters(opened("runs/mine"))

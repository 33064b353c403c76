"""Inspection of runs: every site once, over steps and between runs, in tables, in JSON and in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from subspace import config as config_module
from subspace.adapters.inject import adapters
from subspace.adapters.serialization import load_adapter
from subspace.cli.main import main
from subspace.diagnostics.inspect import Inspected, Subject, inspect_runs
from subspace.diagnostics.report import findings, grids
from subspace.diagnostics.subspaces import Site
from subspace.errors import UserError
from subspace.models.frozen_weights import gather_weight_fp32
from subspace.run import train_run
from tests.helpers.material import make_material
from tests.helpers.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs ``lora``, with checkpoints, ``dora``, ``prefix`` and ``bitfit``, of six steps each."""
    folder = tmp_path_factory.mktemp("inspect")
    recipe = make_material(folder)
    for method, saved in (("lora", 2), ("dora", 0), ("prefix", 0), ("bitfit", 0)):
        given = [f"runs={folder / 'runs'}", f"name={method}", f"method={method}", f"train.save_every={saved}"]
        train_run(config_module.read_config(recipe, [*given, "train.keep_checkpoints=3"]))
    return folder / "runs"


def test_every_site_is_measured_by_the_weights_themselves(runs: Path) -> None:
    found = inspect_runs([runs / "lora", runs / "dora"])
    assert [each.label for each in found.found] == ["lora", "dora"]
    for each in found.found:
        model = tiny_llama()
        load_adapter(model, each.subject.adapter, any_base=True)
        assert each.sites.keys() == adapters(model).keys()
        for name, adapter in adapters(model).items():
            W, merged = gather_weight_fp32(adapter.base), adapter.merged()["weight"]
            assert merged is not None
            assert each.sites[name].relative == pytest.approx(float((merged - W).norm() / W.norm()), rel=1e-3)
            assert each.sites[name].relative > 1e-3
    assert all(site.directions == 16 for site in found.found[0].sites.values())
    assert set(found.pairs) == {("lora", "dora")}
    overlaps = found.pairs["lora", "dora"].values()
    assert all(overlap is not None and 0 <= overlap <= 1 for overlap in overlaps)


def test_steps_come_to_the_end(runs: Path) -> None:
    found = inspect_runs([runs / "lora"], over_steps=True).found
    assert [each.subject.step for each in found][:2] == [2, 4]
    assert found[-1].subject.final
    first, second = (
        sum(overlap or 0 for overlap, _ in each.settled.values()) / len(each.settled) for each in found[:2]
    )
    assert 0 < first < second <= 1
    assert found[-1].settled == {}
    written = {path.name for path in (runs / "lora" / "inspect").iterdir()}
    assert {"adapter.json", "step-000002.json", "step-000004.json"} <= written
    step = json.loads((runs / "lora" / "inspect" / "step-000002.json").read_text())
    assert (step["schema"], step["step"]) == (1, 2)
    assert {"site", "kind", "relative", "diagonal", "diagonal_chance", "same_subspace"} <= step["sites"][0].keys()
    with pytest.raises(UserError, match="no checkpoint before its end"):
        inspect_runs([runs / "dora"], over_steps=True)


def test_a_damaged_checkpoint_is_left_out_and_told_of(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = shutil.copytree(runs / "lora", tmp_path / "lora")
    (again / "checkpoints" / "step-000002" / "adapter" / "adapter.json").write_text("{}")
    assert main(["inspect", str(again), "--over-steps"]) == 0
    captured = capsys.readouterr()
    assert "lora at step 2" not in captured.out
    assert "lora at step 4" in captured.out
    assert "step-000002 is left out" in captured.err


def test_runs_of_one_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    again = shutil.copytree(runs / "lora", tmp_path / "lora")
    found = inspect_runs([runs / "lora", again])
    assert list(found.pairs) == [(str(runs / "lora"), str(again))]
    assert all(overlap == pytest.approx(1) for overlap in found.pairs[str(runs / "lora"), str(again)].values())


def test_what_updates_no_weight_is_counted(runs: Path) -> None:
    with pytest.raises(UserError, match="weights, and prefix has none"):
        inspect_runs([runs / "prefix"])
    with pytest.raises(UserError, match="weights, and bitfit has none"):
        inspect_runs([runs / "bitfit"])
    found = inspect_runs([runs / "lora", runs / "prefix"])
    assert found.found[1].left_out == {"prefix": 2}
    assert [grid.title for grid in grids(found)] == ["lora"]


def test_runs_of_two_bases_are_not_compared(runs: Path, tmp_path: Path) -> None:
    make_material(tmp_path)
    tiny_llama(tmp_path / "model", seed=5)
    other = train_run(config_module.read_config(tmp_path / "run.yaml", [f"runs={tmp_path}", "train.steps=1"]))
    with pytest.raises(UserError, match="different bases"):
        inspect_runs([runs / "lora", other])


def test_the_command(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", str(runs / "lora"), "--layers"]) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out
    assert main(["inspect", str(runs / "lora"), str(runs / "dora"), "--json"]) == 0
    assert [each["run"] for each in json.loads(capsys.readouterr().out)["adapters"]] == [
        str(runs / "lora"), str(runs / "dora"),
    ]  # fmt: skip
    assert main(["inspect", str(runs / "lora"), "--over-steps", "-o", str(tmp_path / "x.md")]) == 0
    written = (tmp_path / "x.md").read_text()
    assert "**lora at step 2**" in written
    assert "**over steps**" in written
    assert main(["inspect", str(runs / "lora"), "-o", str(tmp_path / "x.html")]) == 2
    assert main(["inspect", "model.dtype=float32"]) == 2
    assert main(["inspect", str(runs / "nothing")]) == 2


def found_with(*sites: Site) -> Inspected:
    subject = Subject(Path("runs/x"), "x", Path("runs/x/adapter"), 3, final=True)
    return Inspected(subject, "", {f"layers.{number}.q_proj": site for number, site in enumerate(sites)})


def test_findings_in_words() -> None:
    still = Site(60, 40, 0, 0.0)
    assert findings(found_with(still, still)) == [
        "ΔW is zero at every site: nothing was trained, or the training has not begun"
    ]
    moved = Site(
        60, 40, 16, 0.1, entropy_rank=1.5, rank_90=4, diagonal=0.5, diagonal_chance=0.1, top_out=0.9, top_in=0.9,
        bottom_out=0.0, bottom_in=0.0, out_chance=0.1, in_chance=0.2, intruders=2,
    )  # fmt: skip
    said = " | ".join(findings(found_with(moved, still)))
    assert "ΔW is zero at 1 of 2 sites" in said
    assert "rank 1.5 of 16 used (median): 4 directions hold 90 %" in said
    assert "leans on W's largest directions: 6.0 times" in said
    assert "W's smallest" not in said
    assert "own singular values 5.0 times" in said
    assert "2 intruder dimensions at 1 of 1 sites" in said

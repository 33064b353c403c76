"""Retention: bits per byte of run and base on one load, exactly 0 apart before training, sealed, and gone on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from subspace.adapters.inject import inject, trained_parameters
from subspace.adapters.serialization import save_adapter
from subspace.data import samples as samples_module
from subspace.errors import UserError
from subspace.evaluation import retention as retention_module
from subspace.evaluation.config import EvaluateConfig, EvaluationSubject
from subspace.evaluation.results import read_items, read_results
from subspace.evaluation.retention import (
    PassageScorer,
    Retention,
    read_retention,
    retention_file,
    select_passages,
    windows,
)
from subspace.evaluation.subjects import evaluate_subjects
from subspace.models.config import ModelConfig
from subspace.reporting.continuous import paired_difference
from subspace.reporting.retention import read_kept
from subspace.reporting.table_formats import write
from subspace.reporting.tables import build_tables
from tests.helpers.items import items
from tests.helpers.tiny_models import bpe_tokenizer, tiny_llama

AT_THE_START = ("lora", "dora", "pissa", "ssb", "bitfit", "parallel")
NOISE = (0.02, 0.05, 0.1, 0.2)
PASSAGES = 17


@pytest.fixture(autouse=True)
def made_items(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(name: str, split: str) -> datasets.Dataset:
        found = items(name, PASSAGES)
        return datasets.Dataset.from_list([*found, replace_id(found[3])])  # a passage may have several questions

    monkeypatch.setattr(samples_module, "task_items", made)


def replace_id(item: Any) -> Any:
    return {**item, "id": f"{item['id']}-again"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny model, adapters that do nothing yet, a trained one, and heads with more and more noise."""
    folder = tmp_path_factory.mktemp("retention")
    tiny_llama(folder / "base")
    for method in AT_THE_START:
        save_adapter(injected(method), folder / method)
    model = injected("lora")
    for parameter in trained_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    save_adapter(model, folder / "trained")
    for scale in NOISE:
        model = injected("full", targets=["lm_head"])
        (head,) = trained_parameters(model).values()
        head.data += scale * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
        save_adapter(model, folder / f"noise-{scale}")
    return folder


def injected(method: str, **where: Any) -> Any:
    model = tiny_llama()
    inject(model, method, **where)
    return model


def subject(base: Path, out: Path, adapter: str = "", **settings: Any) -> EvaluationSubject:
    config = EvaluateConfig(**{"tasks": "openbookqa", "limit": 3, "retention": "wikipedia", **settings})
    model = ModelConfig(path=str(base / "base"), dtype="float32")
    return EvaluationSubject(model, config, out / (adapter or "base"), base / adapter if adapter else None, adapter)


def measured(folder: Path) -> Retention:
    found = read_retention(folder)
    assert found
    return found


def test_every_token_is_predicted_once_from_at_most_a_window() -> None:
    for length in range(1, 30):
        for size in (1, 2, 5, 100):
            ids, seen = [-1, *range(length)], []
            for row, context in windows(ids, 1, size):
                assert 1 <= context < len(row) <= size + 1
                seen += row[context:]
                assert row == ids[ids.index(row[-1]) + 1 - len(row) :][: len(row)]  # a part of the text
            assert seen == ids[1:]


def test_passages_are_distinct_and_a_limit_takes_a_part_of_them() -> None:
    every, some, fewer = (select_passages(limit) for limit in (None, 9, 4))
    texts = [item["context"] for item in every.items]
    assert len(texts) == len(set(texts)) == PASSAGES
    ids = [[item["id"] for item in sample.items] for sample in (every, some, fewer)]
    assert (len(ids[1]), len(ids[2])) == (9, 4)
    assert set(ids[2]) < set(ids[1]) < set(ids[0])


def test_bits_are_those_of_the_text_alone_in_any_batch_and_over_windows() -> None:
    tokenizer, sample = bpe_tokenizer(), select_passages(6)
    for longest in (512, 24):
        model = tiny_llama(max_position_embeddings=longest)
        scorer = PassageScorer(model, tokenizer, sample)
        assert any(rows > 1 for rows, _ in scorer.sizes) == (longest == 24)
        assert ("window" in scorer.fingerprint_fields) == (longest == 24)
        with torch.no_grad():
            records = scorer.score(model, range(6))
            for record, item in zip(records, sample.items, strict=True):
                ids = tokenizer(item["context"], add_special_tokens=False)["input_ids"]
                bits = 0.0
                for row, context in windows([tokenizer.bos_token_id, *ids], 1, longest):
                    logs = model(torch.tensor([row])).logits[0].log_softmax(-1)
                    bits -= sum(float(logs[at - 1, row[at]]) for at in range(context, len(row))) / np.log(2)
                assert record["bits"] == pytest.approx(bits, rel=1e-5)
                assert (record["tokens"], record["bytes"]) == (len(ids), len(item["context"].encode()))


@pytest.mark.parametrize("mixed", [False, True])
def test_adapters_that_do_nothing_yet_keep_everything_to_the_bit(base: Path, tmp_path: Path, mixed: bool) -> None:
    evaluate_subjects([subject(base, tmp_path, name, batch_adapters=mixed) for name in AT_THE_START])
    for name in AT_THE_START:
        found = measured(tmp_path / name)
        assert found.own == found.base, name
        kept = read_kept([(tmp_path / name, found.subject)])
        assert kept
        assert str(kept) == "+0.000 [+0.000, +0.000]"
    assert not [*tmp_path.rglob("*.partial-*")]


def test_more_noise_keeps_less(base: Path, tmp_path: Path) -> None:
    evaluate_subjects([subject(base, tmp_path), *(subject(base, tmp_path, f"noise-{scale}") for scale in NOISE)])
    kept = [read_kept([(tmp_path / f"noise-{scale}", None)]) for scale in NOISE]
    lost = [found.more.value for found in kept if found and found.more]
    assert len(lost) == len(NOISE)
    assert lost[0] > 0
    assert lost == sorted(lost)
    alone = measured(tmp_path / "base")
    assert alone.base is None
    assert measured(tmp_path / "noise-0.1").base == alone.own  # one load, the same batches
    own = read_kept([(tmp_path / "base", None)])
    assert own
    assert str(own) == f"{alone.mean:.3f}"


def test_the_interval_is_that_of_a_bootstrap_over_passages(base: Path, tmp_path: Path) -> None:
    evaluate_subjects([subject(base, tmp_path, "trained")])
    found, draw = measured(tmp_path / "trained"), np.random.default_rng(0)
    assert found.base
    own, before = np.array([found.own]), np.array([found.base])
    difference = paired_difference([before], [own])
    draws = (own - before)[0][draw.integers(PASSAGES, size=(20_000, PASSAGES))].mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert difference.value == pytest.approx(float((own - before).mean()))
    # Student's quantile for 17 passages is a tenth wider than the bootstrap, which is too narrow for so few.
    assert (difference.high - difference.low) / (high - low) == pytest.approx(1.1, abs=0.1)


def test_an_interrupted_measurement_goes_on_and_ends_alike(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [subject(base, tmp_path / "whole", name, batch_tokens=64) for name in ("trained", "noise-0.1")]
    evaluate_subjects(wanted)
    whole = [retention_file(one.folder).read_bytes() for one in wanted]

    wanted = [replace(one, folder=tmp_path / "cut" / one.folder.name) for one in wanted]
    score, scored = PassageScorer.score, []
    stop_at: list[int] = []

    def counting(self: PassageScorer, model: Any, batch: Any) -> Any:
        scored.append(len(batch))
        if stop_at and len(scored) == stop_at[0]:
            raise KeyboardInterrupt
        return score(self, model, batch)

    monkeypatch.setattr(PassageScorer, "score", counting)
    total = 0
    for stop in (4, 9, 3, 12):  # in the base, in the first run, and beyond
        scored.clear()
        stop_at[:] = [stop]
        with pytest.raises(KeyboardInterrupt):
            evaluate_subjects(wanted)
        total += sum(scored[:-1])
    stop_at.clear()
    scored.clear()
    evaluate_subjects(wanted)
    assert total + sum(scored) == 3 * PASSAGES  # base and two runs, each passage once
    assert [retention_file(one.folder).read_bytes() for one in wanted] == whole
    scored.clear()
    evaluate_subjects(wanted)
    assert not scored
    assert not [*(tmp_path / "cut").rglob("*.partial-*")]


def test_what_was_changed_or_is_of_other_weights_is_measured_again(base: Path, tmp_path: Path) -> None:
    one = subject(base, tmp_path, "trained")
    evaluate_subjects([one])
    file = retention_file(one.folder)
    sound = file.read_bytes()
    for broken in (sound.replace(b'"bits": ', b'"bits": 1', 1), sound[: len(sound) // 2], b"", b"[]\n", b"\x00"):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=r"is damaged.*Measure it again: subspace evaluate"):
            read_retention(one.folder)
        evaluate_subjects([one])
        assert file.read_bytes() == sound
    file.write_bytes(sound.replace(b'"schema": 1', b'"schema": 2', 1))
    with pytest.raises(UserError, match="newer version"):
        read_retention(one.folder)
    file.write_bytes(sound)
    evaluate_subjects([replace(one, adapter=base / "noise-0.1")])
    assert file.read_bytes() != sound
    evaluate_subjects([replace(one, evaluate=replace(one.evaluate, retention_limit=5))])
    assert len(measured(one.folder).ids) == 5


def test_a_run_is_scored_on_the_way_from_its_base(base: Path, tmp_path: Path) -> None:
    run = subject(base, tmp_path, "trained", batch_adapters=True)
    scales = (0, 0.25, 0.5, 1)
    wanted = [run.at_scale(scale) for scale in scales]
    assert [one.folder.name for one in wanted] == ["scale-0", "scale-0.25", "scale-0.5", "trained"]
    evaluate_subjects(wanted)
    evaluate_subjects([subject(base, tmp_path)])
    alone, parts = tmp_path / "base", [read_results(one.folder)[0] for one in wanted]
    assert read_items(parts[0].items or alone) == read_items(read_results(alone)[0].items or alone)
    assert measured(wanted[0].folder).own == measured(alone).own
    assert [part.adapter for part in parts] == ["", "trained x 0.25", "trained x 0.5", "trained"]
    assert len({part.subject for part in parts}) == 4
    lost = [np.subtract(found.own, measured(alone).own) for found in (measured(one.folder) for one in wanted)]
    sizes = [float(np.abs(values).mean()) for values in lost]
    assert sizes == sorted(sizes)
    assert sizes[0] == 0 < sizes[1]
    apart = [subject(base, tmp_path / "apart", "trained").at_scale(scale) for scale in scales]
    evaluate_subjects(apart)
    for one, other in zip(parts, (read_results(part.folder)[0] for part in apart), strict=True):
        for a, b in zip(read_items(one.items or alone), read_items(other.items or alone), strict=True):
            assert a["scores"] == pytest.approx(b["scores"], rel=1e-4)


def test_tables_have_what_is_kept(base: Path, tmp_path: Path) -> None:
    wanted = [subject(base, tmp_path), subject(base, tmp_path, "trained"), subject(base, tmp_path, "noise-0.1")]
    evaluate_subjects(wanted)
    folders = [one.folder for one in wanted]
    (table,) = build_tables(folders)
    (row,) = [row for row in table.grid.rows if row[0] == "kept"]
    kept = [read_kept([(folder, None)]) for folder in folders]
    assert row == ("kept", "bits/byte", str(PASSAGES), "", *map(str, kept))
    (note,) = [note for note in table.notes if note.startswith("kept")]
    assert f"on {PASSAGES} Wikipedia passages" in note
    told = json.loads(write([table], "json"))[0]["methods"]["trained"]["kept"]
    assert told["passages"] == PASSAGES
    assert told["more"]["low"] < told["more"]["value"] < told["more"]["high"]
    head, first, second, *_ = write([table], "csv").splitlines()
    assert head.endswith(",kept,kept_low,kept_high")
    assert first.endswith(",,,")
    assert f",{told['more']['value']}," in second

    evaluate_subjects([replace(wanted[2], evaluate=replace(wanted[2].evaluate, retention_limit=5))])
    (table,) = build_tables(folders)
    (row,) = [row for row in table.grid.rows if row[0] == "kept"]
    assert row[-1] == "-"
    assert any("kept of noise-0.1 is of other passages" in note for note in table.notes)


def test_what_cannot_be_measured_is_said_before_a_model_is_opened(base: Path, tmp_path: Path) -> None:
    sharded = subject(base, tmp_path, "trained", engine="ds_configs/zero3.json")
    with pytest.raises(UserError, match=r"evaluate\.retention=wikipedia was asked for with evaluate\.engine"):
        evaluate_subjects([sharded])
    with pytest.raises(UserError, match=r"--scale was asked for with evaluate\.engine"):
        evaluate_subjects([replace(sharded, evaluate=replace(sharded.evaluate, retention="none")).at_scale(0.5)])
    with pytest.raises(UserError, match="the update of parallel cannot be scaled"):
        evaluate_subjects([subject(base, tmp_path, "parallel").at_scale(0.5)])
    assert not [*tmp_path.rglob("results.json")]


def test_a_limit_without_a_measurement_is_told() -> None:
    assert EvaluateConfig(retention_limit=3).without_effect == ["retention_limit"]
    assert not EvaluateConfig(retention="wikipedia", retention_limit=3).without_effect
    assert retention_module.NAME == "retention"

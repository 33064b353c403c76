"""Packed rows: one after another in a sequence, and each as if it were alone."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from subspace import config as config_module
from subspace.adapters.inject import inject, trained_parameters
from subspace.data.collate import IGNORE_INDEX, TokenRow, collate, pack_rows
from subspace.errors import UserError
from subspace.models.lm_head import summed_loss
from subspace.run import train_run
from tests.helpers.material import logged, make_material, saved_adapter
from tests.helpers.tiny_models import VOCABULARY, tiny

generator = torch.Generator().manual_seed(2)
ROWS = [
    TokenRow(torch.randint(2, VOCABULARY, (length,), generator=generator).tolist(), length // 2)
    for length in (20, 14, 9, 5, 3)
]
ROOM = 32  # for 20 + 9 + 3 and 14 + 5


def adapted(architecture: str, attention: str, method: str) -> PreTrainedModel:
    model = tiny(architecture)
    model.set_attn_implementation(attention)
    model.double()
    inject(model, method, targets=["q_proj", "v_proj", "down_proj"] if method == "lora" else None)
    torch.manual_seed(3)
    for tensor in trained_parameters(model).values():
        tensor.data = torch.randn_like(tensor, dtype=torch.float64) * 0.2
    return model.train()  # type: ignore[no-any-return]


def loss_and_gradients(model: Any, batch: dict[str, Tensor], trained: nn.Module) -> tuple[float, list[Tensor]]:
    trained.zero_grad()
    loss = summed_loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), [p.grad.clone() for p in trained_parameters(trained).values() if p.grad is not None]


@pytest.mark.parametrize("method", ["lora", "prefix"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_a_packed_row_is_as_if_alone(architecture: str, attention: str, method: str) -> None:
    model = adapted(architecture, attention, method)
    # The second row of the first sequence, with a row before it and one behind.
    together = collate(ROWS, pad_id=0, loss_on="all", room=ROOM)
    assert together["input_ids"].shape == (2, ROOM)
    others = torch.ones_like(together["labels"], dtype=torch.bool)
    others[0, 20:29] = False
    together["labels"].masked_fill_(others, IGNORE_INDEX)
    loss, gradients = loss_and_gradients(model, together, model)
    expected, alone = loss_and_gradients(model, collate([ROWS[2]], pad_id=0, loss_on="all"), model)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(gradients, alone, strict=True))


def test_for_flash_attention_all_rows_stand_in_one_sequence() -> None:
    model = adapted("llama", "sdpa", "lora")
    shapes = []

    class Flash:
        module = SimpleNamespace(
            config=SimpleNamespace(_attn_implementation="flash_attention_2"),
            get_output_embeddings=model.get_output_embeddings,
        )

        def __call__(self, **given: Any) -> Any:
            shapes.append((given["input_ids"].shape, given["attention_mask"]))
            return model(**given)

    batch = collate(ROWS, pad_id=0, room=ROOM)
    assert summed_loss(Flash(), batch).item() == pytest.approx(summed_loss(model, batch).item(), rel=1e-6)
    assert shapes == [((1, 2 * ROOM), None)]


def flash_attention(
    seen: list[dict[str, Any]], module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
) -> tuple[Tensor, None]:
    """Stand for transformers' flash attention: each row by itself, between the bounds that it is given."""
    seen.append({"mask": mask, **given})
    starts = given["cu_seq_lens_q"].tolist()
    groups = query.shape[1] // key.shape[1]
    rows = [
        F.scaled_dot_product_attention(
            query[:, :, begin:end],
            key[:, :, begin:end].repeat_interleave(groups, 1),
            value[:, :, begin:end].repeat_interleave(groups, 1),
            is_causal=True,
            scale=given["scaling"],
        )
        for begin, end in pairwise(starts)
    ]
    return torch.cat(rows, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "phi3"])
def test_flash_attention_is_given_where_rows_begin(architecture: str) -> None:
    seen: list[dict[str, Any]] = []
    model, plain = (adapted(architecture, "sdpa", "lora") for _ in range(2))
    AttentionInterface.register("flash_in_test", partial(flash_attention, seen))
    model.config._attn_implementation = "flash_in_test"  # transformers itself would ask for the package flash-attn
    batch = collate(ROWS, pad_id=0, loss_on="all", room=ROOM)
    (loss, gradients), (expected, wanted) = (loss_and_gradients(m, batch, m) for m in (model, plain))
    assert loss == pytest.approx(expected, rel=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(gradients, wanted, strict=True))
    assert len(seen) == model.config.num_hidden_layers
    for given in seen:
        assert given["mask"] is None
        assert given["cu_seq_lens_q"].dtype == torch.int32
        assert given["cu_seq_lens_q"].tolist() == [0, 20, 29, 32, 46, 51, 64]  # rows, and what pads the second sequence
        assert given["cu_seq_lens_k"] is given["cu_seq_lens_q"]
        assert given["max_length_q"] == given["max_length_k"] == 20
        assert type(given["max_length_q"]) is int  # transformers reads a tensor's value in every layer


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_packing_leaves_every_token_and_label(loss_on: str) -> None:
    apart, together = (collate(ROWS, pad_id=0, loss_on=loss_on, room=room) for room in (None, ROOM))
    for name in ("attention_mask", "labels"):
        values = [batch[name][batch["attention_mask"] == 1] for batch in (apart, together)]
        assert sorted(values[0].tolist()) == sorted(values[1].tolist())
    assert (together["attention_mask"].sum(1)).tolist() == [32, 19]
    assert together["position_ids"][1].tolist() == [*range(14), *range(5), *range(13)]


@pytest.mark.parametrize("room", [20, 23, 29, 100])
def test_no_sequence_takes_more_than_fits(room: int) -> None:
    sequences = pack_rows(ROWS, room)
    assert sorted(row for sequence in sequences for row in sequence) == sorted(ROWS)
    assert max(sum(len(row.input_ids) for row in sequence) for sequence in sequences) <= room


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize("stage", [0, 2])  # 3 is in test_zero.py
def test_a_packed_run_learns_what_a_padded_one_does(material: Path, tmp_path: Path, stage: int) -> None:
    own = [
        f"engine={material.parent / f'zero{stage}.json'}",
        f"runs={tmp_path}",
        "train.micro_batch_size=4",
        "data.max_length=100",
    ]
    apart, together = (
        train_run(config_module.read_config(material, [*own, f"name={packing}", f"data.packing={packing}"]))
        for packing in ("false", "true")
    )
    assert logged(together) == pytest.approx(logged(apart), abs=1e-5)
    assert logged(together, "tokens") == logged(apart, "tokens")
    for name, tensor in saved_adapter(apart).items():
        assert torch.allclose(tensor, saved_adapter(together)[name], atol=1e-4)


def test_vectors_before_the_text_are_refused(material: Path) -> None:
    config = config_module.read_config(material, ["method=prompt", "data.packing=true"])
    with pytest.raises(UserError, match=r"method prompt puts its vectors before the first one only. .*or use prefix"):
        train_run(config)

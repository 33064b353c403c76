"""The loss over all tokens, computed a few tokens at a time, is the plain one, and holds no logits of all of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from subspace.adapters.inject import inject, trained_parameters
from subspace.data.collate import IGNORE_INDEX, Batch, TokenRow, collate, join_batches
from subspace.distributed.deepspeed_config import compute_batch_layout, resolve_deepspeed_config
from subspace.distributed.engine import init_distributed, init_engine
from subspace.kernels import cross_entropy as loss
from subspace.models.lm_head import SummedLoss, summed_loss
from tests.helpers.tiny_models import ARCHITECTURES, VOCABULARY, tiny, tiny_llama


def batch(rows: int = 3, tokens: int = 24) -> dict[str, Tensor]:
    """Return rows of random tokens, all labelled but for the padding and the first row's beginning."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, tokens // 2 :] = 0
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    labels[0, :5] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain(model: Any, of: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=of["input_ids"], attention_mask=of["attention_mask"], use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), of["labels"][:, 1:].flatten(), reduction="sum")


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in trained_parameters(model).values() if p.grad is not None]


@pytest.fixture
def a_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "MAX_LOGITS", 10 * VOCABULARY)


@pytest.mark.usefixtures("a_few_at_once")
@pytest.mark.parametrize("targets", [["q_proj", "down_proj", "qkv_proj"], ["lm_head"]], ids=["inside", "the head"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_give_the_plain_loss_and_gradients(architecture: str, targets: list[str]) -> None:
    model, of = tiny(architecture), batch()
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    inject(model, "lora", {"r": 4}, targets=[target for target in targets if target in names])
    for tensor in trained_parameters(model).values():
        nn.init.normal_(tensor, std=0.1)
    expected = plain(model, of)
    expected.backward()  # type: ignore[no-untyped-call]
    wanted = [gradient.clone() for gradient in gradients(model)]
    model.zero_grad()

    found = summed_loss(model, of)
    found.backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(found, expected, rtol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(gradients(model), wanted, strict=True))
    assert torch.allclose(plain(model, of), expected)  # the head is as before


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the size of the largest tensor that was made."""

    numbers = 0

    def __torch_dispatch__(self, run: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = run(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, out.numel() if isinstance(out, Tensor) else 0)
        return out


@pytest.mark.usefixtures("a_few_at_once")
def test_no_tensor_holds_the_logits_of_all_tokens() -> None:
    model, of = tiny_llama(), batch(rows=4, tokens=64)
    inject(model, "lora", {"r": 4}, targets=["q_proj"])
    summed_loss(model, of).backward()  # type: ignore[no-untyped-call]
    with Largest() as largest:  # type: ignore[no-untyped-call]
        summed_loss(model, of).backward()  # type: ignore[no-untyped-call]
    assert largest.numbers <= max(VOCABULARY * 64, 4 * 64 * 128)  # the head's weight, an MLP's inside


@pytest.mark.usefixtures("a_few_at_once")
def test_parts_under_zero_3() -> None:
    init_distributed()
    of, losses = batch(), []
    for stage in (0, 3):
        model = tiny_llama()
        inject(model, "lora", {"r": 4}, targets=["q_proj"])
        raw = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
        config = resolve_deepspeed_config(raw, compute_batch_layout(3, None, 1), dtype="float32", clip=1.0).settings
        optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=0.01)
        engine = init_engine(model, config, optimizer, lambda step: 1.0)
        for _ in range(3):
            summed = summed_loss(engine, of)
            engine.backward(summed / 30)
            engine.step()
            losses.append(summed.item())
        engine.destroy()
    assert losses[2] < losses[0] - 1
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)


class Recorded(nn.Module):
    """A model whose forward passes are counted, and which may change its logits."""

    def __init__(self, change: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.inner, self.change, self.passes = tiny_llama(), change, 0
        self.config = self.inner.config

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head  # type: ignore[no-any-return]

    def forward(self, **inputs: Any) -> Any:
        self.passes += 1
        out = self.inner(**inputs)
        out.logits = self.change(out.logits)
        return out


def in_place(logits: Tensor) -> Tensor:
    return logits.mul_(0.5)


CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "nothing": (lambda logits: logits, False),
    "an alias": (lambda logits: logits.view_as(logits), False),
    "float": (lambda logits: logits.float(), False),
    "scaled": (lambda logits: logits * 0.5, True),
    "scaled in place": (in_place, True),
    "capped": (lambda logits: 30 * torch.tanh(logits / 30), True),
    "rounded": (lambda logits: logits.bfloat16(), True),
}


@pytest.mark.usefixtures("a_few_at_once")
@pytest.mark.parametrize("inference", [False, True], ids=["training", "no_grad"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_its_logits_is_noticed_and_remembered(change: str, inference: bool) -> None:
    function, changed = CHANGES[change]
    model, of = Recorded(function), batch()
    loss_of = SummedLoss(model)
    with torch.no_grad() if inference else nullcontext():
        found = [loss_of(Batch.from_labels(of)) for _ in range(2)]
        expected = plain(model, of)
    assert loss_of.postprocesses_logits == changed
    assert model.passes == (3 if changed else 2) + 1  # the first loss took two passes, plain one more
    assert torch.allclose(torch.stack(found), expected, rtol=1e-5)
    assert found[0].shape == ()


def test_nothing_is_left_on_the_head_or_in_the_module() -> None:
    model, of = tiny_llama(), batch()
    head = model.lm_head
    before = set(vars(head))
    summed_loss(model, of)
    assert set(vars(head)) == before
    assert not head._forward_hooks


def test_the_head_is_as_before_after_an_error_in_the_model() -> None:
    def fail(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    model = Recorded(fail)
    with pytest.raises(ZeroDivisionError):
        summed_loss(model, batch())
    assert "forward" not in vars(model.inner.lm_head)


def test_no_label_at_all_is_a_loss_of_zero() -> None:
    of = batch()
    of["labels"] = torch.full_like(of["labels"], IGNORE_INDEX)
    assert summed_loss(tiny_llama(), of).item() == 0.0


@pytest.mark.parametrize("most", [10, 10_000], ids=["parts", "one call"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_each_of_several_batches_has_its_own_loss(
    architecture: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "MAX_LOGITS", most * VOCABULARY)
    model = tiny(architecture)
    several = [batch(2, 16), batch(3, 24), batch(1, 24)]
    several[2]["labels"][:, 3:] = IGNORE_INDEX  # columns of its own
    losses = SummedLoss(model).each(join_batches([Batch.from_labels(of) for of in several]))
    assert torch.allclose(losses, torch.stack([plain(model, of) for of in several]), rtol=1e-5)


def test_packed_batches_are_joined_with_their_positions() -> None:
    rows = [[TokenRow(list(range(2, 2 + n)), 1) for n in lengths] for lengths in ((5, 3), (9,), (4, 4, 7))]
    packed = [Batch.from_labels(collate(of, 0, room=16, pad_to_multiple=1)) for of in rows]
    joined = join_batches(packed)
    assert joined.batch.position_ids is not None
    assert joined.batch.position_ids.tolist() == [
        [0, 1, 2, 3, 4, 0, 1, 2, *range(7)],
        [*range(9), *range(6)],
        [*range(7), *range(4), *range(4)],
    ]
    model = tiny_llama()
    losses = SummedLoss(model).each(joined)
    assert torch.allclose(losses, torch.stack([SummedLoss(model)(one) for one in packed]), rtol=1e-5)

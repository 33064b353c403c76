"""Options that make a step faster or smaller: the same losses, and a clear word where the machine has not got them."""

from __future__ import annotations

import importlib.util
import shutil
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subspace import config as config_module
from subspace.adapters.inject import inject
from subspace.errors import UserError
from subspace.run import train_run
from subspace.training import acceleration
from subspace.training.acceleration import (
    _Offloaded,
    check_accelerations,
    compile_layers,
    is_weight,
    offload_activations,
)
from tests.helpers.material import logged, make_material
from tests.helpers.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


def losses(material: Path, runs: Path, name: str, *overrides: str) -> list[float]:
    return logged(train_run(config_module.read_config(material, [f"runs={runs}", f"name={name}", *overrides])))


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # torch's compiler looks where it is warned not to
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_compiled_run_has_the_same_losses(material: Path, tmp_path: Path, checkpointing: str) -> None:
    # At a larger rate Adam makes much of rounding: it moves an element as far whose gradient is nearly zero.
    own = [f"model.gradient_checkpointing={checkpointing}", "train.learning_rate=2e-4"]
    plain, compiled = (losses(material, tmp_path, f"{on}", *own, f"train.compile={on}") for on in ("false", "true"))
    assert compiled == pytest.approx(plain, abs=1e-5)


def test_all_layers_are_compiled() -> None:
    model = tiny_llama()
    inject(model, "lora")
    compile_layers(model)
    assert all(layer._compiled_call_impl is not None for layer in model.model.layers)


@pytest.mark.parametrize("option", ["train.offload_activations=true", "train.keep_memory=false"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_where_memory_lies_changes_no_loss(material: Path, tmp_path: Path, option: str, checkpointing: str) -> None:
    own = ["method.dropout=0.1", f"model.gradient_checkpointing={checkpointing}"]
    assert losses(material, tmp_path, "with", *own, option) == losses(material, tmp_path, "without", *own)


@pytest.fixture
def offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take activations of a CPU for those of a GPU."""
    monkeypatch.setattr(acceleration, "_leaves", lambda tensor: tensor.numel() >= 64 and not is_weight(tensor))


@pytest.mark.usefixtures("offloaded")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_activations_give_the_same_gradients(checkpointing: bool) -> None:
    gradients = []
    for on in (False, True):
        model: Any = tiny_llama().train()
        inject(model, "lora", {"dropout": 0.1})
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        with offload_activations() if on else nullcontext():
            loss = model(torch.arange(96).view(4, 24), use_cache=False).logits.square().mean()
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.usefixtures("offloaded")
def test_what_many_operations_save_is_copied_once_in_each_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[str] = []
    to_host, to_device = offload_activations._to_host, offload_activations._to_device

    def counted_to_host(self: offload_activations, tensor: Tensor) -> _Offloaded:
        copies.append("to host")
        return to_host(self, tensor)

    def counted_to_device(self: offload_activations, packed: _Offloaded) -> tuple[Tensor, Any]:
        copies.append("to device")
        return to_device(self, packed)

    monkeypatch.setattr(offload_activations, "_to_host", counted_to_host)
    monkeypatch.setattr(offload_activations, "_to_device", counted_to_device)
    weights = [nn.Parameter(torch.randn(16, 16)) for _ in range(3)]
    base = torch.randn(8, 16, requires_grad=True)
    hooks = offload_activations()
    with hooks:
        x = base * 2
        loss = torch.stack([(x @ weight).sum() for weight in weights]).sum()
    assert copies == ["to host"]
    packed = hooks.last
    assert packed is not None
    loss.backward()  # type: ignore[no-untyped-call]
    assert copies == ["to host", "to device"]
    del loss
    assert packed() is None  # nothing is left in CPU memory
    expected = (base * 2).sum(0).detach()[:, None].expand(16, 16)
    assert all(weight.grad is not None and torch.allclose(weight.grad, expected) for weight in weights)


@pytest.mark.usefixtures("offloaded")
def test_memory_that_was_written_again_is_another_tensor() -> None:
    hooks = offload_activations()
    x = torch.ones(8, 16)
    first = hooks._pack(x)
    x.mul_(2)
    second = hooks._pack(x)
    assert first is not second
    assert hooks._pack(x) is second
    assert float(hooks._unpack(first).mean()) == 1
    assert float(hooks._unpack(second).mean()) == 2
    # Freed memory may be given to the next tensor.
    at = x.data_ptr()
    del x
    kept = [torch.zeros(8, 16) for _ in range(50)]
    again = [tensor for tensor in kept if tensor.data_ptr() == at]
    assert all(hooks._pack(tensor.mul_(1)) is not second for tensor in again)


class Log:
    """Streams and events of a GPU that only say what they are asked to do."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.current = "compute"

    def stream(self, name: str) -> Any:
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.lines.append(f"{name} waits for {other.name}"),
            wait_event=lambda event: self.lines.append(f"{name} waits for {event.name}"),
        )

    def event(self) -> Any:
        made = SimpleNamespace(name="an event that nobody recorded")

        def record(stream: Any) -> None:
            made.name = f"event {sum('recorded' in line for line in self.lines)}"
            self.lines.append(f"{stream.name}: {made.name} recorded")

        made.record = record
        return made


def test_copies_wait_for_the_computation_and_the_computation_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: log.stream("copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: log.stream("compute"))
    monkeypatch.setattr(torch.cuda, "Event", log.event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    hooks = offload_activations()
    with hooks._beside(torch.device("cuda", 0)) as copied:
        log.lines.append("copied to the host")
    hooks.leaving.append((torch.zeros(1), copied))
    hooks._let_go(0)
    back = _Offloaded(torch.device("cpu"), torch.ones(2), weakref.ref(hooks), None, 2)
    back.back = (torch.ones(2), copied)
    hooks._unpack(back)
    assert log.lines == [
        "copies waits for compute",
        "copied to the host",
        "copies: event 0 recorded",
        "compute waits for event 0",  # before the tensor's memory is used again
        "compute waits for event 0",  # before it is read
    ]
    assert back.back is not None
    hooks._unpack(back)
    assert back.back is None  # the last reader has it


def test_weights_are_told_from_activations() -> None:
    """Of all that a pass saves, what is as large as a weight and does not change with the batch is known as one."""
    model = tiny_llama().train()
    inject(model, "lora", targets=["q_proj", "down_proj"])
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.arange(24).view(2, 12), use_cache=False)
    matrices = [tensor for tensor in saved if tensor.ndim == 2]
    assert any(is_weight(tensor) for tensor in matrices)
    assert [is_weight(t) for t in matrices] == [t.untyped_storage().data_ptr() in held for t in matrices]


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"there is none here. Set train.liger=false"):
        check_accelerations(compiled=False, liger=True, gpu=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install liger-kernel"):
        check_accelerations(compiled=False, liger=True, gpu=True)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"apt-get install g\+\+"):
        check_accelerations(compiled=True, liger=False, gpu=False)
    check_accelerations(compiled=False, liger=False, gpu=False)


@pytest.mark.gpu
def test_offloading_spares_the_gpu() -> None:
    found = {}
    for on in (False, True):
        model: Any = tiny_llama(num_hidden_layers=8).train()
        model.cuda()
        inject(model, "lora")
        ids = torch.randint(2, 300, (8, 256), generator=torch.Generator().manual_seed(0)).cuda()
        torch.cuda.reset_peak_memory_stats()
        if on:
            with offload_activations():
                loss = model(ids, labels=ids, use_cache=False).loss
        else:
            loss = model(ids, labels=ids, use_cache=False).loss
        held = torch.cuda.memory_allocated()
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found[on] = loss.item(), gradients, held
    assert found[True][0] == found[False][0]
    assert all(torch.equal(a, b) for a, b in zip(found[True][1], found[False][1], strict=True))
    assert found[True][2] < 0.7 * found[False][2]


@pytest.mark.gpu
def test_liger_has_the_same_losses(material: Path, tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel")
    plain, liger = (losses(material, tmp_path, f"{on}", f"train.liger={on}") for on in ("false", "true"))
    assert liger == pytest.approx(plain, abs=1e-3)

"""What ``train.deterministic`` switches, when, and that everything is as before afterwards."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from subspace import config as config_module
from subspace.adapters.base import TrainProgress
from subspace.adapters.inject import inject
from subspace.adapters.registry import list_methods
from subspace.distributed.launcher import DETERMINISTIC_ENV, set_rank_env
from subspace.errors import UserError
from subspace.methods.lora import LoRA
from subspace.run import train_run
from subspace.training.determinism import check_deterministic, deterministic_algorithms
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess
from tests.helpers.material import logged, make_material, saved_adapter
from tests.helpers.tiny_models import EARLY_SCHEDULES, tiny_llama


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


def train(material: Path, runs: Path, name: str, *settings: str, resume: bool = False) -> Path:
    config = config_module.read_config(material, [f"runs={runs}", f"name={name}", *settings])
    return train_run(config, resume=resume)


def switches() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize("wanted", [True, False])
def test_torchs_switch_is_on_while_a_run_trains_and_as_before_after_it(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    seen: list[tuple[bool, bool, bool]] = []
    monkeypatch.setattr(LoRA, "before_step", classmethod(lambda *_: seen.append(switches())))
    for name in DETERMINISTIC_ENV:
        monkeypatch.delenv(name, raising=False)
    before = switches()
    folder = train(material, tmp_path, "run", f"train.deterministic={str(wanted).lower()}")
    assert set(seen) == {(True, False, False) if wanted else before}
    assert switches() == before
    assert all((name in os.environ) == wanted for name in DETERMINISTIC_ENV)
    assert len(logged(folder)) == 6


def test_on_a_cpu_it_changes_no_bit(material: Path, tmp_path: Path) -> None:
    plain, switched = (
        train(material, tmp_path, name, "method.dropout=0.1", f"train.deterministic={name}")
        for name in ("false", "true")
    )
    assert logged(plain) == logged(switched)
    assert all(torch.equal(tensor, saved_adapter(switched)[name]) for name, tensor in saved_adapter(plain).items())


def test_what_the_caller_had_switched_on_stays_on() -> None:
    before = switches()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with contextlib.suppress(KeyError), deterministic_algorithms(wanted=True):
            assert switches()[:2] == (True, False)
            raise KeyError
        assert switches()[:2] == (True, True)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_an_operation_without_a_deterministic_form_is_told(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LoRA.forward

    def unordered(self: LoRA, x: Tensor) -> Tensor:
        torch.zeros(4).put_(torch.tensor([0]), torch.tensor([1.0]))  # has none on any device
        return forward(self, x)

    monkeypatch.setattr(LoRA, "forward", unordered)
    with pytest.raises(
        UserError, match=r"train.deterministic=true cannot be kept: put_ .*Set train.deterministic=false"
    ):
        train(material, tmp_path, "run", "train.deterministic=true")
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_libraries_are_told_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DETERMINISTIC_ENV:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    set_rank_env()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    set_rank_env(deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_NVLS_ENABLE"] == "1"  # the user's own
    check_deterministic(wanted=True)


def test_a_process_that_has_used_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    check_deterministic(wanted=False)
    with pytest.raises(UserError, match="has used CUDA already.*CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        check_deterministic(wanted=True)


#: Operations that raise on CUDA tensors under torch.use_deterministic_algorithms, of those that a model might use: its
#: documentation's list, with kthvalue of earlier versions. cumsum does for floating-point numbers only.
UNORDERED = {"put_", "histc", "bincount", "median", "kthvalue", "cumsum", "nll_loss_forward", "nll_loss2d_forward"}


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that collects the unordered operations, by name and dtype of the first argument."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()

    def __torch_dispatch__(self, run: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = run.overloadpacket.__name__
        if name in UNORDERED and (name != "cumsum" or args[0].is_floating_point()):
            self.found.add(name)
        return run(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", list_methods())
def test_no_method_uses_an_operation_that_a_gpu_could_not_order(method: str) -> None:
    model: Any = tiny_llama().train()
    created = list(inject(model, method, EARLY_SCHEDULES.get(method, {})).values())
    ids = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    access = DeepSpeedOptimizerAccess(optimizer=optimizer)
    with Operations() as operations:
        for step in range(1, 7):
            optimizer.zero_grad()
            model(ids, use_cache=False).logits.float().square().mean().backward()
            type(created[0]).before_step(created, TrainProgress(step, 6), access)
            optimizer.step()
            type(created[0]).after_step(created, TrainProgress(step, 6), access)
    assert operations.found == set()


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_a_gpu_resumes_to_the_bit(material: Path, tmp_path: Path, quantize: str) -> None:
    from tests.training.test_resume import assert_same, killed

    settings = ["train.deterministic=true", "method.dropout=0.1", f"model.quantize={quantize}", "model.dtype=bfloat16"]
    settings += ["train.save_every=1", "train.keep_checkpoints=99"]
    whole = train(material, tmp_path, "whole", *settings)
    folder = killed(whole, "killed", 3)
    train(material, tmp_path, folder.name, *settings, resume=True)
    assert_same(whole, folder)

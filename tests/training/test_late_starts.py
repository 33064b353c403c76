"""What begins late is moved as what begins first: by Adam's equations for the age of each element, at every stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subspace.adapters.base import TrainProgress
from subspace.adapters.inject import inject
from subspace.distributed.deepspeed_compat import basic_optimizer
from subspace.distributed.deepspeed_config import compute_batch_layout, resolve_deepspeed_config
from subspace.distributed.engine import init_distributed, init_engine
from subspace.distributed.zero import gathered
from subspace.methods.flexlora import FlexLoRA
from subspace.methods.lora_dash import LoRADash
from subspace.training.late_starts import late_starts
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess
from subspace.training.optimizer_state import gather_optimizer_state, restore_optimizer_state
from subspace.training.optimizers import make_optimizer

RATE, DECAY, BETAS, EPS = 1e-2, 0.1, (0.9, 0.999), 1e-8
CPU = {"device": "cpu"}
ENGINES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "2+cpu": {"stage": 2, "offload_optimizer": CPU},
    "3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "3+cpu": {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_optimizer": CPU},
}


class Two(nn.Module):
    """Two tensors, whose gradients are what it is called with."""

    def __init__(self, sizes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.linspace(-1, 1, torch.Size(s).numel()).view(s)) for s in sizes)
        self.config = None

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return (self.first * first).sum() + (self.second * second).sum()


class Run:
    """Two tensors in an engine."""

    def __init__(
        self, engine: str, optimizer: str = "adamw", sizes: Sequence[tuple[int, ...]] = ((7,), (5, 3))
    ) -> None:
        init_distributed()
        model = Two(sizes)
        self.parameters = (model.first, model.second)
        raw = {"zero_optimization": {"reduce_bucket_size": 1000, **ENGINES[engine]}}
        config = resolve_deepspeed_config(raw, compute_batch_layout(1, None, 1), dtype="float32", clip=0.0).settings
        groups = [{"params": list(self.parameters), "lr": RATE, "weight_decay": DECAY}]
        self.engine = init_engine(model, config, make_optimizer(optimizer, groups), lambda step: 1.0)
        self.access = DeepSpeedOptimizerAccess(self.engine)

    def step(self, gradients: Sequence[Tensor]) -> None:
        self.engine.backward(self.engine(*gradients))
        self.engine.step()

    def values(self) -> list[Tensor]:
        with gathered(self.parameters):
            return [parameter.detach().clone() for parameter in self.parameters]


class Equations:
    """Adam with decoupled weight decay (Loshchilov and Hutter, algorithm 2) in float64, each element for itself."""

    def __init__(self, start: Tensor) -> None:
        self.p = start.double()
        self.m, self.v, self.age = (torch.zeros_like(self.p) for _ in range(3))

    def begin(self, where: Tensor) -> None:
        for state in (self.m, self.v, self.age):
            state[where] = 0

    def step(self, g: Tensor) -> None:
        g, (b1, b2) = g.double(), BETAS
        self.age += 1
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g * g
        m, v = self.m / (1 - b1**self.age), self.v / (1 - b2**self.age)
        self.p = self.p - RATE * (m / (v.sqrt() + EPS) + DECAY * self.p)


def gradients(step: int, sizes: Sequence[torch.Size]) -> list[Tensor]:
    source = torch.Generator().manual_seed(step)
    return [torch.randn(size, generator=source) * 10 ** (2 * torch.rand(1, generator=source) - 1) for size in sizes]


def beginnings(step: int, sizes: Sequence[torch.Size]) -> list[Tensor]:
    """Return what begins anew after a step: often nothing, sometimes a part of either, and all of the second at 12."""
    source = torch.Generator().manual_seed(1000 + step)
    masks = [(torch.rand(s, generator=source) < 0.3) & (torch.rand(1, generator=source) < 0.2) for s in sizes]
    return [masks[0], torch.ones_like(masks[1])] if step == 12 else masks


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    ("engine", "optimizer"), [*((engine, "adamw") for engine in ENGINES), ("0", "paged_adamw"), ("2", "paged_adamw")]
)
def test_each_element_follows_adams_equations_from_its_own_beginning(engine: str, optimizer: str) -> None:
    run = Run(engine, optimizer)
    sizes = [value.shape for value in run.values()]
    expected = [Equations(value) for value in run.values()]
    began = 0
    for step in range(1, 60):
        given = gradients(step, sizes)
        run.step(given)
        for equations, g in zip(expected, given, strict=True):
            equations.step(g)
        for equations, value in zip(expected, run.values(), strict=True):
            assert torch.allclose(value.double(), equations.p, atol=2e-6)
        for parameter, equations, where in zip(run.parameters, expected, beginnings(step, sizes), strict=True):
            began += int(where.sum())
            equations.begin(where)
            run.access.reset_optimizer_state(parameter, where)
    assert began > 20


@pytest.mark.parametrize(("engine", "other"), [("0", "0"), ("2", "2"), ("3+cpu", "3+cpu"), ("0", "2"), ("3", "0")])
def test_late_beginnings_are_kept_in_checkpoints(engine: str, other: str) -> None:
    runs = [Run(engine), Run(other)]
    sizes = [value.shape for value in runs[0].values()]
    for step in range(1, 30):
        runs[0].step(gradients(step, sizes))
        for parameter, where in zip(runs[0].parameters, beginnings(step, sizes), strict=True):
            runs[0].access.reset_optimizer_state(parameter, where)
    saved = gather_optimizer_state(runs[0].engine)
    with torch.no_grad(), gathered(runs[1].parameters, modified_by_main=True):
        for parameter, value in zip(runs[1].parameters, runs[0].values(), strict=True):
            parameter.data.copy_(value)
    restore_optimizer_state(runs[1].engine, saved)
    for step in range(30, 40):
        for run in runs:
            run.step(gradients(step, sizes))
    for whole, resumed in zip(runs[0].values(), runs[1].values(), strict=True):
        assert torch.equal(whole, resumed) if engine == other else torch.allclose(whole, resumed, atol=1e-6)
    again = gather_optimizer_state(runs[1].engine)
    if engine == other:
        assert all(torch.equal(value, again[name]) for name, value in gather_optimizer_state(runs[0].engine).items())


@pytest.mark.parametrize("engine", ["0", "2", "3"])
def test_a_state_of_eight_bits_begins_late_too(engine: str) -> None:
    run = Run(engine, "adamw8bit", sizes=((5000,), (50, 100)))
    given = [torch.full_like(value, 0.3) for value in run.values()]
    for _ in range(40):
        run.step(given)
    states = basic_optimizer(run.engine).state.values()
    assert all(state["state1"].dtype == torch.uint8 for state in states)
    late = torch.arange(5000).view(50, 100) % 3 == 0
    run.access.reset_optimizer_state(run.parameters[1], late)
    for _ in range(20):
        before = run.values()[1]
        run.step(given)
        moved = before * (1 - RATE * DECAY) - run.values()[1]
        assert torch.allclose(moved[late], torch.full_like(moved[late], RATE), rtol=0.05)
        assert torch.allclose(moved[~late], torch.full_like(moved[~late], RATE), rtol=0.05)


def test_moments_that_are_on_a_disk_are_cleared_when_they_are_back() -> None:
    """DeepSpeed swaps a parameter and its moments in before the optimizer's step and out after it."""
    runs = []
    for swapped in (False, True):
        parameter = nn.Parameter(torch.ones(8))
        optimizer = make_optimizer("adamw", [{"params": [parameter], "lr": RATE}])
        access = DeepSpeedOptimizerAccess(optimizer=optimizer)
        disk: dict[Tensor, Tensor] = {}
        for step in range(1, 20):
            for tensor, content in disk.items():
                tensor.data = content
            parameter.grad = torch.full((8,), 0.1 * step)
            optimizer.step()
            if step == 9:
                access.reset_optimizer_state(parameter, torch.arange(8) < 3) if not swapped else None
            if swapped:
                moments = [optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
                disk = {tensor: tensor.data for tensor in (parameter, *moments)}
                for tensor in disk:
                    tensor.data = torch.empty(0)
            if step == 9 and swapped:
                late_starts(optimizer).begin(optimizer, parameter, torch.arange(3))
        runs.append(disk.get(parameter, parameter.detach()))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0][:1], runs[0][3:4])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.config = nn.Linear(32, 32), None


def moves(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, where: Any = ...) -> list[float]:
    """Return by how many learning rates these elements move in each step under a constant gradient."""
    found = []
    for _ in range(50):
        before = parameter.detach()[where].clone()
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        found.append(float((before - parameter.detach()[where]).abs().mean()) / RATE)
    return found


@pytest.mark.parametrize("launch", [1, 100, 2000])
def test_dashs_directions_move_by_the_learning_rate_after_the_launch(launch: int) -> None:
    """In the authors' code delta has no gradient until then, so that Adam counts from the launch."""
    adapter = inject(Layer(), "lora-dash", {"r": 4, "d": 4, "launch": launch}, targets=["q_proj"])["q_proj"]
    assert isinstance(adapter, LoRADash)
    adapter.B.data.normal_()
    optimizer = torch.optim.AdamW(adapter.trained().values(), lr=RATE, weight_decay=0)
    for _ in range(launch):
        for parameter in adapter.trained().values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    access = DeepSpeedOptimizerAccess(optimizer=optimizer)
    LoRADash.after_step([adapter], TrainProgress(launch, 10 * launch), access)
    assert moves(adapter.delta, optimizer) == pytest.approx([1.0] * 50, abs=1e-4)


@pytest.mark.parametrize("at", [1, 100, 2000])
def test_flexloras_new_directions_move_by_the_learning_rate(at: int) -> None:
    adapter = inject(Layer(), "flexlora", {"r": 4}, targets=["q_proj"])["q_proj"]
    assert isinstance(adapter, FlexLoRA)
    optimizer = torch.optim.AdamW(adapter.trained().values(), lr=RATE, weight_decay=0)
    for _ in range(at):
        for parameter in adapter.trained().values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    adapter.grow(5, DeepSpeedOptimizerAccess(optimizer=optimizer), seed=0)
    for parameter, new in ((adapter.E, 5), (adapter.A, 5), (adapter.B, (slice(None), 5))):
        others = [value.detach().clone() for value in adapter.trained().values()]
        assert moves(parameter, optimizer, new) == pytest.approx([1.0] * 50, abs=1e-4)
        for value, other in zip(adapter.trained().values(), others, strict=True):
            value.data.copy_(other)
            value.grad = None
    assert moves(adapter.E, optimizer, slice(4)) == pytest.approx([1.0] * 50, abs=1e-3)

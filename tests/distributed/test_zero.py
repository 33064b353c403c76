"""The loop under DeepSpeed's engine: every method, ZeRO 0 to 3, one and two processes, one loss curve.

With every change, what asks most of an engine (a schedule that moves values, weights of the model itself) trains at
stages 1 and 2, and at stage 3 one of each kind of site, start and schedule that the selection of
tests/long/test_matrix.py does not train; ``-m long`` adds the others.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from subspace import config as config_module
from subspace.adapters.registry import list_methods
from subspace.common.paths import REPOSITORY
from tests.helpers.material import STAGES, logged, make_material, saved_adapter, worker_command
from tests.helpers.reference import train_plainly
from tests.helpers.tiny_models import EARLY_SCHEDULES, tiny

pytestmark = pytest.mark.processes

STEPS = 8
#: A prompt learns slowly. Where a gradient is nearly zero, Adam makes rounding as large as a step: smaller steps help.
RATES = {"prompt": 0.05, "lora-dash": 0.001, "parallel": 0.002, "series": 0.002}
#: After LoRA-Dash's launch, Adam's first step on delta is a whole one however small its gradient; so is that of every
#: weight of the model.
SLACK = {"lora-dash": 2, "full": 2}
#: From there on, one value in a thousand may have a gradient so near zero that its steps are rounding.
STRAY = {"lora-dash": 1e-3, "full": 1e-3}
#: A base in 16 bits, so that adapters are copied to its dtype; at stage 3 each is cast by itself.
IN_16_BITS = ("model.dtype=bfloat16", "train.steps=6")
#: By stage; at stage 3 kinds of site (activations, attention), of starts (from W's singular directions) and of
#: schedules (pruning, a launch).
WITH_EVERY_CHANGE = {
    0: {"full"},
    1: {"adalora"},
    2: {"full"},
    3: {"adalora", "full", "ia3", "lora", "lora-dash", "prefix", "spectral"},
}
LONG = pytest.mark.long
CASES = [
    pytest.param(stage, method, marks=[] if method in WITH_EVERY_CHANGE[stage] else LONG)
    for stage in STAGES
    for method in list_methods()
]
#: What trains at a mixture's experts: by the factors of all at a time, and one expert after the other.
MIXED = [(stage, method) for stage in STAGES for method in ("lora", "dora", "pissa")]
MIXED_CASES = [
    pytest.param(stage, method, marks=[] if method == "lora" and stage in (2, 3) else LONG) for stage, method in MIXED
]
every_case = pytest.mark.parametrize(("stage", "method"), CASES)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train what the selected tests ask for: one process at stage 0 as the reference, two processes at each stage."""
    root = tmp_path_factory.mktemp("zero")
    selected: list[Any] = [item for item in request.session.items if item.path == request.path]
    asked = [item.callspec.params for item in selected if hasattr(item, "callspec")]
    cases: list[tuple[int, str]] = sorted(
        {(params["stage"], params["method"]) for params in asked if "method" in params}
    )
    methods = sorted({method for _, method in cases} | {"lora"})
    file = make_material(root)

    def arguments(name: str, stage: int, method: str, *more: str) -> tuple[str, list[str]]:
        run = [f"runs={root}", f"name={name}-{method}", f"engine={root / f'zero{stage}.json'}", f"method={method}"]
        run += [f"method.{key}={value}" for key, value in EARLY_SCHEDULES.get(method, {}).items()]
        run += [f"train.steps={STEPS}", f"train.learning_rate={RATES.get(method, 0.005)}", "train.validate_every=4"]
        return str(file), [*run, *more]

    one = [arguments("one", 0, method) for method in methods]
    tiny("qwen3_moe", root / "mixture")
    experts = [f"model.path={root / 'mixture'}", "train.steps=6", "train.validate_every=0"]
    mixtures = {(params["stage"], params["mixed"]) for params in asked if "mixed" in params}
    one += [arguments("experts", 0, method, *experts) for method in sorted({method for _, method in mixtures})]
    launch([*one, arguments("one-16", 0, "lora", *IN_16_BITS)], root, ranks=1)
    two = [arguments(f"two-zero{stage}", stage, method, "train.micro_batch_size=2") for stage, method in cases]
    two += [
        arguments(f"two-16-zero{stage}", stage, "lora", *IN_16_BITS, "train.micro_batch_size=2") for stage in STAGES
    ]
    two.append(arguments("packed", 3, "lora", "train.micro_batch_size=2", "data.packing=true"))
    two += [
        arguments(f"experts-zero{stage}", stage, method, *experts, "train.micro_batch_size=2")
        for stage, method in MIXED
        if (stage, method) in mixtures
    ]
    two += [(str(file), small_last_step(root, stage)) for stage in STAGES]
    two.append((str(file), small_last_step(root, 3, "data.packing=true")))
    launch(two, root, ranks=2)
    return root


def small_last_step(root: Path, stage: int, *more: str) -> list[str]:
    """Return settings under which 40 rows are three steps of 12 and one of 4, for two processes with 3 batches each."""
    own = ["train.steps=null", "train.epochs=1", "train.batch_size=12", "train.micro_batch_size=2", *more]
    return [f"runs={root}", f"name=small-{stage}-{len(more)}", f"engine={root / f'zero{stage}.json'}", *own]


@pytest.mark.parametrize(("stage", "more"), [*((stage, ()) for stage in STAGES), (3, ("data.packing=true",))], ids=str)
def test_the_last_smaller_step_is_exact_though_processes_have_no_rows(
    runs: Path, stage: int, more: tuple[str, ...]
) -> None:
    alone = config_module.read_config(runs / "run.yaml", small_last_step(runs, 0, *more))
    expected, tensors = train_plainly(alone)
    folder = runs / f"small-{stage}-{len(more)}"
    assert len(expected) == 4
    assert logged(folder) == pytest.approx(expected, abs=1e-5)
    for name, tensor in saved_adapter(folder).items():
        assert torch.allclose(tensor, tensors[name], atol=2e-4), name


def launch(wanted: list[Any], root: Path, ranks: int) -> None:
    jobs = root / f"{ranks}.json"
    jobs.write_text(json.dumps(wanted))
    command = worker_command(ranks, "zero_losses", str(jobs))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def losses(folder: Path, key: str = "loss") -> Tensor:
    return torch.tensor(logged(folder, key), dtype=torch.float64)


@every_case
def test_loss_curve_is_that_of_one_process(runs: Path, method: str, stage: int) -> None:
    one, two = losses(runs / f"one-{method}"), losses(runs / f"two-zero{stage}-{method}")
    assert len(one) == STEPS
    learned = losses(runs / f"one-{method}", "validation_loss")
    assert learned[-1] < learned[0] - 1e-3  # so there is something to agree on
    assert (one - two).abs().max() < 1e-5 * SLACK.get(method, 1)


@every_case
def test_gradient_is_as_large_as_that_of_one_process(runs: Path, method: str, stage: int) -> None:
    """Adam and clipping would hide a gradient that is too large or too small by a factor; weight decay would not."""
    one, two = (losses(runs / f"{ranks}-{method}", "gradient_norm") for ranks in ("one", f"two-zero{stage}"))
    assert len(one) == STEPS
    assert torch.allclose(one, two, rtol=1e-3, atol=1e-5)


@every_case
def test_validation_and_adapter_agree_too(runs: Path, method: str, stage: int) -> None:
    one, two = runs / f"one-{method}", runs / f"two-zero{stage}-{method}"
    assert torch.allclose(losses(one, "validation_loss"), losses(two, "validation_loss"), atol=1e-5)
    expected, found = saved_adapter(one), saved_adapter(two)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        apart = (tensor - found[name]).abs()
        assert (apart > 2e-4).float().mean() <= STRAY.get(method, 0), name
        assert apart.max() < 5e-3, name


def test_packed_rows_have_the_same_loss_curve(runs: Path) -> None:
    # Sums in another order: Adam makes more of it than of the ranks' sums.
    assert (losses(runs / "one-lora") - losses(runs / "packed-lora")).abs().max() < 5e-4


@pytest.mark.parametrize(("stage", "mixed"), MIXED_CASES)
def test_experts_have_the_same_curve_and_adapter_at_every_stage(runs: Path, stage: int, mixed: str) -> None:
    one, two = (runs / f"{name}-{mixed}" for name in ("experts", f"experts-zero{stage}"))
    assert losses(one)[-1] < losses(one)[0] - 0.02
    for key in ("loss", "gradient_norm"):
        assert torch.allclose(losses(one, key), losses(two, key), rtol=1e-4, atol=1e-5)
    expected, found = saved_adapter(one), saved_adapter(two)
    assert expected.keys() == found.keys()
    assert any("experts.down_proj" in name for name in expected)
    for name, tensor in expected.items():
        assert ((tensor - found[name]).abs() > 2e-4).float().mean() < 1e-3, name


@pytest.mark.parametrize("stage", STAGES)
def test_sixteen_bits_have_the_same_curve_at_every_stage(runs: Path, stage: int) -> None:
    """To the rounding of another division into micro-batches; the stages themselves divide alike."""
    one, two, first = (runs / f"{name}-lora" for name in ("one-16", f"two-16-zero{stage}", "two-16-zero0"))
    for other, rounding in ((one, 0.01), (first, 1e-3 if stage < 3 else 0.01)):
        for key in ("loss", "gradient_norm"):
            assert torch.allclose(losses(two, key), losses(other, key), rtol=rounding), (key, other)
    assert losses(two)[-1] < losses(two)[0] - 0.02

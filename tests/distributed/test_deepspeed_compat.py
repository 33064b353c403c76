"""Canaries: one for each internal name of DeepSpeed in ``deepspeed_compat``. One that fails names what has changed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from subspace.common.paths import REPOSITORY
from subspace.distributed import deepspeed_compat as compat
from subspace.distributed.deepspeed_config import compute_batch_layout, resolve_deepspeed_config
from subspace.distributed.engine import init_distributed, init_engine
from subspace.distributed.zero import full_gradients, gathered, write_parameter

WIDTH, RATE = 6, 0.5


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the values that Python reads from tensors."""

    count = 0

    def __torch_dispatch__(self, run: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += run in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return run(*args, **(kwargs or {}))


class Started:
    """An engine over one linear layer, whose first gradient is there and whose first step is not taken."""

    def __init__(self, stage: int, dtype: str = "float32", *, clip: float = 0.0, offload: bool = False) -> None:
        init_distributed()
        torch.manual_seed(0)
        self.model = nn.Linear(WIDTH, 2, bias=False)
        self.start = self.model.weight.detach().clone()
        # DeepSpeed's buckets are 2 GB by default. Those of many engines in one process leave no room to start another.
        zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 1000}
        if stage == 3:
            zero |= {"stage3_param_persistence_threshold": 0}
        if offload:
            zero |= {"offload_optimizer": {"device": "cpu"}}
        raw = {"zero_optimization": zero, "fp16": {"initial_scale_power": 3} if dtype == "float16" else {}}
        config = resolve_deepspeed_config(raw, compute_batch_layout(2, None, 1), dtype=dtype, clip=clip).settings
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
        self.engine: Any = init_engine(self.model, config, optimizer, lambda step: 1.0)
        self.weight: nn.Parameter = self.model.weight  # type: ignore[assignment]
        self.backward()

    def backward(self) -> None:
        x = torch.ones(2, WIDTH, dtype=torch.float16 if self.engine.fp16_enabled() else torch.float32)
        self.engine.backward(self.engine(x).float().sum())


@pytest.fixture(params=[0, 1, 2, 3])
def started(request: pytest.FixtureRequest) -> Started:
    return Started(request.param)


@pytest.fixture
def sharded() -> Started:
    return Started(3)


def blame(name: str) -> str:
    return f"DeepSpeed {version('deepspeed')} has changed {name}, which subspace/distributed/deepspeed_compat.py uses"


def test_the_table_names_the_version_that_is_installed() -> None:
    (checked,) = re.findall(r"Checked with DeepSpeed (\S+?)\.\s", compat.__doc__ or "")
    assert version("deepspeed") == checked, "look at the canaries below, then write the new version into the table"


def test_zero3_parameters_carry_id_shape_and_shard(sharded: Started) -> None:
    assert compat.is_sharded(sharded.weight), blame("parameter.ds_id")
    assert sharded.weight.shape != sharded.start.shape
    assert compat.full_shape(sharded.weight) == sharded.start.shape, blame("parameter.ds_shape")
    shard = compat.local_shard(sharded.weight)
    assert shard is not None, blame("parameter.ds_tensor")
    assert torch.equal(shard.view(-1)[: sharded.start.numel()].view_as(sharded.start), sharded.start)


def test_parameters_of_other_stages_are_whole() -> None:
    for stage in (0, 1, 2):
        weight = Started(stage).weight
        assert not compat.is_sharded(weight), blame("parameter.ds_id")
        assert compat.local_shard(weight) is None
        assert compat.has_zero_optimizer(weight) == (stage > 0), blame("parameter._hp_mapping")


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e9])
def test_a_step_without_reads_moves_the_same(request: pytest.FixtureRequest, clip: float) -> None:
    for stage in (0, 1, 2, 3):
        moved, reads = [], []
        for quiet in (False, True):
            started = Started(stage, clip=clip)
            with compat.steps_without_reads(started.engine) if quiet else nullcontext(), Reads() as counted:  # type: ignore[no-untyped-call]
                started.engine.step()
            with gathered([started.weight]):
                moved.append(started.weight.detach().clone())
            reads.append(counted.count)
        assert torch.equal(*moved)
        assert not torch.equal(moved[0], started.start)
        assert reads[1] == 0, blame("what it reads in a step")
        assert reads[0] > 0 or not stage, blame("is_invalid_grad_norm, which could be left alone now")


def test_a_new_parameter_is_sharded_as_another(sharded: Started) -> None:
    new = nn.Parameter(torch.arange(12.0))
    compat.shard_as(sharded.weight, [new])
    assert compat.is_sharded(new), blame("parameter.convert_to_zero_parameters")
    with gathered([new]):
        assert torch.equal(new.detach(), torch.arange(12.0))


def test_the_optimizers_slice_holds_the_parameters_values(started: Started) -> None:
    at = compat.optimizer_slice(started.engine, started.weight)
    names = "parameter._hp_mapping, optimizer.single_partition_of_fp32_groups, .grad_position or .get_param_id"
    assert at is not None, blame(names)
    assert (at.start, at.length) == (0, started.start.numel()), blame(names)
    held = at.key.detach().view(-1)[at.offset : at.offset + at.length]
    assert torch.equal(held, started.start.view(-1)), blame(names)
    keys = [id(p) for group in compat.basic_optimizer(started.engine).param_groups for p in group["params"]]
    if started.engine.zero_optimization_stage() in (0, 1, 2):
        assert id(at.key) in keys, blame("what the optimizer under ZeRO's wrapper is given")


def test_the_optimizer_keeps_its_state_under_the_slices_key(started: Started) -> None:
    started.engine.step()
    at = compat.optimizer_slice(started.engine, started.weight)
    assert at is not None
    state = compat.basic_optimizer(started.engine).state[at.key]
    assert state["exp_avg"].numel() >= at.offset + at.length, blame("engine.basic_optimizer")
    # The gradient of the sum over two rows of ones is 2 everywhere; beta1 is 0.9.
    moment = state["exp_avg"].view(-1)[at.offset : at.offset + at.length]
    assert torch.allclose(moment, torch.full_like(moment, 0.2)), blame("engine.basic_optimizer")


def test_gradients_are_seen_between_backward_and_step(started: Started) -> None:
    gradients = compat.local_gradients(started.engine)
    assert gradients, blame("optimizer.averaged_gradients")
    assert {float(value) for gradient in gradients for value in gradient.view(-1)[: WIDTH * 2]} == {2.0}
    (whole,) = full_gradients([started.weight])
    assert whole is not None
    assert torch.equal(whole, torch.full_like(whole, 2.0))


@pytest.mark.parametrize("stage", [2, 3])
def test_norms_of_offloaded_gradients_are_seen_between_backward_and_step(stage: int) -> None:
    started = Started(stage, offload=True)
    (norm,) = compat.offloaded_gradient_norms(started.engine)
    # The gradient is 2 at all of 2 x WIDTH places.
    assert float(norm) == pytest.approx(2 * (2 * WIDTH) ** 0.5), blame("optimizer.norm_for_param_grads")
    assert compat.local_gradients(started.engine) == []
    (whole,) = full_gradients([started.weight])
    assert whole is not None
    assert torch.equal(whole, torch.full_like(whole, 2.0)), blame("parameter._hp_mapping.get_lp_grad_fragment")


def test_a_written_parameter_is_what_the_next_step_starts_from(started: Started) -> None:
    write_parameter(started.weight, torch.zeros(2, WIDTH))
    started.engine.step()
    with gathered([started.weight]):
        # Adam's first step is the learning rate, whatever the gradient.
        assert torch.allclose(started.weight.detach(), torch.full((2, WIDTH), -RATE)), blame("safe_set_full_fp32_param")


def test_state_in_memory_is_not_taken_for_swapped(started: Started) -> None:
    assert not compat.optimizer_state_on_nvme(started.engine)


def test_an_optimizer_on_nvme_is_known_by_its_attribute() -> None:
    """ZeRO-3 with NVMe needs libaio, so its source is read instead."""
    from deepspeed.runtime.zero import stage3

    source = Path(stage3.__file__).read_text()
    assert "self.swap_optimizer = offload_optimizer_config.device == OffloadDeviceEnum.nvme" in source, blame(
        "optimizer.swap_optimizer"
    )


def test_step_counters_count_and_are_restored(started: Started) -> None:
    started.engine.step()
    assert compat.step_counters(started.engine) == {"steps": 1, "skipped": 0}, blame("engine.global_steps")
    compat.restore_step_counters(started.engine, {"steps": 7, "skipped": 2})
    assert compat.skipped_steps(started.engine) == 2, blame("engine.skipped_steps")
    started.backward()
    started.engine.step()
    assert compat.step_counters(started.engine) == {"steps": 8, "skipped": 2}, blame("engine.global_steps")


@pytest.mark.parametrize("stage", [1, 3])
def test_the_loss_scalers_state_is_read_and_restored(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)  # slow on a CPU, but right
    started = Started(stage, "float16")
    assert compat.loss_scale(started.engine) == 2**3, blame("optimizer.cur_scale")
    assert not compat.loss_scale_exhausted(started.engine)
    state = compat.loss_scale_state(started.engine)
    assert set(state) == {"cur_iter", "cur_scale", "last_overflow_iter", "cur_hysteresis"}, blame(
        "optimizer.loss_scaler"
    )
    compat.restore_loss_scale(started.engine, {**state, "cur_scale": 1.0, "cur_iter": 5})
    assert compat.loss_scale(started.engine) == 1.0, blame("optimizer.loss_scaler")
    assert compat.loss_scale_state(started.engine)["cur_iter"] == 5
    assert compat.loss_scale_exhausted(started.engine), blame("optimizer.loss_scaler.min_scale")


def test_outside_float16_there_is_no_loss_scale(started: Started) -> None:
    assert compat.loss_scale_state(started.engine) == {}
    compat.restore_loss_scale(started.engine, {})
    assert compat.loss_scale(started.engine) == 1.0


def test_one_process_without_zero_does_not_reduce_its_gradients() -> None:
    engine = Started(0).engine
    assert engine.enable_backward_allreduce is False, blame("engine.enable_backward_allreduce")
    assert Started(1).engine.enable_backward_allreduce is True, blame("engine.enable_backward_allreduce")


def test_muon_is_imported_without_torchs_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("deepspeed.runtime.zero.muon")]:
        monkeypatch.delitem(sys.modules, name)
    compat.import_muon()
    muon = sys.modules["deepspeed.runtime.zero.muon.original_muon"]
    assert not hasattr(muon.muon_update, "_torchdynamo_orig_callable")
    assert hasattr(torch.compile(lambda: None), "_torchdynamo_orig_callable")  # what it would have


def test_the_table_of_ops_decides_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.ops
    from deepspeed.comm.torch import build_shm_op

    monkeypatch.setitem(vars(deepspeed.ops), "__compatible_ops__", {"deepspeed_shm_comm": True})
    compat.disable_shm_comm_op()
    assert build_shm_op() is None, blame("deepspeed.ops.__compatible_ops__")


@pytest.mark.processes
def test_the_lock_of_a_build_that_was_killed_does_not_hang(tmp_path: Path) -> None:
    """On a CPU DeepSpeed would compile a library for its collectives, and wait for that lock for ever."""
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    joins = "from subspace.distributed import collectives, engine; engine.init_distributed(); collectives.shutdown()"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    environment = {name: value for name, value in environment.items() if name not in ("RANK", "WORLD_SIZE")}
    subprocess.run([sys.executable, "-c", joins], cwd=REPOSITORY, env=environment, check=True, timeout=300)
    assert lock.exists()


@pytest.mark.processes
def test_deepspeeds_logger_is_silenced_by_the_command_line_only() -> None:
    """In a process of its own: here, another test may have been the command line already."""
    script = """
import json, logging
from subspace.distributed import collectives, engine, launcher

def passed():
    logger = logging.getLogger("DeepSpeed")
    levels = (logging.WARNING, logging.ERROR)
    return [logger.isEnabledFor(n) and bool(logger.filter(logging.makeLogRecord({"levelno": n}))) for n in levels]

engine.init_distributed()
as_a_library = passed()
launcher.init_rank_env()
print("passed:", json.dumps([as_a_library, passed()]))
collectives.shutdown()
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, timeout=300, capture_output=True, text=True
    )
    (passed,) = re.findall("^passed: (.*)$", done.stdout, re.MULTILINE)
    assert json.loads(passed) == [[True, True], [False, True]]


def test_builds_leave_their_locks_where_they_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = compat.build_lock("async_io")
    assert lock == tmp_path / "async_io" / "lock", "torch has changed torch.utils.cpp_extension._get_build_directory"


@pytest.mark.processes
class StandIn:
    """What is no tensor, but stands for one where torch multiplies by it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*(arg.tensor if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


@pytest.mark.parametrize("before", [False, True], ids=["before", "after"])
def test_the_linear_that_zero_3_leaves_behind_keeps_the_protocol(monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    from deepspeed.runtime.zero import linear, partition_parameters

    init_distributed()
    monkeypatch.setattr(partition_parameters, "zero3_linear_wrap", linear.zero3_linear_wrap)
    patches = partition_parameters.InsertPostInitMethodToModuleSubClasses
    monkeypatch.setattr(patches, "linear_bk", torch._C._nn.linear, raising=False)
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    if before:
        compat.keep_linear_protocol()
    object.__new__(patches)._enable_mem_efficient_linear()
    if not before:
        compat.keep_linear_protocol()
    weight = torch.randn(3, 4, requires_grad=True)
    product: Any = torch.nn.functional.linear
    assert product is not torch._C._nn.linear
    product(torch.ones(2, 4), StandIn(weight)).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((3, 4), 2.0))
    assert torch.equal(product(torch.ones(2, 4), weight), product(torch.ones(2, 4), StandIn(weight)))


def test_a_second_run_in_one_process_has_a_world_group_of_its_own() -> None:
    again = (
        "import deepspeed; from deepspeed.utils import groups; from subspace.distributed import collectives, engine\n"
        "for _ in range(2):\n"
        "    engine.init_distributed()\n"
        "    assert deepspeed.comm.get_global_rank(groups._clone_world_group(), 0) == 0\n"
        "    collectives.shutdown()\n"
    )
    subprocess.run([sys.executable, "-c", again], check=True, timeout=300)


def test_deepspeeds_launcher_makes_its_command_for_several_hosts_by_the_class_that_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.launcher import multinode_runner, runner

    assert runner.PDSHRunner is multinode_runner.PDSHRunner, blame("launcher.runner.PDSHRunner")
    monkeypatch.setattr(runner, "PDSHRunner", runner.PDSHRunner)
    monkeypatch.setattr(runner, "main", lambda words: words)
    given: list[Any] = []

    def started(*arguments: Any) -> tuple[list[str], dict[str, str]]:
        given.extend(arguments)
        return ["start"], {"A": "b"}

    compat.run_pdsh_launcher([], started)
    options = ["--module", "--no_local_rank", "--log_level", "critical", "--master_addr", "x", "subspace", "d e"]
    made = runner.PDSHRunner(runner.parse_args(options), "e30")
    made.add_export("F", "$g")
    assert made.get_cmd({"C": "d"}, {"host": [0]}) == (["start"], ["true"], {"A": "b"}), blame("PDSHRunner.get_cmd")
    words, exports, hosts, environment = given
    assert (exports["F"], hosts, environment) == ("$g", ["host"], {"C": "d"}), blame("PDSHRunner.exports")
    assert words[:2] == ["--world_info=e30", "--master_addr=x"], blame("the launcher's arguments")
    assert words[-5:] == ["--module", "--no_local_rank", "--log_level=critical", "subspace", "d e"], blame(
        "the launcher's arguments"
    )

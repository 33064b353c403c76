"""What is told before a run, beside what the run takes; and what it is told for models that are not here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from subspace import config as config_module
from subspace.adapters.inject import inject
from subspace.cli import main as cli
from subspace.data.collate import Batch
from subspace.distributed.deepspeed_config import compute_batch_layout, resolve_deepspeed_config
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from subspace.models.lm_head import SummedLoss
from subspace.models.loading import open_model, open_shape
from subspace.planning import run_time
from subspace.planning.activation_memory import ActivationMemory, BatchShape, MemoryTracker, trace_activation_memory
from subspace.planning.devices import CUDA_CONTEXT, NCCL_BUFFERS, device_specs, find_device, gpu_overheads, parse_size
from subspace.planning.plan import MemoryEstimate, Plan, TrainingWork, _shape, build_plan
from subspace.planning.static_memory import StaticMemory
from subspace.training.optimizers import make_optimizer
from tests.helpers.material import make_material
from tests.helpers.tiny_models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9

#: Runs of SmolLM2-135M that differ in what takes memory.
CASES = {
    "lora": ["train.batch_size=4"],
    "checkpointing": ["train.batch_size=8", "method=dora", "method.r=8", "model.gradient_checkpointing=true"],
    "bfloat16": ["train.batch_size=4", "model.dtype=bfloat16"],
    "nf4": ["train.batch_size=4", "model.quantize=nf4", "model.dtype=float32"],
    "micro-batches": ["train.batch_size=8", "train.micro_batch_size=2", "method=houlsby", "targets=null"],
}
SHORT = [
    *("train.trackers=[]", "train.keep_memory=false", "engine=ds_configs/zero1.json"),
    *("data.mixture=commonsense", "data.prompt=alpaca-indented", "data.max_length=128"),
]


def verified(*arguments: str) -> dict[str, Any]:
    """Return what `plan --verify` tells, in a process of its own: what this one holds would count as the run's."""
    command = [sys.executable, "-m", "subspace", "plan", *arguments, "--verify", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.long
@pytest.mark.model
@pytest.mark.processes
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_resident_memory_is_told_within_a_tenth(settings: list[str]) -> None:
    told = verified("launch/recipes/quickstart.yaml", *SHORT, *settings)
    assert told["predicted"] == pytest.approx(told["measured"]["peak"], rel=0.1)
    assert told["plan"]["checkpoint"] == pytest.approx(told["measured"]["checkpoint"], rel=0.1)


@pytest.mark.processes
def test_a_small_run_takes_what_is_told(tmp_path: Path) -> None:
    told = verified(str(make_material(tmp_path)), "train.batch_size=768", "train.keep_memory=false")
    assert told["predicted"] == pytest.approx(told["measured"]["peak"], rel=0.1)
    activations = sum(part["bytes"] for part in told["plan"]["parts"] if part["name"].startswith("activations"))
    assert activations > 0.3 * told["predicted"]  # else nothing but Python's own memory would be compared


def test_the_micro_batch_that_takes_most_is_planned_for(tmp_path: Path) -> None:
    """Where the head weighs more than the layers, it is not the longest one."""
    config = config_module.read_config(make_material(tmp_path), ["train.batch_size=4", "data.group_by_length=false"])
    work = TrainingWork.of(config, compute_batch_layout(4, None, 1))
    assert work.data is not None
    assert work.micro_batches is not None
    shapes = [_shape(work.data, rows.tolist()) for rows in work.micro_batches]
    assert max(shape.tokens for shape in shapes) == work.batch.tokens
    by_head = work.heaviest(ActivationMemory(activations=0, head=1, backward=0, peak=0, left=0))
    assert by_head.labelled == max(shape.labelled for shape in shapes)
    by_layers = work.heaviest(ActivationMemory(activations=1, head=0, backward=0, peak=0, left=0))
    assert by_layers.tokens == work.batch.tokens
    assert by_layers.labelled < by_head.labelled


def test_packed_rows_are_planned_for(tmp_path: Path) -> None:
    config = config_module.read_config(
        make_material(tmp_path), ["train.batch_size=8", "data.packing=true", "data.max_length=128"]
    )
    work = TrainingWork.of(config, compute_batch_layout(8, None, 1))
    assert work.data is not None
    assert work.micro_batches is not None
    shapes = [_shape(work.data, rows.tolist()) for rows in work.micro_batches]
    fed = [shape.rows * shape.tokens for shape in shapes]
    assert len(set(fed)) > 1
    assert work.batch.rows < 8
    assert work.batch.rows * work.batch.tokens == pytest.approx(max(fed), rel=0.1)


def test_what_training_refuses_to_pack_is_not_planned(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="method prompt puts its vectors before the first one only"):
        tiny_plan(tmp_path, "method=prompt", "data.packing=true")


@pytest.mark.parametrize("keep", [True, False])
def test_memory_that_is_kept_is_told_of(tmp_path: Path, keep: bool) -> None:
    found = tiny_plan(tmp_path, f"train.keep_memory={str(keep).lower()}")
    assert ("freed memory stays with the process" in "\n".join(found.lines())) == keep


def tiny_plan(root: Path, *settings: str, processes: int = 1) -> Plan:
    return build_plan(config_module.read_config(make_material(root), settings), processes=processes)


def parts(found: Plan) -> dict[str, int]:
    return {part.name: part.bytes for part in found.parts}


def test_a_7b_model_is_planned_without_a_file() -> None:
    """Nor with a GPU: what a login node is asked."""
    settings = ["model.path=llama-7b", "model.quantize=nf4", "train.micro_batch_size=1"]
    config = config_module.read_config(ROOT / "launch/recipes/llama-7b-lora-r32.yaml", settings)
    found = build_plan(config, on=find_device("rtx4090-24gb"))
    assert config.model.dtype == "float16"  # in which this machine need not compute
    assert (found.device, found.planned_for) == ("cuda", "NVIDIA GeForce RTX 4090 24 GB")
    assert "Python, libraries and rows" not in parts(found)  # a host's memory
    # Tensors are quantised one by one in one kernel, without the code book indices that a CPU needs.
    assert found.loading < parts(found)["frozen weights"] + parts(found)["scales of the quantisation"] + 0.1 * GB
    assert "were every row as long as data.max_length" in "\n".join(found.lines())  # the data is not here
    assert found.trained == 56_098_816
    packed = (6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096) / 2
    held = packed + 2 * (2 * 32000 * 4096 + 65 * 4096)
    assert parts(found)["frozen weights"] == pytest.approx(held, rel=1e-3)
    assert parts(found)["scales of the quantisation"] == pytest.approx(packed * 2 / 64 * 4, rel=1e-2)
    assert found.largest_micro_batch
    assert found.largest_micro_batch >= 1


def gpu_plan(root: Path, *settings: str, device: str = "24gb", processes: int = 1, memory: int | None = None) -> Plan:
    config = config_module.read_config(make_material(root), settings)
    return build_plan(config, processes=processes, memory=memory, on=find_device(device))


def test_a_plan_for_a_gpu_counts_what_is_no_tensor(tmp_path: Path) -> None:
    one, eight = (gpu_plan(tmp_path, device="a100-40gb", processes=n) for n in (1, 8))
    found = {item.name: item.bytes for item in eight.overheads}
    assert found["CUDA context and kernels (estimate)"] == CUDA_CONTEXT
    assert found["NCCL's buffers (estimate)"] == NCCL_BUFFERS
    assert all("estimate" in name for name in found)
    assert "NCCL's buffers (estimate)" not in {item.name for item in one.overheads}
    assert eight.needed == eight.peak + sum(found.values())
    assert eight.memory == 40 * GB
    text = "\n".join(eight.lines())
    assert "8 processes, ZeRO 0, NVIDIA A100 SXM4 40 GB" in text
    assert "needed of the device, estimates included" in text
    here = tiny_plan(tmp_path)
    if here.device == "cpu":
        assert (here.overheads, here.needed) == ((), max(here.peak, here.loading))


def test_the_largest_micro_batch_leaves_room_for_what_is_no_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = gpu_plan(tmp_path, "train.batch_size=8", memory=GB).largest_micro_batch
    assert most
    full = gpu_plan(tmp_path, f"train.batch_size={most}", memory=GB)
    assert 0.9 * GB < full.needed <= GB
    # With all that is no tensor left out, more rows were promised than fit.
    monkeypatch.setattr("subspace.planning.plan.gpu_overheads", lambda *a: ())
    promised = gpu_plan(tmp_path, "train.batch_size=8", memory=GB).largest_micro_batch
    assert promised
    assert promised > 2 * most


def test_the_largest_micro_batch_fits_where_rows_do_not_all_take_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {1: 10, 2: 12, 3: 14, 4: 16, 5: 21, 6: 26}  # from the fifth on, the output head counts
    made = MemoryEstimate(BatchShape(1, 8, 7, 7), ActivationMemory(0, 0, 0, 0, 0), False, 0, (), 1, gpu=False)
    monkeypatch.setattr("subspace.planning.plan.trace_activation_memory", lambda model, batch, **how: batch.rows)
    monkeypatch.setattr(MemoryEstimate, "needed", lambda self, rows: needed[rows])
    assert [made.largest_micro_batch(None, memory) for memory in (9, 10, 17, 20, 21)] == [0, 1, 4, 4, 5]


def test_time_follows_the_published_rates_and_is_shared_by_the_processes() -> None:
    specs = device_specs()

    def seconds(name: str, processes: int = 1) -> tuple[float, float]:
        how = {"weights": 13 * GB, "micro_batches": 10, "recomputed": False}
        return run_time.seconds_on(specs[name], 1e18, "bfloat16", processes=processes, **how)  # type: ignore[arg-type]

    assert seconds("a100-80gb")[0] / seconds("h100-80gb")[0] == pytest.approx(989.4 / 312)
    assert seconds("h100-80gb", 4)[0] == pytest.approx(seconds("h100-80gb")[0] / 4)
    assert seconds("h100-80gb")[0] == pytest.approx(1e18 / 989.4e12 / 0.6)
    assert seconds("h100-80gb")[1] > 3 * seconds("h100-80gb")[0]


def test_time_on_a_gpu_is_told_where_its_rates_are_known(tmp_path: Path) -> None:
    known, unknown = (gpu_plan(tmp_path, device=name) for name in ("h200-141gb", "80gb"))
    assert known.seconds
    assert "time on NVIDIA H200 SXM 141 GB: " in "\n".join(known.lines())
    assert not known.longest_rows
    assert unknown.seconds is None
    assert "time on" not in "\n".join(unknown.lines())


def test_small_micro_batches_on_a_gpu_are_bound_by_its_memory() -> None:
    spec = device_specs()["h100-80gb"]
    how = {"dtype": "bfloat16", "weights": 13 * GB, "processes": 1, "recomputed": False}
    few = run_time.seconds_on(spec, 1e12, micro_batches=100, **how)  # type: ignore[arg-type]
    assert few[0] == pytest.approx(100 * 2 * 13e9 / 3350e9 / 0.6)


def test_every_declared_gpu_has_what_a_plan_needs() -> None:
    for name, spec in device_specs().items():
        assert name.endswith(f"-{spec.memory:g}gb")
        assert spec.rates["bf16"] >= spec.rates["tf32"] >= spec.rates["fp32"] > 0
        assert spec.rate("float16") == spec.rate("bfloat16") == 1e12 * spec.rates["bf16"]
        assert spec.rate("float32") == 1e12 * spec.rates["fp32"]
        assert spec.source
    large, small = (sum(i.bytes for i in gpu_overheads(1, device_specs()[n], 0)) for n in ("h100-80gb", "a100-80gb"))
    assert large > small  # its cuBLAS workspace


def test_an_unknown_gpu_is_told_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(make_material(tmp_path))
    assert cli.main(["plan", run, "--device", "h100-80g"]) == 2
    assert "no such GPU is known. Did you mean 'h100-80gb'?" in capsys.readouterr().err
    assert cli.main(["plan", run, "--device", "24gb", "--verify"]) == 2
    assert "plans for another machine" in capsys.readouterr().err
    assert cli.main(["plan", run, "--device", "l40s-48gb", "--json", "train.optimizer=paged_adamw8bit"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["planned_for"] == "NVIDIA L40S 48 GB"
    assert told["needed"] > told["peak"]
    assert [item["name"] for item in told["overheads"]]


def test_a_gpus_dropout_is_planned_for_with_its_mask(tmp_path: Path) -> None:
    """A CPU keeps the indices of what it drops, which are fewer; a GPU a mask of every value."""
    tiny_llama(tmp_path / "m")
    traced = open_shape(ModelConfig(path=str(tmp_path / "m"), dtype="float32"), torch.device("cuda"))
    inject(traced, "lora", {"r": 4, "dropout": 0.02}, start=False)
    batch = BatchShape(8, 64, 63, 8 * 63)
    assert trace_activation_memory(traced, batch, gpu=True).peak > trace_activation_memory(traced, batch).peak


def test_the_clock_queues_products_before_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small product a wait would time a GPU's launches."""
    counts = {"mm": 0, "_local_scalar_dense": 0}

    class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, run: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = run.overloadpacket.__name__
            counts[name] = counts.get(name, 0) + 1
            return run(*args, **(kwargs or {}))

    width, queued = run_time.CLOCKS["cuda"]
    assert 2 * width**3 / 1e15 > 1e-3  # a millisecond at a thousand TFLOP/s
    monkeypatch.setitem(run_time.CLOCKS, "cpu", (16, queued))
    with Counter():  # type: ignore[no-untyped-call]
        assert run_time.matmul_rate(torch.device("cpu"), torch.float32, seconds=0) > 0
    assert counts["mm"] == 1 + queued
    assert counts["_local_scalar_dense"] == 2


def test_a_layer_counts_once_with_its_adapter() -> None:
    model = tiny_llama()
    frozen = run_time.matrix_work(model, 10, recomputed=False)
    inject(model, "lora")
    assert run_time.matrix_work(model, 10, recomputed=False) == frozen
    assert run_time.matrix_work(model, 10, recomputed=True) == 1.5 * frozen


def test_checkpointing_keeps_a_fraction_of_the_activations(tmp_path: Path) -> None:
    kept = [
        parts(tiny_plan(tmp_path, f"model.gradient_checkpointing={how}"))["activations kept for the backward pass"]
        for how in ("false", "true")
    ]
    assert kept[1] < kept[0] / 4


def test_zero_3_shares_the_weights(tmp_path: Path) -> None:
    whole = tiny_plan(tmp_path)
    shared = tiny_plan(tmp_path, f"engine={tmp_path / 'zero3.json'}", processes=4)
    share = parts(shared)["frozen weights (this process's share)"]
    assert share == pytest.approx(parts(whole)["frozen weights"] / 4, rel=0.01)


def test_what_is_held_is_what_a_model_holds() -> None:
    model = tiny_llama()
    frozen = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    created = inject(model, "lora", {"r": 4}, targets=["q_proj"])
    own = sum(t.nbytes for adapter in created.values() for t in adapter.own_tensors().values())
    engine = resolve_deepspeed_config(
        {"zero_optimization": {"stage": 1}}, compute_batch_layout(4, None, 2), dtype="float32", clip=1.0
    ).for_adapters(trained=own // 4, largest=0)
    found = {part.name: part.bytes for part in StaticMemory(model, engine.settings, 2, 8, gpu=False).parts()}
    assert found["frozen weights"] == frozen
    assert found["adapters"] == found["gradients"] == own
    assert found["state of the optimizer"] == own  # two moments, half of each


def test_the_tracker_counts_what_is_held() -> None:
    with MemoryTracker() as tracker:
        a = torch.zeros(1000)
        b = a.view(10, 100).t()
        assert tracker.live == 4000
        c = b + 1
        assert (tracker.live, tracker.peak) == (8000, 8000)
        del c
        assert (tracker.live, tracker.peak) == (4000, 8000)


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trace_keeps_what_a_step_keeps(quantize: str, checkpointing: bool, tmp_path: Path) -> None:
    """A step with numbers, under the same tracker, takes the same bytes."""
    tiny_llama(tmp_path / "m")
    config = ModelConfig(
        path=str(tmp_path / "m"), dtype="float32", quantize=quantize, gradient_checkpointing=checkpointing
    )
    traced = open_shape(config)
    real = open_model(config)
    for model in (traced, real):
        inject(model, "lora", {"r": 4}, targets=["q_proj", "up_proj"], start=model is real)
        model.train()
    ids = torch.randint(2, 300, (4, 32))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    with MemoryTracker() as tracker:
        SummedLoss(real, masks_padding=False)(Batch.from_labels(batch)).backward()  # type: ignore[no-untyped-call]
    found = trace_activation_memory(traced, BatchShape(4, 32, 31, int((batch["labels"][:, 1:] != -100).sum())))
    assert found.peak == pytest.approx(tracker.peak, rel=0.05)


def test_a_trace_keeps_the_places_that_a_cpu_drops(tmp_path: Path) -> None:
    """Their indices take less room than torch's mask of every value, which the meta device would take."""
    tiny_llama(tmp_path / "m")
    config = ModelConfig(path=str(tmp_path / "m"), dtype="float32")
    ids = torch.randint(2, 300, (8, 64))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    peaks = []
    for dropout in (0.0, 0.02):
        traced, real = open_shape(config), open_model(config)
        for model in (traced, real):
            inject(model, "lora", {"r": 4, "dropout": dropout}, start=model is real)
            model.train()
        with MemoryTracker() as tracker:
            SummedLoss(real, masks_padding=False)(Batch.from_labels(batch)).backward()  # type: ignore[no-untyped-call]
        peaks.append((trace_activation_memory(traced, BatchShape(8, 64, 63, 8 * 63)).peak, tracker.peak))
    # What dropout adds is the same to the byte; the rest is not.
    assert peaks[1][0] - peaks[0][0] == peaks[1][1] - peaks[0][1] > 0


def test_plan_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(make_material(tmp_path))
    assert cli.main(["plan", run, "--memory", "1GB"]) == 0
    told = capsys.readouterr().out
    assert "largest" not in told
    assert "activations kept" in told
    assert "fits" in told
    assert cli.main(["plan", run, "--memory", "much"]) == 2
    assert "takes gigabytes" in capsys.readouterr().err
    assert (parse_size("24GB"), parse_size("80 GiB")) == (24 * GB, 80 * 2**30)


def test_8_bit_state_trains_and_pages_need_a_gpu(tmp_path: Path) -> None:
    from subspace.run import train_run
    from tests.helpers.material import logged

    run = make_material(tmp_path)
    config = config_module.read_config(run, [f"runs={tmp_path}", "train.optimizer=adamw8bit"])
    losses = logged(train_run(config))
    assert losses[-1] < losses[0] - 0.1
    parameter = nn.Parameter(torch.ones(4096))
    optimizer = make_optimizer("adamw8bit", [{"params": [parameter], "lr": 0.1, "weight_decay": 0.0}])
    parameter.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert optimizer.state[parameter]["state1"].dtype is torch.uint8
    paged = config_module.read_config(run, [f"runs={tmp_path}", "name=p", "train.optimizer=paged_adamw8bit"])
    with pytest.raises(UserError, match="Use train.optimizer=adamw8bit"):
        train_run(paged)

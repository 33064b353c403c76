"""Which device a process has, and that everything goes by it. A stand-in for torch.cuda shows the GPUs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from subspace.distributed import collectives, engine, launcher
from subspace.distributed.device import device, on_gpu
from subspace.distributed.peers import STATUS_FILE
from subspace.errors import UserError
from subspace.training.logging import peak_memory

Show = Callable[[int], None]


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Show:
    """Let torch see as many GPUs as the test says."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


@pytest.mark.parametrize(
    ("gpus", "rank", "found"), [(0, "1", "cpu"), (1, "0", "cuda:0"), (1, "3", "cuda:0"), (4, "3", "cuda:3")]
)
def test_a_process_has_the_gpu_of_its_local_rank_or_the_only_one_it_sees(
    show: Show, monkeypatch: pytest.MonkeyPatch, gpus: int, rank: str, found: str
) -> None:
    show(gpus)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert device() == torch.device(found)


def test_more_processes_than_gpus_are_refused(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    show(2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 2 of this machine needs a GPU of its own, but sees 2"):
        device()


def test_who_asks_for_the_cpu_gets_it_on_a_machine_with_gpus(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    show(2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    assert on_gpu()
    assert peak_memory() == 0
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert not on_gpu()
    assert peak_memory() > 10**7  # of the process
    assert launcher.visible_devices() == []


@pytest.mark.parametrize(("gpus", "seen_by_deepspeed"), [(1, "0"), (4, "3")])
def test_deepspeed_counts_to_the_same_device(
    show: Show, monkeypatch: pytest.MonkeyPatch, gpus: int, seen_by_deepspeed: str
) -> None:
    show(gpus)
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    launcher.set_rank_env()
    assert os.environ["LOCAL_RANK"] == seen_by_deepspeed


@pytest.fixture
def rank_1_of_2(show: Show, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The second of two processes with a GPU each, before its group exists; returns what is called, in order."""
    collectives.shutdown()  # of a group that an earlier test left
    called: list[Any] = []
    show(2)
    ours = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", STATUS_FILE: "status"}
    ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)

    def start(**given: object) -> None:
        dist.init_process_group("cuda:fake", store=FakeStore(), rank=1, world_size=2)
        called.append("group")

    def new_group(**given: Any) -> str:
        called.append(f"new group: {given['backend']}")
        return "object group"

    monkeypatch.setattr(engine, "meet_on_loopback", lambda: False)  # the other process is not there
    monkeypatch.setattr(deepspeed, "init_distributed", start)
    monkeypatch.setattr(torch.cuda, "set_device", lambda to: called.append(to))
    monkeypatch.setattr(dist, "get_backend", lambda *group: "nccl")
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *box, **given: called.append(given))
    monkeypatch.setattr(dist, "all_gather_object", lambda *box, **given: called.append(given))
    monkeypatch.setattr(dist, "barrier", lambda **given: called.append(given))
    yield called
    if dist.is_initialized():
        dist.destroy_process_group()
    collectives._object_groups.clear()


def test_the_device_is_set_before_the_first_collective(rank_1_of_2: list[Any]) -> None:
    with warnings.catch_warnings():
        engine.init_distributed()
    assert rank_1_of_2[:2] == [torch.device("cuda:1"), "group"]


def test_objects_do_not_travel_through_a_gpu(rank_1_of_2: list[Any]) -> None:
    with warnings.catch_warnings():
        engine.init_distributed()
    del rank_1_of_2[:2]
    collectives.broadcast_object("x")
    collectives.gather_objects("x")
    group = {"group": "object group"}
    assert [call for call in rank_1_of_2 if "group" in call or "new" in call] == [
        "new group: gloo",
        *([{"src": 0, **group}, group]),
    ]


def test_a_barrier_names_its_device(rank_1_of_2: list[Any]) -> None:
    """Otherwise torch warns that it guesses, once for each process."""
    with warnings.catch_warnings():
        engine.init_distributed()
        del rank_1_of_2[:]
        collectives.barrier()
        collectives.shutdown()
    assert rank_1_of_2 == [{"device_ids": [1]}] * 2
    assert not collectives._object_groups


def test_deepspeeds_barriers_do_not_warn(rank_1_of_2: list[Any]) -> None:
    with warnings.catch_warnings():
        engine.init_distributed()
        warnings.warn("barrier(): using the device under current context. You can specify ...", stacklevel=1)


def test_a_world_of_gloo_needs_no_second_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    engine.init_distributed()
    assert collectives.object_group() is None
    assert collectives.gather_objects({"x": 1}) == [{"x": 1}]


def test_the_group_for_objects_is_made_once_for_each_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a world of gloo that says it is NCCL's, the second group is a real one."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    engine.init_distributed()
    with monkeypatch.context() as patch:
        patch.setattr(dist, "get_backend", lambda *group: "nccl")
        first = collectives.object_group()
        assert first is not None
        assert first is not dist.group.WORLD
        assert collectives.broadcast_object([1, "x"]) == [1, "x"]
        assert collectives.gather_objects(2) == [2]
        assert collectives.object_group() is first
    collectives.shutdown()
    engine.init_distributed()
    with monkeypatch.context() as patch:
        patch.setattr(dist, "get_backend", lambda *group: "nccl")
        assert collectives.object_group() is not first
    collectives.shutdown()

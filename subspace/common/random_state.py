"""Random generators: a seed for one block of code on one device, and the states of all of a process's generators.

``torch.manual_seed`` reseeds the generators of every GPU besides the CPU's, and ``torch.random.fork_rng`` either leaves
those changed or saves each of them, with a warning where there are several. Library code that borrows a generator must
not change another one, which may be its caller's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Seed the default generator of one device inside the block, and give it its state back afterwards.

    The values drawn are those after ``torch.manual_seed(seed)``. Devices without values, such as ``meta``, have none
    to seed; the CPU's is seeded then.
    """
    generator = _default_generator(device)
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def random_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, JSON-serialisable, for :func:`set_random_states`.

    ``cuda`` is that of this process's own GPU, ``cuda_devices`` those of all GPUs that it sees.
    """
    version, state, gauss = random.getstate()
    own = np.random.get_state(legacy=False)
    assert isinstance(own, dict)
    gpus = [_hex(generator.get_state()) for generator in torch.cuda.default_generators]
    return {
        "python": [version, list(state), gauss],
        "numpy": {**own, "state": {"key": own["state"]["key"].tolist(), "pos": int(own["state"]["pos"])}},
        "torch": _hex(torch.get_rng_state()),
        "cuda": gpus[torch.cuda.current_device()] if gpus else "",
        "cuda_devices": gpus,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set the generators' states.

    The own GPU's state goes to the own GPU, whatever its number is now; the others' only where as many are visible.
    """
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    own = dict(states["numpy"])
    np.random.set_state({**own, "state": {**own["state"], "key": np.array(own["state"]["key"], dtype=np.uint32)}})
    torch.set_rng_state(_bytes(states["torch"]))
    gpus, saved = torch.cuda.default_generators, states.get("cuda_devices", [])  # absent in older checkpoints
    if len(saved) == len(gpus):
        for generator, state in zip(gpus, saved, strict=True):
            generator.set_state(_bytes(state))
    if gpus and states["cuda"]:
        gpus[torch.cuda.current_device()].set_state(_bytes(states["cuda"]))


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

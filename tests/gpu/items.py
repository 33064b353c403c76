"""What the check is made of: its items in four steps, most informative first. Nothing but the standard library."""

from __future__ import annotations

from dataclasses import dataclass

STEPS = {
    1: "Does it run, and right?",
    2: "Stages, resume, memory, scoring",
    3: "A model of LLaMA-7B's shape",
    4: "What each method, and a study, costs",
}


@dataclass(frozen=True)
class Item:
    """A process of its own, with a time limit.

    Attributes:
        name: also the function's that does it, with ``_`` for ``-``.
        step: one of :data:`STEPS`.
        file: the module here that has its function.
        seconds: its limit; those of a step come to ten minutes at most. A case that is under way then has failed, and
            those that follow are not begun.
        title: for the report.
        on_cpu: True for what others are held against; it runs on the CPU whatever the device.
        after: items whose files it reads.
    """

    name: str
    step: int
    file: str
    seconds: int
    title: str
    on_cpu: bool = False
    after: tuple[str, ...] = ()

    @property
    def function(self) -> str:
        """The function's name in its module."""
        return self.name.replace("-", "_")

    @property
    def module(self) -> str:
        """The module of its function."""
        return f"tests.gpu.{self.file}"


ITEMS = [
    Item("machine", 1, "first_look", 90, "versions, imports, device, how fast it multiplies, copies and launches"),
    Item("train", 1, "first_look", 90, "a tiny model at ZeRO 0, 1 and 3; what the libraries warn of"),
    Item("syncs", 1, "first_look", 60, "what waits for the device in a training step, by line"),
    Item("methods-on-cpu", 1, "every_method", 150, "every method on five bases, on the CPU", on_cpu=True),
    Item("methods", 1, "every_method", 150, "loss and gradients, against the CPU's", after=("methods-on-cpu",)),
    Item("engines", 2, "features", 65, "ZeRO 0 to 3 on five bases, against a plain loop of torch's; reload and merge"),
    Item("resume", 2, "features", 200, "killed before step 6 and resumed: are the adapters the same, bit by bit?"),
    Item("optimizers", 2, "features", 30, "8-bit and paged optimizers, stopped and resumed"),
    Item("memory", 2, "features", 150, "offloading, checkpointing, compiled layers, Liger: the same losses"),
    Item("scoring-on-cpu", 2, "scoring", 50, "four protocols on 200 made-up items, on the CPU", on_cpu=True),
    Item("scoring", 2, "scoring", 60, "the same on the device, against the CPU's", after=("scoring-on-cpu",)),
    Item("out-of-memory", 2, "scoring", 45, "batches that do not fit are halved, and nothing else changes"),
    Item("write-7b", 3, "seven_billion", 60, "write the model, with random weights, to the local disk"),
    Item("nf4", 3, "seven_billion", 120, "NF4: load, frozen passes, steps, profile", after=("write-7b",)),
    Item("nf4-peft", 3, "seven_billion", 60, "NF4: HF PEFT's steps", after=("write-7b",)),
    Item("bf16", 3, "seven_billion", 110, "bfloat16: load, frozen passes, steps, profile", after=("write-7b",)),
    Item("bf16-peft", 3, "seven_billion", 50, "bfloat16: HF PEFT's steps", after=("write-7b",)),
    Item("plan", 3, "seven_billion", 200, "`subspace plan --verify`, and the whole loop", after=("write-7b",)),
    Item("method-steps", 4, "costs", 180, "20 steps of each method, 2 layers of 7B's width"),
    Item("svd", 4, "costs", 60, "decompositions of a 4096 x 4096 and an 11008 x 4096 weight"),
    Item("study", 4, "studies", 150, "a tiny study whose runs share passes, and the same one run after the other"),
    Item("together", 4, "studies", 100, "steps of N runs in one pass, SmolLM2-135M's shape, and one after the other"),
    Item("scoring-speed", 4, "costs", 90, "tokens a second, likelihood and llm-adapters", after=("write-7b",)),
]  # fmt: skip


def find_item(name: str) -> Item:
    """Return the item of a name."""
    return next(item for item in ITEMS if item.name == name)

"""Step 4: a study on the device, its runs in shared passes and one after the other; and what sharing them gains."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from subspace.models.config import ModelConfig
from subspace.models.loading import open_model
from tests.bench import bench_together
from tests.bench.random_model import write_random
from tests.gpu.cases import Check, Figures, Missed
from tests.gpu.seven_billion import TINY
from tests.helpers.studies import STUDY, make_study

#: Two rates of each method and one seed: a search of few and short runs, most of whose time is their start.
SMALL = STUDY.replace("ladder: 3", "ladder: 2").replace("seeds: [0, 1]", "seeds: [0]")
#: Values of LLaMA-7B's configuration that make it SmolLM2-135M's.
SMOLLM2: dict[str, Any] = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


# A study.


def study(check: Check) -> None:
    """Run a tiny study with its runs in shared passes, and with each alone; the search and the losses are the same."""
    for name, together in (("alone", 1), ("together", 8)):
        check.case(name, _study, check, name, together)
    check.case("together, against alone", _compare, check)


def _study(check: Check, name: str, together: int) -> Figures:
    file = make_study(check.root / name, "[lora, ssb]", SMALL)
    began = time.perf_counter()
    command = [sys.executable, "-m", "subspace", "study", "run", str(file), "--together", str(together), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Missed(f"`subspace study run` ended with {done.returncode}: see the item's log")
    (check.root / f"{name}.json").write_text(done.stdout)
    read = json.loads(done.stdout)
    return {"finals": sum(len(one["losses"]) for one in read["methods"]), "seconds": time.perf_counter() - began}


def _compare(check: Check) -> Figures:
    alone, together = (
        {one["method"]: one for one in json.loads((check.root / f"{name}.json").read_text())["methods"]}
        for name in ("alone", "together")
    )
    rates = {name: (one["rate"], together[name]["rate"]) for name, one in alone.items()}
    pairs = [zip(one["losses"], together[name]["losses"], strict=True) for name, one in alone.items()]
    figures = {
        "methods": len(alone),
        "losses off": max(abs(a - b) for pair in pairs for a, b in pair),
        "other rates": sum(a != b for a, b in rates.values()),
    }
    if figures["other rates"]:
        raise Missed("the search chose other rates", **figures, rates=str(rates))
    if figures["losses off"] > 1e-2:
        raise Missed("the losses are not those of runs one after the other", **figures)
    return figures


# What shared passes gain.


def together(check: Check) -> None:
    """Alternate a step of N runs in one pass with a step of each alone."""
    folder = check.root / "model"
    if not folder.exists():
        write_random(folder, "llama-7b", **(TINY if check.tiny else SMOLLM2))
    opened: list[Any] = []
    for methods in (["lora"], ["lora", "dora", "ssb", "prefix"]):
        for rows, tokens in ((1, 32), (16, 64)):
            for count in (1, 8):
                name = f"{count} x {'lora' if len(methods) == 1 else 'lora, dora, ssb, prefix'}, {rows} x {tokens}"
                chosen = [methods[number % len(methods)] for number in range(count)]
                check.case(name, _together, check, opened, chosen, (rows, tokens))


def _together(check: Check, opened: list[Any], methods: list[str], shape: tuple[int, int]) -> Figures:
    if not opened:
        opened.append(open_model(ModelConfig(path=str(check.root / "model"), dtype="float32")))
    return bench_together.measure(opened[0], methods, 1 if check.tiny else 5, shape)

"""Train every method by one short recipe at a matched budget, score it, and write the README's table of methods.

    python -m tests.bench.methods_table                      all of them, then the table
    python -m tests.bench.methods_table --jobs 2             two at a time, a thread each
    python -m tests.bench.methods_table --only lora dora     some
    python -m tests.bench.methods_table --table              the table of what has been run already

The recipe is launch/recipes/methods.yaml. The budget is what LoRA of rank 8 trains on q, k, v, up and down. Every
method with a dial (rank, bottleneck, length, ...) is set to the size that comes nearest; the others are as large as
they are, and prompt tuning has 20 tokens, where the budget would be 2,880 of them. The learning rate is the recipe's
for methods that train factors, ten times that for those that train only scales, singular values, biases or virtual
tokens, as their authors do, and a fiftieth for full fine-tuning. Runs that are complete are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from subspace import config as config_module
from subspace.adapters.inject import inject, parameter_roles
from subspace.adapters.parameter_count import count_trained, match_budget
from subspace.adapters.registry import list_methods
from subspace.common.paths import REPOSITORY
from subspace.evaluation.results import Score, mean_score
from subspace.models.loading import open_shape

RECIPE = REPOSITORY / "launch" / "recipes" / "methods.yaml"
README = REPOSITORY / "README.md"
BEGIN, END = (
    "<!-- results of methods: written by `python -m tests.bench.methods_table` -->",
    "<!-- end of results of methods -->",
)
FACTORS = {"down", "up"}


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(list_methods()))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    if not options.table:
        with ThreadPoolExecutor(options.jobs) as pool:
            for name, failed in pool.map(run, ["base", *options.only]):
                print(f"{name}: {failed or 'done'}", flush=True)
    table = markdown(options.only)
    print(table)
    if options.readme:
        text = README.read_text()
        before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
        README.write_text(f"{text[:before]}\n{table}\n{text[after:]}")


def settings(name: str) -> dict[str, Any]:
    """Return the settings of a method for the recipe, its size matched to the budget."""
    recipe = config_module.read_config(RECIPE)
    shape = open_shape(recipe.model)
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    budget = count_trained(shape, "lora", {"r": 8}, targets=targets)
    cls = list_methods()[name]
    found: dict[str, Any] = {}
    takes_targets = cls.site == "linear"
    if cls.size_setting and name != "prompt":
        found[cls.size_setting] = match_budget(name, shape, budget, targets=targets if takes_targets else None)
        if "alpha" in cls.Config.__dataclass_fields__ and cls.Config.__dataclass_fields__["alpha"].default:
            found["alpha"] = 2.0 * found[cls.size_setting]
    if name == "lora-dash":
        found["launch"] = 4
    return found


def rate(name: str) -> float:
    """Return the learning rate; see the module's docstring."""
    base: float = config_module.read_config(RECIPE).train.learning_rate
    if name == "full":
        return base / 50
    shape = open_shape(config_module.read_config(RECIPE).model)
    inject(shape, name, settings(name), start=False)
    return base if FACTORS & set(parameter_roles(shape).values()) else 10 * base


def run(name: str) -> tuple[str, str]:
    """Train and score one method; return what went wrong, if anything did."""
    folder = REPOSITORY / "runs" / f"methods-{name}"
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    commands = [["evaluate", str(RECIPE) if name == "base" else str(folder)]]
    if name != "base" and not (folder / "adapter").is_dir():
        given = {f"method.{key}": value for key, value in settings(name).items()}
        given |= {"name": folder.name, "runs": str(folder.parent), "train.learning_rate": rate(name)}
        if list_methods()[name].site != "linear":
            given["targets"] = "null"
        overrides = [f"method={name}", *(f"{key}={value}" for key, value in given.items())]
        commands.insert(0, ["train", str(RECIPE), *overrides])
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "subspace", *command],
            env=environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return name, done.stderr.strip().splitlines()[-1]
    return name, ""


def markdown(names: Sequence[str]) -> str:
    """Write the table of the runs that are complete, best score first."""
    rows = sorted((row for name in names if (row := figures(name))), key=lambda row: -row["score"])
    lines = [
        "| method | size | trained | learning rate | CPU s a step | peak MB | validation loss | score |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        lines.append(
            f"| `{r['method']}` | {r['size']} | {r['trained']:,} | {r['rate']:g} | {r['seconds']:.2f} "
            f"| {r['memory']:,.0f} | {r['loss']:.3f} | {r['score']:.1f} ± {r['error']:.1f} |"
        )
    return "\n".join(lines)


def figures(name: str) -> dict[str, Any] | None:
    """Return one line of the table, or None where its run is not complete."""
    folder = REPOSITORY / "runs" / f"methods-{name}"
    if not (folder / "results.json").is_file() or not (folder / "environment.json").is_file():
        return None
    about = json.loads((folder / "environment.json").read_text())
    results = json.loads((folder / "results.json").read_text())
    score = mean_score([Score(**next(iter(row["metrics"].values()))) for row in results])
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in log if "processor_seconds" in line]
    cls, chosen = list_methods()[name], config_module.read_config(folder / "config.yaml").method[0].settings
    return {
        "method": name,
        "size": f"{cls.size_setting} = {getattr(chosen, cls.size_setting)}" if cls.size_setting else "",
        "trained": about["adapters"]["trained"],
        "rate": config_module.read_config(folder / "config.yaml").train.learning_rate,
        "seconds": (last["processor_seconds"] - first["processor_seconds"]) / (last["step"] - first["step"]),
        "memory": about["outcome"]["peak_memory"] / 1e6,
        "loss": about["outcome"]["best_validation"],
        "score": 100 * score.value,
        "error": 100 * score.error,
    }


if __name__ == "__main__":
    main()

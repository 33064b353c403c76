"""Bugs planted one at a time in a copy of the package: each must be caught by the tests that are run with every change.

    python -m tests.planted_bugs            prints the table that stands in tests/planted_bugs.md
    python -m tests.planted_bugs dora       those whose description contains the word

Each replaces one expression in one file, the way a slip would, and names the test files that should notice.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Bug:
    """A slip: ``right`` in ``file`` becomes ``wrong``."""

    what: str
    file: str
    right: str
    wrong: str
    only: str = ""  # of these tests, those whose names hold this word
    tests: str = "methods/test_properties methods/test_equations methods/test_identities oracles/test_peft"


BUGS = [
    Bug("LoRA's scale is alpha, not alpha / r", "adapters/low_rank.py", "else config.r)", "else 1)"),
    Bug(
        "LoRA's merged factor is transposed for square updates",
        "adapters/low_rank.py",
        "return W + B @ A",
        "return W + (B @ A).flip(0)",
    ),
    Bug(
        "DoRA's magnitude is not trained",
        "methods/dora.py",
        "nn.Parameter(torch.ones(self.out_features))",
        "nn.Parameter(torch.ones(self.out_features), requires_grad=False)",
    ),
    Bug(
        "DoRA takes column norms",
        "methods/dora.py",
        "W.square().sum(dim=1)",
        "W.square().sum(dim=0)[: len(self.m)].clone()",
    ),
    Bug(
        "DoRA keeps its norm for ever",
        "adapters/base.py",
        "            return compute()\n",
        "            kept = self._cache = {}\n",
    ),
    Bug(
        "AdaLoRA's schedule is off by one allocation",
        "adapters/base.py",
        "(self.step - first)",
        "(self.step - first - 10)",
    ),
    Bug(
        "AdaLoRA's importance forgets the value",
        "methods/adalora.py",
        "(access.value(self.trained()[key]) * gradient).abs()",
        "gradient.abs()",
    ),
    Bug(
        "LoRA-Dash launches one step late",
        "methods/lora_dash.py",
        "progress.step != adapters[0].config.launch",
        "progress.step != adapters[0].config.launch + 1",
    ),
    Bug("LoRA-Dash ranks by absolute change", "methods/lora_dash.py", "/ (sigma + EPSILON)", "/ 1.0"),
    Bug(
        "PiSSA's frozen part moves with the trained one",
        "adapters/low_rank.py",
        "self.A0.copy_(self.A.data)",
        "self.A0.set_(self.A.data)",
    ),
    Bug(
        "MiLoRA trains the largest directions",
        "methods/milora.py",
        "return bottom_singular_triplets(",
        "from subspace.adapters.linalg import top_singular_triplets; return top_singular_triplets(",
    ),
    Bug(
        "the spectral adapter forgets the product of both changes",
        "methods/spectral.py",
        'q + v, self.in_dtype("P"',
        'v, self.in_dtype("P"',
    ),
    Bug(
        "SVDiff lets singular values become negative",
        "methods/svdiff.py",
        "torch.relu(self.sigma + self.delta)",
        "self.sigma + self.delta",
    ),
    Bug(
        "SSB scales outputs by the input's scale's inverse",
        "methods/ssb.py",
        'self.in_dtype("l", x.dtype) *',
        '1 / self.in_dtype("l", x.dtype) *',
    ),
    Bug(
        "IA3 leaves the bias unscaled",
        "methods/ia3.py",
        "return self.frozen(x) * l\n",
        "return self.product(x) * l + (0 if b is None else b)\n",
    ),
    Bug(
        "LieRA's gradient of B misses W",
        "methods/liera.py",
        "(W * torch.exp(M) if exp else W)",
        "(torch.exp(M) if exp else 1)",
    ),
    Bug("FlexLoRA prunes by the signed value", "methods/flexlora.py", "a.alive > 0, e.abs()", "a.alive > 0, e"),
    Bug(
        "FlexLoRA keeps a new direction's moments",
        "methods/flexlora.py",
        "access.reset_optimizer_state(",
        "(lambda *a: None)(",
    ),
    Bug(
        "a penalty ignores accumulation",
        "adapters/penalties.py",
        "factor.to(torch.float32)",
        "torch.ones_like(factor)",
        "adalora",
        "distributed/test_zero",
    ),
    Bug(
        "MPC_d constrains lengths too",
        "adapters/linalg.py",
        "return matrix - torch.diag(matrix.diagonal())",
        "return matrix - torch.eye(len(matrix)).to(matrix)",
    ),
    Bug(
        "a decomposition is not broadcast to the other ranks",
        "adapters/inject.py",
        "                        broadcast_(tensor.data, owner)",
        "                        pass",
        "pissa",
        "distributed/test_zero",
    ),
    Bug(
        "the loss forgets that ranks are averaged",
        "training/steps.py",
        "layout.accumulate * layout.ranks / counts.labelled",
        "layout.accumulate / counts.labelled",
        "lora",
        "distributed/test_zero",
    ),
    Bug(
        "writes do not reach the optimizer's copy",
        "distributed/zero.py",
        "safe_set_full_fp32_param(parameter, value.to(torch.float32))",
        "pass",
        "flexlora",
        "distributed/test_zero",
    ),
]


def main() -> None:
    """Plant each, run its tests, and print what happened."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    print("| planted | file | caught by |\n| --- | --- | --- |")
    missed = 0
    for bug in BUGS:
        if word.casefold() in bug.what.casefold():
            caught = plant(bug)
            missed += not caught
            print(f"| {bug.what} | `{bug.file}` | {caught or '**nothing**'} |", flush=True)
    sys.exit(1 if missed else 0)


def plant(bug: Bug) -> str:
    """Return the first test that fails with the bug in place and passes without it, or nothing."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copy = Path(folder)
        for part in ("subspace", "tests", "data", "ds_configs", "launch", "pyproject.toml", "README.md"):
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("cache", "__pycache__"))
            else:
                shutil.copy(source, copy)
        file = copy / "subspace" / bug.file
        text = file.read_text()
        assert bug.right in text, f"{bug.what}: {bug.file} has no {bug.right!r}"
        file.write_text(text.replace(bug.right, bug.wrong, 1))
        failed = first_failure(copy, bug, [f"tests/{name}.py" for name in bug.tests.split()])
        file.write_text(text)
        if failed and first_failure(copy, bug, [f"tests/{failed}"]):
            raise SystemExit(f"{failed} fails without the bug too: '{bug.what}' proves nothing")
        return f"`{failed}`" if failed else ""


def first_failure(copy: Path, bug: Bug, tests: list[str]) -> str:
    """Return the first of these tests that fails in the copy, or nothing."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    command += ["-m", "not long and not gpu and not cluster", *(["-k", bug.only] if bug.only else [])]
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # all passed, or one failed
        raise SystemExit(f"'{bug.what}': pytest itself failed\n{done.stdout}{done.stderr}")
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", done.stdout, re.MULTILINE)
    return failed[1] if failed else ""


if __name__ == "__main__":
    main()

"""Run a module on the fake CUDA device: ``python -m tests.fake_cuda.run MODULE [ARGUMENT ...]``.

So ``python -m tests.fake_cuda.run tests.gpu syncs --device cuda --tiny --out DIR`` tries an item of the half hour of a
GPU, and ``python -m tests.fake_cuda.run subspace evaluate RUN`` a command. Processes that it starts have no device.
"""

from __future__ import annotations

import runpy
import sys

from tests.fake_cuda import device

device.load()

from tests.fake_cuda import process_group

if __name__ == "__main__":
    process_group.install()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

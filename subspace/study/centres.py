"""The learning rate around which a method is searched, from one backward pass at its start.

Adam moves every trained number by about the learning rate, whatever its gradient. Where a method has few numbers, or
small gradients as those of a product with W, the same rate moves the model less. So the base's rate, which is meant for
the reference, is scaled by the ratio of the Euclidean norms of the two gradients before the first step.

Adam's first step changes the loss by ``lr * ||g||_1``, which speaks for the sum of absolute gradients. Measured, it
overshoots: of full fine-tuning, whose many gradients are small, and of methods with a factor that starts at zero, most
of whose numbers have no gradient yet. On 19 methods of a toy model (``tests/bench/RESULTS.md``) the Euclidean norm came
nearer: within one step of the best rate, of half a decade, for 15 of 19, and within two for all. Beyond a factor of
:data:`MOST` the start says nothing: AdaLoRA's has hardly a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from subspace.adapters.inject import remove_adapters, trained_parameters
from subspace.common.progress import Progress, no_progress
from subspace.config import RunConfig
from subspace.distributed.device import device, on_gpu
from subspace.models.lm_head import summed_loss
from subspace.models.loading import open_model
from subspace.resolve import resolve_run
from subspace.resumption import open_run_data
from subspace.run import inject_method

#: Rows of the first batch whose gradient is taken: enough for its size, which is all that counts here.
ROWS = 16
#: Largest factor between the base's rate and the middle of a ladder.
MOST = 10**1.5


def gradient_norms(configs: Sequence[RunConfig], progress: Progress = no_progress) -> list[float]:
    """Return for each run the Euclidean norm of the gradient of its mean loss before the first step.

    The runs share their model and data: it is the same batch for all. The model is opened once.
    """
    run = resolve_run(configs[0], 1, device())
    data, plan = open_run_data(run)
    rows = plan[0][:ROWS]
    size = max(1, min(run.layout.micro_batch, ROWS))
    batches = [data.batch(rows[begin : begin + size]) for begin in range(0, len(rows), size)]
    model: Any = open_model(run.config.model)
    model.to(device())
    model.config.use_cache = False
    norms = []
    with progress("gradients at the start", len(configs), "methods") as at:
        for config in configs:
            for entry in config.method:
                inject_method(model, entry, config.train.seed, no_progress, start=True)
            norms.append(_gradient_norm(model, batches))
            remove_adapters(model)
            model.requires_grad_(False)
            at(len(norms))
    del model
    if on_gpu():
        torch.cuda.empty_cache()  # this process waits for trainings from here on, which need the memory
    return norms


def _gradient_norm(model: Any, batches: Sequence[Any]) -> float:
    labelled = sum(batch.num_labelled for batch in batches)
    parameters = list(trained_parameters(model).values())
    model.eval()  # dropout would only add noise
    for parameter in parameters:
        parameter.grad = None
    for batch in batches:
        (summed_loss(model, batch.to(device())) / labelled).backward()
    total = torch.zeros((), dtype=torch.float64)
    for parameter in parameters:
        if parameter.grad is not None:
            total += parameter.grad.detach().double().square().sum().cpu()
            parameter.grad = None
    return math.sqrt(float(total))


def exponents(norms: Sequence[float], reference: float, step: float) -> Iterator[int]:
    """Yield by how many steps of the ladder each method's rate lies above the base's.

    Whole steps, so that methods share rates. A method without a gradient at its start keeps the base's rate.
    """
    for own in norms:
        usable = own > 0 and reference > 0 and math.isfinite(own) and math.isfinite(reference)
        ratio = min(max(reference / own, 1 / MOST), MOST) if usable else 1.0
        yield round(math.log(ratio) / math.log(step))

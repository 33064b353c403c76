"""A run in plain torch, without DeepSpeed and the loop: the last resort for what a step should have done."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace.adapters.inject import adapters
from subspace.config import RunConfig
from subspace.models.lm_head import summed_loss
from subspace.resolve import resolve_run
from subspace.resumption import open_run_data
from subspace.run import build_model
from subspace.training.optimizers import lr_factor, make_optimizer, parameter_groups


def train_plainly(config: RunConfig) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses of a run's steps and its trained tensors: each step's rows are one batch on one process."""
    run = resolve_run(config, 1, torch.device("cpu"))
    data, plan = open_run_data(run)
    model = build_model(run, initialize=True)[0]
    optimizer = make_optimizer("adamw", parameter_groups(model, config.train))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses = []
    for step in range(len(plan)):
        for group in optimizer.param_groups:
            group["lr"] = config.train.learning_rate * lr_factor(config.train, step, len(plan))
        batch = data.batch(plan[step])
        loss = summed_loss(model, batch) / batch.num_labelled
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        for adapter in adapters(model).values():
            adapter.clear_cache()
        losses.append(float(loss.detach()))
    named = {f"{site}.{name}": p.detach() for site, a in adapters(model).items() for name, p in a.trained().items()}
    return losses, named

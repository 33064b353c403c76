"""Trains cells of the matrix, and what they are held against, in the processes that a launcher started."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

from subspace import config as config_module
from subspace.adapters.inject import adapters, trained_parameters
from subspace.adapters.serialization import save_adapter
from subspace.common.progress import no_progress
from subspace.config import RunConfig
from subspace.data.dataset import open_data
from subspace.data.sampler import StepPlan, shard_batch
from subspace.distributed.collectives import shutdown
from subspace.distributed.engine import init_distributed
from subspace.models.lm_head import summed_loss
from subspace.models.loading import open_model, open_tokenizer
from subspace.run import inject_method, train_run
from subspace.training.optimizers import lr_factor, parameter_groups


def main() -> None:
    """Train each run that the file lists: ``[kind, file, overrides]``, with the engine or, a ``plain`` one, without."""
    swap_small_tensors()
    init_distributed(minutes=10)
    for kind, file, overrides in json.loads(Path(sys.argv[1]).read_text()):
        (train_plainly if kind == "plain" else train_run)(config_module.read_config(file, overrides))
        gc.freeze()  # what is imported by now, so that the engines' full collections are short
    shutdown()


def swap_small_tensors() -> None:
    """Let DeepSpeed offload to NVMe what is smaller than a megabyte: weights of a tiny model, but not its adapters."""
    from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_param_swapper

    partitioned_param_swapper.MIN_AIO_BYTES = optimizer_utils.MIN_AIO_BYTES = 8192


def train_plainly(config: RunConfig) -> None:
    """Train as :func:`train_run` does, on one process, by torch alone; leave ``losses.json`` and ``adapter/``."""
    data = open_data(config.data, open_tokenizer(config.model), config.train.seed)
    plan = StepPlan(
        data.train.lengths,
        batch=config.train.batch_size,
        epochs=1,
        steps=config.train.steps,
        seed=config.train.seed,
    )
    model = open_model(config.model).train()
    inject_method(model, config.method[0], config.train.seed, no_progress, start=True)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.train))
    schedule = LambdaLR(optimizer, lambda step: lr_factor(config.train, step, len(plan)))
    losses = []
    assert config.train.micro_batch_size is not None
    accumulate = config.train.batch_size // config.train.micro_batch_size
    for step in range(len(plan)):
        batches = [data.batch(part).to(model.device) for part in shard_batch(plan[step], 0, 1, accumulate)]
        labelled = sum(batch.num_labelled for batch in batches)
        total = 0.0
        for batch in batches:
            loss = summed_loss(model, batch) / labelled
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(list(trained_parameters(model).values()), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for adapter in adapters(model).values():
            adapter.clear_cache()
        losses.append(total)
    save_adapter(model, config.folder / "adapter")
    (config.folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()

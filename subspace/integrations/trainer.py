"""A callback of HF Trainer that runs the schedules of methods that have one.

::

    trainer = Trainer(model, args, train_dataset=rows, callbacks=[FollowSchedules()])

Its checkpoints hold the adapters (:mod:`subspace.adapters.exchange.pretrained`), and ``resume_from_checkpoint`` goes on
from them.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subspace.integrations.schedules import follow_schedules


class FollowSchedules(TrainerCallback):
    """Let the schedules of the model's adapters act with the steps of the trainer's optimizer."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        accumulate = args.gradient_accumulation_steps
        follow_schedules(parts["model"], parts["optimizer"], steps=state.max_steps, accumulate=accumulate)

"""Model type ``subspace`` for lm-evaluation-harness, which runs any of its tasks on a run's adapters.

The harness knows a model type once the module that registers it is imported. On the command line this module does so
and continues as the harness's own command, with all of its options::

    python -m subspace.integrations.lm_eval --model subspace --model_args run=runs/quickstart --tasks lambada_openai

From Python, ``import subspace.integrations.lm_eval`` and ``lm_eval.simple_evaluate(model="subspace", model_args=...)``.

``run`` is what ``subspace evaluate`` takes: a run's folder, a configuration (then its base model), or a model's name.
Other arguments are settings of ``model``, such as ``dtype=float32``. No other module of ``subspace`` imports the
harness.
"""

from __future__ import annotations

from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from subspace.adapters.serialization import load_adapter
from subspace.config import read_subject
from subspace.models.loading import open_model, open_tokenizer


@register_model("subspace")
class SubspaceLM(HFLM):  # type: ignore[misc]
    """Model of a run, with its adapters, as a transformers model of the harness."""

    def __init__(
        self, run: str, batch_size: int | str = 1, max_batch_size: int | None = 64, device: Any = None, **settings: Any
    ) -> None:
        subject = read_subject(run, [f"model.{name}={value}" for name, value in settings.items()])
        model = open_model(subject.model)
        if subject.adapter:
            load_adapter(model, subject.adapter)
        tokenizer = open_tokenizer(subject.model)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_batch_size=max_batch_size or 64
        )


if __name__ == "__main__":
    cli_evaluate()

"""Settings of a scoring: which items, by which protocols, in which batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Required

import pydantic
from typing_extensions import TypedDict

from subspace.common.settings import Settings, setting, split_names
from subspace.data.config import TaskSelection
from subspace.models.config import ModelConfig

LIKELIHOOD = "likelihood"
LLM_ADAPTERS = "llm-adapters"
ANSWER_WORD = "answer-word"
LLM_ADAPTERS_PUBLISHED = "llm-adapters-published"
PROTOCOLS = (LIKELIHOOD, LLM_ADAPTERS, ANSWER_WORD, LLM_ADAPTERS_PUBLISHED)

PUBLISHED_DEFECTS = {
    "unequal_prompts": "the prompt has other white space than in training, and ends in 16 spaces that are a token",
    "no_attention_mask": "padding is read like text, so answers depend on what else is in the batch",
    "pad_is_zero": "padding is token 0, whatever that is to the model: '!' to LLaMA-3",
    "dropout_active": "the model is scored in training mode, adapters' dropout included",
    "last_response": "the text after the last marker counts, as in DoRA's copy, not that after the first",
}
"""The defects of the published evaluator, each of which can be switched on."""

DEFAULT_DEFECTS = ("unequal_prompts",)
"""The defects that the published evaluator has at its batch size, one."""
NO_DEFECTS = "none"


@pydantic.with_config(strict=True)
class PublishedScores(TypedDict, total=False, extra_items=float):  # type: ignore[call-arg]
    """Scores of the literature in percent, by the tasks' names, and where they stand."""

    source: Required[str]
    average: float


@dataclass(frozen=True)
class EvaluationSubject:
    """What is scored: a model as it is, or with the adapters of a run."""

    model: ModelConfig
    evaluate: EvaluateConfig
    folder: Path  # where the results go
    adapter: Path | None = None
    method: str = ""
    mixture: str = ""  # that the adapters were trained on


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """What to score, and how."""

    protocol: str | list[str] = setting(
        ["likelihood"], "how an answer is got out of the model, one protocol or several", choices=PROTOCOLS
    )
    tasks: str | list[str] = setting(
        ["all"], "which tasks: all, a suite's name, their names, or YAML files of your own"
    )
    limit: int | None = setting(None, "items of each task, always the same ones; none is all", min=1)
    split: str = setting("test", "which split; test is the one that the literature reports")
    examples: int = setting(0, "likelihood: answered items of the train split before each question (few-shot)", min=0)
    by_bytes: bool = setting(False, "likelihood: also acc_bytes, where a choice's score is divided by its bytes")
    data: str | None = setting(None, "folder of the published test files (gsm8k/test.json), for tasks read from there")
    prompt: str = setting("alpaca-indented", "protocols that ask: the text round the instruction, as data.prompt")
    defects: str | list[str] = setting(
        list(DEFAULT_DEFECTS),
        "llm-adapters-published: which of its defects are on; or none",
        choices=(*PUBLISHED_DEFECTS, NO_DEFECTS),
    )
    published_batch: int = setting(1, "llm-adapters-published: its batch size, felt with no_attention_mask", min=1)
    batch_tokens: int | None = setting(
        None, "tokens of a batch, padding included; none is what suits the device and the protocol", min=1
    )
    on_contamination: str = setting(
        "error",
        "a suite with more than 1 % of its items in a run's training text: refuse it, or score it with a warning",
        choices=("error", "warn"),
        formerly="seen",
        former_values={"refuse": "error", "score": "warn"},
    )
    batch_adapters: bool = setting(
        False,
        "several subjects of one base: score in the same batches those whose adapters act on linear layers alone",
        formerly="mixed",
    )
    engine: str | None = setting(
        None, "a base too large for one device: DeepSpeed's JSON of ZeRO-3, as ds_configs/zero3.json, to spread it by"
    )
    overwrite: bool = setting(False, "score anew what is scored already", formerly="again")

    @property
    def selection(self) -> TaskSelection:
        """Which items are scored."""
        return TaskSelection(self.tasks, self.split, self.limit, self.data)

    @property
    def protocols(self) -> list[str]:
        """The protocols, each once."""
        return list(dict.fromkeys(split_names(self.protocol)))

    @property
    def defect_names(self) -> list[str]:
        """The defects that are on."""
        return [name for name in split_names(self.defects) if name != NO_DEFECTS]

"""Settings of evaluation: items, protocols and batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Required

import pydantic
from typing_extensions import TypedDict

from subspace.common.settings import MOST_COUNT, MOST_ROWS, Settings, declared_settings, setting, split_names
from subspace.data.config import DataConfig, TaskSelection
from subspace.models.config import ModelConfig

LIKELIHOOD = "likelihood"
LLM_ADAPTERS = "llm-adapters"
ANSWER_WORD = "answer-word"
LLM_ADAPTERS_PUBLISHED = "llm-adapters-published"
PROTOCOLS = (LIKELIHOOD, LLM_ADAPTERS, ANSWER_WORD, LLM_ADAPTERS_PUBLISHED)

PUBLISHED_DEFECTS = {
    "unequal_prompts": "the prompt's white space differs from training, and it ends in 16 spaces, which form a token",
    "no_attention_mask": "padding is attended to like text, so answers depend on the rest of the batch",
    "pad_is_zero": "padding is token 0, which may be any text: '!' for LLaMA-3",
    "dropout_active": "the model is scored in training mode, with the adapters' dropout active",
    "last_response": "the text after the last marker is used, as in DoRA's copy, instead of that after the first",
}
"""Defects of the published evaluator, with descriptions; each can be switched on."""

EFFECTIVE = {
    "examples": (LIKELIHOOD,),
    "by_bytes": (LIKELIHOOD,),
    "prompt": (LLM_ADAPTERS, ANSWER_WORD),
    "chat_template": (LIKELIHOOD, LLM_ADAPTERS, ANSWER_WORD),
    "defects": (LLM_ADAPTERS_PUBLISHED,),
    "published_batch": (LLM_ADAPTERS_PUBLISHED,),
}
"""Settings that only some protocols read, and which do."""

DEFAULT_DEFECTS = ("unequal_prompts",)
"""Defects that the published evaluator shows at its batch size of one."""
NO_DEFECTS = "none"


@pydantic.with_config(strict=True)
class PublishedScores(TypedDict, total=False, extra_items=float):  # type: ignore[call-arg]
    """Published scores in per cent by task name, and their source."""

    source: Required[str]
    average: float


@dataclass(frozen=True)
class EvaluationSubject:
    """A model to evaluate: the base model, or a run's with its adapters."""

    model: ModelConfig
    evaluate: EvaluateConfig
    folder: Path  # that the results are written to
    adapter: Path | None = None
    method: str = ""
    mixture: str = ""  # data.mixture of the adapters' training run, and its data.columns
    columns: Mapping[str, str | None] = field(default_factory=dict)
    #: Of that run: data.chat_template, a file, and data.date, with which evaluate.chat_template asks.
    chat_template: str | None = None
    date: str = DataConfig.date
    scale: float = 1.0  # the share of the adapters' update that is in force

    def at_scale(self, scale: float) -> EvaluationSubject:
        """Return a run with a share of its update; its results lie in a folder within the run's. 0 is the base."""
        if scale == 1 or not self.adapter:
            return self
        part = replace(self, folder=self.folder / f"scale-{scale:g}", scale=scale)
        return part if scale else replace(part, adapter=None, method="", mixture="", scale=1.0)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """Settings of evaluation."""

    protocol: str | list[str] = setting(["likelihood"], "scoring protocol, one or several", choices=PROTOCOLS)
    tasks: str | list[str] = setting(["all"], "tasks: all, a suite, names of tasks, or custom YAML files")
    limit: int | None = setting(None, "items per task, always the same ones; null for all", min=1, max=MOST_COUNT)
    split: str = setting("test", "the split to score; published results are on test")
    examples: int = setting(
        0, "likelihood: few-shot examples from the train split before each question", min=0, max=1000
    )
    by_bytes: bool = setting(False, "likelihood: also acc_bytes, with scores normalised by a choice's bytes")
    data: str | None = setting(None, "folder of published test files (gsm8k/test.json), for tasks read from there")
    prompt: str = setting("alpaca-indented", "generative protocols: prompt template, as data.prompt")
    chat_template: bool = setting(
        False,
        "ask in the tokenizer's chat template, in place of prompt; a run in that which it was trained with. Not for "
        "llm-adapters-published",
    )
    defects: str | list[str] = setting(
        list(DEFAULT_DEFECTS),
        "llm-adapters-published: the published evaluator's defects to reproduce; or none",
        choices=(*PUBLISHED_DEFECTS, NO_DEFECTS),
    )
    published_batch: int = setting(
        1, "llm-adapters-published: its batch size, which matters with no_attention_mask", min=1, max=MOST_ROWS
    )
    batch_tokens: int | None = setting(
        None, "tokens per batch, padding included; null chooses by device and protocol", min=1, max=1 << 30
    )
    on_contamination: str = setting(
        "error",
        "when over 1 % of a suite's items are in the run's training text: raise an error, or warn",
        choices=("error", "warn"),
        formerly="seen",
        former_values={"refuse": "error", "score": "warn"},
    )
    batch_adapters: bool = setting(
        False,
        "score several runs of one base model in shared batches, where their adapters are on linear layers only",
        formerly="mixed",
    )
    engine: str | None = setting(
        None, "for a model too large for one device: a ZeRO-3 configuration, as ds_configs/zero3.json"
    )
    retention: str = setting(
        "none",
        "also measure how much of the base is kept: bits per byte on Wikipedia passages that no training prompt shows, "
        "beside the base's own",
        choices=("none", "wikipedia"),
    )
    retention_limit: int | None = setting(
        None, "passages, always the same ones; null for all 2,938", min=1, max=MOST_COUNT
    )
    hang_minutes: float = setting(
        30.0, "minutes without progress after which scoring is ended; 0 disables the watchdog", min=0
    )
    overwrite: bool = setting(False, "re-score tasks that already have results", formerly="again")

    @property
    def selection(self) -> TaskSelection:
        """The items to score."""
        return TaskSelection(self.tasks, self.split, self.limit, self.data)

    @property
    def protocols(self) -> list[str]:
        """The protocols, without duplicates."""
        return list(dict.fromkeys(split_names(self.protocol)))

    @property
    def without_effect(self) -> list[str]:
        """The settings that were changed but have no effect on any of the protocols."""
        known = declared_settings(type(self))
        asked = {name for name in EFFECTIVE if getattr(self, name) != known[name].default}
        idle = [name for name in asked if not set(EFFECTIVE[name]) & set(self.protocols)]
        if "prompt" in asked and self.chat_template:
            idle.append("prompt")
        if self.retention_limit is not None and self.retention == "none":
            idle.append("retention_limit")
        if "published_batch" in asked and "no_attention_mask" not in self.defect_names:
            idle.append("published_batch")
        return sorted(set(idle))

    @property
    def defect_names(self) -> list[str]:
        """The defects that are enabled."""
        return [name for name in split_names(self.defects) if name != NO_DEFECTS]

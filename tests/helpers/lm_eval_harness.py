"""lm-evaluation-harness on our items: its own tasks and its own model class, fed with the records we have.

Its task files name data sets on the hub; here ``datasets.load_dataset`` answers with records made back from our items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import lm_eval
import numpy as np
from lm_eval.api import metrics
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subspace.data import tasks as tasks_module
from subspace.data.items import Item

FOLDERS = ("super_glue/boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc", "openbookqa")


def _arc(item: Item) -> dict[str, Any]:
    letters = "ABCDE"[: len(item["choices"])]
    return {
        "id": item["id"],
        "question": item["question"],
        "choices": {"text": item["choices"], "label": list(letters)},
        "answerKey": letters[item["label"]],
    }


def _hellaswag(item: Item) -> dict[str, Any]:
    first = item["context"].removesuffix(item["question"])
    return {
        "activity_label": item["topic"],
        "ctx_a": first.removesuffix(" "),
        "ctx_b": item["question"],
        "ctx": item["context"],
        "endings": item["choices"],
        "label": str(item["label"]),
    }


def _obqa(item: Item) -> dict[str, Any]:
    record = _arc(item)
    return {**record, "question_stem": record.pop("question")}


# Each task's record as its original data set has it, from the neutral item.
RECORDS: Mapping[str, Callable[[Item], dict[str, Any]]] = {
    "boolq": lambda item: {
        "passage": f"{item['topic']} -- {item['context']}",
        "question": item["question"],
        "label": item["label"],
    },
    "piqa": lambda item: {
        "goal": item["question"],
        "sol1": item["choices"][0],
        "sol2": item["choices"][1],
        "label": item["label"],
    },
    "siqa": lambda item: {
        "context": item["context"],
        "question": item["question"],
        **{f"answer{letter}": text for letter, text in zip("ABC", item["choices"], strict=True)},
        "label": str(item["label"] + 1),
    },
    "hellaswag": _hellaswag,
    "winogrande": lambda item: {
        "sentence": item["question"],
        "option1": item["choices"][0],
        "option2": item["choices"][1],
        "answer": str(item["label"] + 1),
    },
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _obqa,
}


def harness_task(name: str, items: Sequence[Item], examples: int = 0) -> ConfigurableTask:
    """Return the harness's task of our task's name, with these items as its data, for training too."""
    rows = datasets.Dataset.from_list([RECORDS[name](item) for item in items])
    splits = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))
    wanted = tasks_module.find_task(name).lm_eval_name
    folders = [str(Path(lm_eval.__file__).parent / "tasks" / folder) for folder in FOLDERS]
    manager = TaskManager(include_path=folders, include_defaults=False)
    with mock.patch("lm_eval.api.task.datasets.load_dataset", return_value=splits):
        task: ConfigurableTask = manager.load([wanted])["tasks"][wanted]
    if examples:
        task.set_config("num_fewshot", examples)
        task.set_fewshot_seed(1234)
    task.build_all_requests()
    return task


def harness_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | str = 8, most: int = 64
) -> HFLM:
    """Return the model as the harness runs it; ``auto`` searches for a batch size from ``most`` down."""
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_batch_size=most)


def text_log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[float]:
    """Return the harness's log-likelihood of each whole text, in nats."""
    asked = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    # Otherwise a tokenizer that begins texts by itself begins them twice, and the second beginning is predicted too.
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, add_bos_token=False)
    found: list[float] = lm.loglikelihood_rolling(asked, disable_tqdm=True)
    return found


def bits_per_byte(log_likelihoods: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the harness's bits per byte of texts of these sizes."""
    found: float = metrics.bits_per_byte([*zip(log_likelihoods, sizes, strict=True)])
    return found


def harness_scores(lm: HFLM, *tasks: ConfigurableTask) -> list[list[float]]:
    """Return the harness's log-probability of each choice of each item, the tasks one after the other."""
    asked = [(number, instance) for number, task in enumerate(tasks) for instance in task.instances]
    answers = lm.loglikelihood([instance for _, instance in asked], disable_tqdm=True)
    scores: dict[tuple[int, int], list[float]] = {}
    for (number, instance), (score, _) in zip(asked, answers, strict=True):
        scores.setdefault((number, instance.doc_id), []).append(score)
    return [scores[key] for key in sorted(scores)]


def harness_predictions(task: ConfigurableTask, scores: Sequence[Sequence[float]]) -> list[dict[str, int]]:
    """Return what the harness takes for the answer by each of the task's metrics."""
    predictions = []
    for doc, values in zip(task.eval_docs, scores, strict=True):
        lengths = np.array([float(len(choice)) for choice in task.doc_to_choice(doc)])
        both = {"acc": int(np.argmax(values)), "acc_norm": int(np.argmax(np.array(values) / lengths))}
        predictions.append({metric: both[metric] for metric in task._metric_fn_list})
    return predictions

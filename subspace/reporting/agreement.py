"""Part of agreement."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from subspace.evaluation.protocols.llm_adapters import LLMAdapters
from subspace.evaluation.results import Score, accuracy, read_items, read_results

if TYPE_CHECKING:
    pass

from subspace.evaluation.protocols.answer_word import AnswerWord


def agreement(folder: Path) -> dict[str, Score]:
    """Return for each task on how many items this protocol and ``llm-adapters`` gave the same answer for one model.

    A task that a folder does not hold by both, of the same items, prompts and weights, is left out.
    """
    by_key = {(result.protocol, result.task): result for result in read_results(folder)}
    found = {}
    for (protocol, task), scored in by_key.items():
        written = by_key.get((LLMAdapters.name, task))
        if protocol != AnswerWord.name or not (written and written.items and scored.items):
            continue
        if written.subject != scored.subject:
            continue
        answers = [
            {(record["id"], record["prompt"]): record["prediction"] for record in read_items(file)}
            for file in (scored.items, written.items)
        ]
        if answers[0].keys() == answers[1].keys():
            found[task] = accuracy([answers[1][item] == word for item, word in answers[0].items()])
    return found

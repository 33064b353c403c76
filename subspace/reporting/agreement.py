"""Agreement between the answers of the protocols ``answer-word`` and ``llm-adapters``."""

from __future__ import annotations

from pathlib import Path

from subspace.evaluation.config import ANSWER_WORD, LLM_ADAPTERS
from subspace.evaluation.results import Score, accuracy, read_results, read_verified_items


def agreement(folder: Path) -> dict[str, Score]:
    """Return for each task the share of items to which both protocols give the same answer, for one model.

    Tasks that were not scored by both on the same items, prompts and weights are left out.
    """
    by_key = {(result.protocol, result.task): result for result in read_results(folder)}
    shares = {}
    for (protocol, task), scored in by_key.items():
        written = by_key.get((LLM_ADAPTERS, task))
        if protocol != ANSWER_WORD or not (written and written.items and scored.items):
            continue
        if written.subject != scored.subject:
            continue
        answers = [
            {(record["id"], record.get("prompt")): record.get("prediction") for record in read_verified_items(result)}
            for result in (scored, written)
        ]
        if answers[0].keys() == answers[1].keys():
            shares[task] = accuracy([answers[1][item] == word for item, word in answers[0].items()])
    return shares

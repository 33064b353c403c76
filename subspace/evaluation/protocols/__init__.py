"""Scoring protocols, one module each: encoding of a task's items, scoring of batches, records of the items."""

from subspace.evaluation.protocols.answer_word import AnswerWord
from subspace.evaluation.protocols.base import ProtocolScorer
from subspace.evaluation.protocols.likelihood import Likelihood
from subspace.evaluation.protocols.llm_adapters import LLMAdapters
from subspace.evaluation.protocols.llm_adapters_published import LLMAdaptersPublished

SCORERS: dict[str, type[ProtocolScorer]] = {
    scorer.name: scorer for scorer in (Likelihood, LLMAdapters, AnswerWord, LLMAdaptersPublished)
}

"""The protocols, a module each: how a task's items are laid out, how a batch is scored, what is kept of an item."""

from subspace.evaluation.protocols.answer_word import AnswerWord
from subspace.evaluation.protocols.base import ProtocolScorer
from subspace.evaluation.protocols.likelihood import Likelihood
from subspace.evaluation.protocols.llm_adapters import LLMAdapters
from subspace.evaluation.protocols.llm_adapters_published import LLMAdaptersPublished

SCORERS: dict[str, type[ProtocolScorer]] = {
    scorer.name: scorer for scorer in (Likelihood, LLMAdapters, AnswerWord, LLMAdaptersPublished)
}

"""Tokenisation of a context and its continuation, shared by training and all scoring protocols.

The rule is lm-evaluation-harness's. White space at the end of the context is moved to the continuation, the whole text
is encoded at once, and the context's share is the number of tokens of the context encoded alone. A tokenizer that
attaches a space to the following word then never sees a context that ends in a separate token for the space.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from subspace.common.hashing import hash_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], int]:
    """Return the ids of context and continuation together, and the number of the context's."""
    return encode_pairs(tokenizer, [(context, continuation)])[0]


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Iterable[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Return ``encode_pair`` of every (context, continuation). Repeated texts are encoded once."""
    cut = [_cut(context, continuation) for context, continuation in pairs]
    ids = _encode(tokenizer, (text for context, continuation in cut for text in (context, context + continuation)))

    start, lone = bos_prefix(tokenizer), _beginning(tokenizer)
    encoded = []
    for context, continuation in cut:
        # The first predicted token needs one before it, even without a context.
        begin = start if start or ids[context] else lone
        encoded.append((begin + ids[context + continuation], len(begin) + len(ids[context])))
    return encoded


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Return for every (prompt, answer) to train on its ids, and the number of the prompt's.

    The prompt's ids equal those of ``encode_prompt``, and the answer's those of ``encode_answers``.

    Args:
        tokenizer: the model's.
        rows: (prompt, answer) texts.
    """
    prompts = [_cut(prompt, answer)[0] for prompt, answer in rows]
    ids = _encode(tokenizer, prompts)
    start = bos_prefix(tokenizer)
    encoded = []
    for prompt, answer in zip(prompts, encode_answers(tokenizer, rows), strict=True):
        context = start + ids[prompt] or _beginning(tokenizer)
        encoded.append((context + answer, len(context)))
    return encoded


def encode_answers(tokenizer: PreTrainedTokenizerBase, rows: Iterable[tuple[str, str]]) -> list[list[int]]:
    r"""Return the ids of every row's answer, as encoded after the last line of its prompt.

    They mostly equal those of ``encode_pair``. But some tokenizers have tokens that cross the boundary (LLaMA-3's
    ``:\n``), and a prompt trained with such a token differs from the prompt given in generation. Only the last line of
    a prompt is encoded, so this is fast where many rows share that line and a few answers.
    """
    cut = (_cut(prompt, answer) for prompt, answer in rows)
    lines = [(prompt[prompt.rfind("\n") + 1 :], answer) for prompt, answer in cut]
    distinct = dict.fromkeys(lines)
    joined = _encode(tokenizer, (text for line, answer in distinct for text in (line, line + answer)))
    apart = _encode(
        tokenizer, (answer for line, answer in distinct if not _begins(joined[line + answer], joined[line]))
    )

    def ids(line: str, answer: str) -> list[int]:
        both, prompt_ids = joined[line + answer], joined[line]
        return both[len(prompt_ids) :] if _begins(both, prompt_ids) else apart[answer]

    encoded = {pair: ids(*pair) for pair in distinct}
    return [encoded[pair] for pair in lines]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the ids that a model generates from: exactly those that precede the answer in training."""
    return encode_pair(tokenizer, prompt.rstrip(), "")[0]


def common_prefix_length(sequences: Sequence[Sequence[object]]) -> int:
    """Return the length of the longest common prefix."""
    alike = (len(set(column)) == 1 for column in zip(*sequences, strict=False))
    return next((i for i, same in enumerate(alike) if not same), min(map(len, sequences)))


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts before every text: the beginning-of-sequence token, or none."""
    marked = tokenizer("a", add_special_tokens=True)["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(marked)) if marked[i : i + len(bare)] == bare)
    return list(marked[:start])


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a checksum of everything that determines how the tokenizer encodes a text."""
    state: dict[str, object] = {
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat": getattr(tokenizer, "chat_template", None),
        "prefix": bos_prefix(tokenizer),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state["vocabulary"] = sorted(tokenizer.get_vocab().items())
    else:
        # Padding and truncation are left over from the last call, and are not part of the tokenizer.
        state["backend"] = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    return hash_json(state)


def _cut(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, list[int]]:
    unique = list(dict.fromkeys(texts))
    if not unique:
        return {}
    encoded = tokenizer(unique, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return dict(zip(unique, encoded["input_ids"], strict=True))


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [] if token is None else [int(token)]


def _begins(ids: list[int], beginning: list[int]) -> bool:
    return ids[: len(beginning)] == beginning

"""Text to token ids: the cut between context and continuation, for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from subspace.data.tokenization import (
    bos_prefix,
    encode_pair,
    encode_pairs,
    encode_prompt,
    encode_rows,
    tokenizer_fingerprint,
)
from tests.helpers.tiny_models import TEXT, bpe_tokenizer, save_sentencepiece, tiny_llama

PROMPT = "### Instruction:\n  is ice cold?\n  \n  ### Response:\n                "
ANSWER = "the correct answer is true"


def sentencepiece_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tiny_llama(folder)
    save_sentencepiece(folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def crossing_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Build a tokenizer in LLaMA-3's manner, with a token for a colon and the line break after it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    words = pre_tokenizers.Split(Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*|\p{L}+| ?\p{L}+|\s+(?!\S)|\s+"), "isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, *["### Response:\n" * 20] * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")  # type: ignore[no-untyped-call]


KINDS: dict[str, Callable[[Path], PreTrainedTokenizerBase]] = {
    "byte-level": lambda folder: bpe_tokenizer(),
    "sentencepiece": sentencepiece_tokenizer,
    "crossing": crossing_tokenizer,
}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedTokenizerBase:
    return KINDS[request.param](tmp_path)


def test_a_pair_is_the_whole_text_cut_at_the_context_s_own_count(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, count = encode_pair(tokenizer, "Question: is ice cold?\nAnswer:", " true")
    assert ids == tokenizer.encode("Question: is ice cold?\nAnswer: true")
    assert count == len(tokenizer.encode("Question: is ice cold?\nAnswer:"))


def test_trailing_space_goes_to_the_continuation(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode_pair(tokenizer, "is ice cold?  \n", "true") == encode_pair(tokenizer, "is ice cold?", "  \ntrue")


def test_many_pairs_are_each_pair(tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = [(PROMPT, ANSWER), ("a fox", " jumps"), (PROMPT, " no"), ("a fox", " jumps"), ("", "a dog")]
    assert encode_pairs(tokenizer, pairs) == [encode_pair(tokenizer, *pair) for pair in pairs]


def test_an_empty_context_is_the_beginning_of_a_text(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, count = encode_pair(tokenizer, "", "a fox")
    assert (ids[0], count) == (tokenizer.bos_token_id, 1)
    assert ids[1:] == tokenizer.encode("a fox", add_special_tokens=False)


def test_a_row_s_prompt_is_what_is_generated_from(tokenizer: PreTrainedTokenizerBase) -> None:
    ((ids, count),) = encode_rows(tokenizer, [(PROMPT, ANSWER)])
    assert ids[:count] == encode_prompt(tokenizer, PROMPT)
    assert str(tokenizer.decode(ids[count:])).strip() == ANSWER


def test_a_row_is_mostly_the_pair(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [("the quick brown fox", " jumps over"), ("first\nthe lazy dog", " sleeps")]
    assert encode_rows(tokenizer, rows) == encode_pairs(tokenizer, rows)


def test_a_token_across_the_cut_would_spoil_the_prompt(tmp_path: Path) -> None:
    tokenizer = crossing_tokenizer(tmp_path)
    ids, count = encode_pair(tokenizer, PROMPT, ANSWER)
    assert ids[:count] != encode_prompt(tokenizer, PROMPT)  # else the tests above hold for no reason


def test_prefix_ignores_an_end_that_the_tokenizer_adds() -> None:
    from tokenizers import processors

    tokenizer = bpe_tokenizer()
    both = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|end_of_text|>",
        special_tokens=[("<|begin_of_text|>", 0), ("<|end_of_text|>", 1)],
    )
    tokenizer.backend_tokenizer.post_processor = both
    assert tokenizer.encode("a fox")[-1] == 1
    assert bos_prefix(tokenizer) == [0]
    assert encode_prompt(tokenizer, "a fox")[-1] != 1


def test_the_fingerprint_does_not_see_padding() -> None:
    tokenizer = bpe_tokenizer(pad_token="<|reserved_special_token_0|>")
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a fox jumps"], padding=True, truncation=True, max_length=5)
    assert tokenizer_fingerprint(tokenizer) == before


@pytest.mark.parametrize(
    "special", [{"eos_token": "<|reserved_special_token_0|>"}, {"chat_template": "{{ messages }}"}]
)
def test_the_fingerprint_sees_what_decides_the_ids(special: dict[str, str]) -> None:
    assert tokenizer_fingerprint(bpe_tokenizer(**special)) != tokenizer_fingerprint(bpe_tokenizer())


def test_the_fingerprint_sees_the_vocabulary(tmp_path: Path) -> None:
    assert len({tokenizer_fingerprint(make(tmp_path)) for make in KINDS.values()}) == len(KINDS)

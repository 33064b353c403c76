"""Control tokens: which of a tokenizer's they are, and encoding in which only the template can write them.

An added token is found in a text by its letters, whoever wrote them. So a user's text could end a turn and begin
another one, and an answer that speaks of ``<|end_of_text|>`` would teach to stop there. Here the letters of a control
token in a user's text are encoded as the letters that they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

# Tokens that are added for words of HTML are part of what people write, in Gemma's vocabulary.
_HTML = re.compile(
    r"</?(a|b|big|blockquote|body|br|caption|center|code|dd|div|dl|dt|em|font|h[1-6]|head|hr|html|i|img|li|ol|p|pre|"
    r"small|span|strong|sub|sup|table|tbody|td|tfoot|th|thead|title|tr|u|ul)>"
)
_BRACKETED = re.compile(r"[<\[{(＜【].*[>\]})＞】]", re.DOTALL)
_PRIVATE = range(0xF0000, 0x10FFFE)  # private characters, which stand for control tokens in the meantime


class SpeltControlToken(Exception):
    """A text spells a control token in a way that cannot be encoded as letters; the argument is the token."""


class Encoded(NamedTuple):
    """Token ids; and for each span of characters, the first token of it and the first behind it."""

    ids: list[int]
    spans: list[Span]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the tokenizer's control tokens with their ids: all special ones, and added ones in brackets.

    Other added tokens are words or white space.
    """
    found = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    for number, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        if token.special or (_BRACKETED.fullmatch(text) and not _HTML.fullmatch(text)):
            found[text] = number
    return {str(text): int(number) for text, number in found.items() if str(text).strip()}


class ControlTokens:
    """The control tokens of a tokenizer, and encoding with them.

    Args:
        tokenizer: fast or slow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.tokens = tokenizer, control_tokens(tokenizer)
        self.ids = set(self.tokens.values())
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def spelt(self, texts: Iterable[str]) -> str | None:
        """Return the first control token that one of these texts spells, or None."""
        return next((found.group() for text in texts if (found := self.pattern.search(text))), None)

    def encode(self, text: str, users: Sequence[Span], marked: Sequence[Span]) -> Encoded:
        """Return a text's ids, and where spans of its characters are in them.

        Args:
            text: with control tokens of a template's.
            users: the spans of characters that are a user's, in their order; in them control tokens are letters.
            marked: spans of characters, in their order. A token belongs to one if any of its characters does.

        Raises:
            SpeltControlToken: the tokenizer has no other way of encoding these letters.
        """
        own = [
            (start + found.start(), start + found.end(), self.tokens[found.group()])
            for start, end in _others(users, len(text))
            for found in self.pattern.finditer(text[start:end])
        ]
        forged = any(_overlaps(found.span(), users) for found in self.pattern.finditer(text))
        if self.tokenizer.is_fast:
            ids, offsets = self._aliased.encode(text, own) if forged else self._encode_fast(text)
            encoded = Encoded(ids, [self._tokens_of(span, ids, offsets) for span in marked])
        else:
            encoded = self._encode_slow(text, own, marked, forged=forged)
        if forged:
            self._check(encoded.ids, [number for _, _, number in own])
        return encoded

    def _check(self, ids: Sequence[int], own: Sequence[int]) -> None:
        """Raise SpeltControlToken if there are other control tokens than the template's."""
        left = list(own)
        for number in ids:
            if number in self.ids and (not left or left.pop(0) != number):
                raise SpeltControlToken(str(self.tokenizer.convert_ids_to_tokens(number)))

    def _encode_fast(self, text: str) -> tuple[list[int], list[Span]]:
        encoded: Any = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoded["input_ids"]), list(encoded["offset_mapping"])

    @cached_property
    def _aliased(self) -> _Aliased:
        return _Aliased(self.tokenizer, self.tokens)

    def _tokens_of(self, span: Span, ids: Sequence[int], offsets: Sequence[Span]) -> Span:
        """Return the tokens that have a character of a span."""
        inside = [i for i, (number, at) in enumerate(zip(ids, offsets, strict=True)) if self._is_in(number, at, span)]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    def _is_in(self, number: int, at: Span, span: Span) -> bool:
        start, end = at
        if number in self.ids:  # it may have taken the white space around it along
            return span[0] <= start < span[1]
        if start == end:  # white space that the tokenizer does not count to the token: it ends here
            return span[0] < end <= span[1]
        return start < span[1] and end > span[0]

    def _encode_slow(
        self, text: str, own: Sequence[tuple[int, int, int]], marked: Sequence[Span], *, forged: bool
    ) -> Encoded:
        """Return the ids of pieces that are encoded one by one: between control tokens, and at the bounds of spans."""
        bounds = sorted({0, len(text), *(at for span in marked for at in span), *(at for o in own for at in o[:2])})
        controls = {start: number for start, _, number in own}
        ids: list[int] = []
        begins = {len(text): 0}
        for start, end in pairwise(bounds):
            begins[start] = len(ids)
            if start in controls:
                ids.append(controls[start])
            else:
                ids += self._encode_piece(text[start:end], first=start == 0, forged=forged)
        begins[len(text)] = len(ids)
        return Encoded(ids, [(begins[start], begins[end]) for start, end in marked])

    def _encode_piece(self, piece: str, *, first: bool, forged: bool) -> list[int]:
        def encode(text: str) -> list[int]:
            return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=forged))

        if not first:  # behind something, so that no space is put before it as at the beginning of a text
            line, both = encode("\n"), encode("\n" + piece)
            if both[: len(line)] == line:
                return both[len(line) :]
        return encode(piece)


class _Aliased:
    """A copy of a fast tokenizer in which control tokens have names that no text has.

    Everything else is as it was: letters that spell a control token are letters to it, in the midst of the text that
    they stand in.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: dict[str, int]) -> None:
        from tokenizers import Tokenizer

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        self._copies: dict[int, tuple[Any, dict[int, int]]] = {}
        self._state, self._tokenizer_class = state, Tokenizer
        self._order = {number: i for i, number in enumerate(dict.fromkeys(tokens.values()))}

    def _copy(self, base: int) -> tuple[Any, dict[int, int]]:
        """Return the tokenizer whose control tokens are the characters from ``base`` on, and its ids of them."""
        if base not in self._copies:
            added = []
            for token in self._state["added_tokens"]:
                alias = chr(base + self._order[token["id"]]) if token["id"] in self._order else token["content"]
                added.append({**token, "content": alias, "normalized": False} if alias != token["content"] else token)
            state = {**self._state, "added_tokens": added, "padding": None, "truncation": None}
            copy: Any = self._tokenizer_class.from_str(json.dumps(state))
            named = {copy.token_to_id(chr(base + i)): number for number, i in self._order.items()}
            self._copies[base] = copy, named
        return self._copies[base]

    def encode(self, text: str, own: Sequence[tuple[int, int, int]]) -> tuple[list[int], list[Span]]:
        """Return ids and offsets of a text in which only these spans are control tokens: start, end and id."""
        taken, size = {ord(c) for c in text if ord(c) in _PRIVATE}, len(self._order)
        bases = (base for base in _PRIVATE[::size] if base + size in _PRIVATE)
        base = next((base for base in bases if taken.isdisjoint(range(base, base + size))), None)
        if base is None:
            raise SpeltControlToken("among all the private characters")
        tokenizer, named = self._copy(base)
        pieces, places, at = [], [], 0  # places[i] is where character i of the new text is in the old one
        for start, end, number in own:
            pieces += [text[at:start], chr(base + self._order[number])]
            places += [*range(at, start), start]
            at = end
        pieces.append(text[at:])
        places += [*range(at, len(text)), len(text)]
        ends = {start: end for start, end, _ in own}
        encoded = tokenizer.encode("".join(pieces), add_special_tokens=False)
        offsets = []
        for start, end in encoded.offsets:
            last = places[end - 1] if end > start else None
            offsets.append((places[start], places[start] if last is None else ends.get(last, last + 1)))
        return [named.get(number, number) for number in encoded.ids], offsets


def _others(spans: Sequence[Span], length: int) -> list[Span]:
    """Return the spans between these."""
    bounds = [0, *(at for span in spans for at in span), length]
    return [(start, end) for start, end in zip(bounds[::2], bounds[1::2], strict=True) if start < end]


def _overlaps(found: Span, spans: Sequence[Span]) -> bool:
    return any(start < found[1] and end > found[0] for start, end in spans)

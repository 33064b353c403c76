"""One row as it is trained on, for people to look at."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from subspace.data.collate import TokenRow, trained_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENING, CLOSING = "\u27e6", "\u27e7"
SHOWN = 3000  # characters of a piece of a row; of a longer one, both ends are shown


def show_row(row: TokenRow, tokenizer: PreTrainedTokenizerBase, loss_on: str, place: str = "") -> str:
    """Return a row's text, decoded from its token ids, with what carries loss in brackets, and counts above it.

    Args:
        row: the token ids.
        tokenizer: the model's.
        loss_on: ``data.loss_on``.
        place: the row's, to be told.
    """
    spans = trained_spans(row, loss_on)
    trained = sum(end - start for start, end in spans)
    pieces = "".join(
        f"{OPENING}{text}{CLOSING}" if marked else text for marked, text in _pieces(row.input_ids, spans, tokenizer)
    )
    where = f" ({place})" if place else ""
    head = f"one of the rows{where}, {trained:,} of its {len(row.input_ids):,} tokens trained, in {OPENING} {CLOSING}:"
    return f"{head}\n{pieces}"


def _pieces(
    ids: list[int], spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[bool, str]]:
    marks = [any(start <= i < end for start, end in spans) for i in range(len(ids))]
    at = 0
    for marked, group in groupby(marks):
        end = at + len(list(group))
        text = str(tokenizer.decode(ids[at:end], clean_up_tokenization_spaces=False))
        if len(text) > SHOWN:
            text = f"{text[: SHOWN // 2]} [...] {text[-SHOWN // 2 :]}"
        yield marked, "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
        at = end

"""Training data: from a mixture to rows, from rows to token ids, from token ids to batches of tensors.

The rows of a step depend only on the data and the seed, not on the number of processes. They are known before any row
is encoded, so only the rows that a run's steps use and the held-out rows are encoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from subspace.common.progress import Progress, no_progress
from subspace.data import tokenization
from subspace.data.chat.example import show_row
from subspace.data.chat.limits import NO_LIMITS, ModelLimits
from subspace.data.chat.row_cache import RowCache
from subspace.data.collate import IGNORE_INDEX, Batch, TokenRow, collate
from subspace.data.config import TASK_LENGTH, DataConfig
from subspace.data.records import task_rows
from subspace.data.sampler import hold_out, take_rows
from subspace.data.tasks import Mixture, MixturePart, find_mixture, prompt_template
from subspace.data.token_cache import Integers, Part, PartCache, TokenTable, open_table, split_by_part
from subspace.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Fed = Callable[[int], Integers]
"""Function from the number of training rows to the numbers of those that a run's steps may use; see ``draw_steps``."""


@dataclass(frozen=True)
class Tokenized:
    """Rows of token ids, each at most ``max_length`` long: row i is row ``order[i]`` of the table.

    ``prefix`` is the number of tokens that the tokenizer puts before every text. Reading a row that was not encoded
    raises LookupError, and its length is 0.
    """

    table: TokenTable
    order: Integers
    max_length: int
    prefix: int

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> TokenRow:
        ids, start, spans = self.table.read(int(self.order[i]))
        # A long row loses the beginning of its prompt, but keeps the tokenizer's prefix and its answer.
        excess = max(0, len(ids) - self.max_length)
        moved = tuple((first - excess, end - excess) for first, end in spans)
        return TokenRow(ids[: self.prefix] + ids[self.prefix + excess :], start - excess, moved)

    @property
    def lengths(self) -> Integers:
        """The number of tokens of each row."""
        return np.minimum(self.uncut_lengths, self.max_length)

    @property
    def uncut_lengths(self) -> Integers:
        """The number of tokens of each row before truncation."""
        return self.table.lengths(self.order)

    @property
    def answers(self) -> Integers:
        """The number of answer tokens of each row, end token included; known of rows that are not encoded, too."""
        return self.table.answer_lengths[self.order]

    @property
    def keys(self) -> Integers:
        """A key of each row's text, equal for equal texts; known of rows that are not encoded, too."""
        return self.table.keys[self.order]


@dataclass(frozen=True)
class Data:
    """Training and held-out rows of a run; ``report`` has their counts, and ``notices`` messages to the user.

    ``parts`` maps the name of each task's split, or file, in the table of token ids to its first row there, and
    ``place`` a row of that table to its place, as ``rows.jsonl, line 3``.
    ``example`` is one row as it is trained on, for people to look at.
    """

    train: Tokenized
    validation: Tokenized
    pad_id: int
    loss_on: str
    report: dict[str, Any]
    notices: tuple[str, ...]
    parts: dict[str, int] = field(default_factory=dict)
    packing: bool = False
    place: Callable[[int], str] = str
    example: str = ""

    @property
    def digest(self) -> str:
        """A checksum of the texts of all rows, those included that are not trained on."""
        return hashlib.sha256(self.train.table.keys.tobytes()).hexdigest()[:16]

    def batch(self, numbers: Sequence[int], *, one_sequence: bool = False) -> Batch:
        """Return these rows of the training data; with ``one_sequence`` as flash attention takes packed ones."""
        rows = [self.train[number] for number in numbers]
        tensors = collate(rows, self.pad_id, self.loss_on, room=self.train.max_length if self.packing else None)
        return Batch.from_labels(tensors, one_sequence=one_sequence)

    def surplus_batch(self, number: int, *, one_sequence: bool = False) -> Batch:
        """Return a batch without labels, for a process that has no rows where others have: all must compute as often.

        It has the tokens of a row, which count for nothing.
        """
        tensors = collate([self.train[number]], self.pad_id, room=self.train.max_length if self.packing else None)
        tensors["labels"].fill_(IGNORE_INDEX)
        return replace(Batch.from_labels(tensors, one_sequence=one_sequence), num_tokens=0)

    def where(self, number: int) -> str:
        """Return the place of a row of the training data, as ``rows.jsonl, line 3``."""
        return self.place(int(self.train.order[number]))

    def counts(self, numbers: Integers) -> dict[str, int]:
        """Return how many rows these are, each counted once, and their tokens, for the run's report."""
        rows = np.unique(numbers)
        tokens, answers = int(self.train.lengths[rows].sum()), int(self.train.answers[rows].sum())
        return {"fed": len(rows), "tokens": tokens, "answer_tokens": answers}

    def validation_batches(
        self, micro_batch: int, rank: int, ranks: int, *, one_sequence: bool = False
    ) -> Iterator[Batch]:
        """Yield this rank's batches of held-out rows. All ranks get the same number; a surplus one has no labels.

        Raises:
            UserError: there are no held-out rows.
        """
        if not len(self.validation):
            raise UserError("a loss on held-out rows was asked for, but no rows are held out (data.validation)")
        longest_first = np.argsort(-self.validation.lengths, kind="stable")
        for start in range(0, len(longest_first), micro_batch * ranks):
            group = longest_first[start : start + micro_batch * ranks]
            rows = [self.validation[i] for i in group[rank::ranks]]
            tensors = collate(rows or [self.validation[int(group[0])]], self.pad_id, self.loss_on)
            if not rows:
                tensors["labels"].fill_(IGNORE_INDEX)
            yield Batch.from_labels(tensors, one_sequence=one_sequence)


def open_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    progress: Progress = no_progress,
    fed: Fed | None = None,
    limits: ModelLimits = NO_LIMITS,
) -> Data:
    """Return the mixture's data as token ids, encoding rows that are not in the cache. Safe to call concurrently.

    Args:
        config: the training data settings.
        tokenizer: the model's.
        seed: decides which rows are held out, and which are drawn if a mixture or ``limit`` takes a part of them.
        progress: progress display of the encoding.
        fed: the rows that will be read, as ``partial(draw_steps, batch=16, steps=12)``; None for all.
        limits: what the model can take.

    Raises:
        UserError: a mixture, task or file does not exist, or has no row that fits into ``max_length``; or a row has
            tokens that the model does not.
    """
    mixture, parts, absent = _concatenate_parts(config, tokenizer, progress)
    max_length = _max_length(config, parts, limits)
    rows = _select_rows(mixture, parts, config, tokenizer, seed, max_length)
    table = open_table(list(parts.values()), rows.encoded(fed))
    limits.check_ids(
        table.ids,
        lambda at: _place(parts, int(np.flatnonzero(table.position == at)[0])),
        lambda number: str(tokenizer.convert_ids_to_tokens(number)),
    )
    prefix = len(tokenization.bos_prefix(tokenizer))
    train, validation, read = (
        Tokenized(table, numbers, max_length, prefix) for numbers in (rows.train, rows.validation, rows.fed(fed))
    )
    report = _report(mixture, absent, rows, train, read)
    report["sources"] = {name: part.source.record for name, part in parts.items() if isinstance(part, RowCache)}
    assert tokenizer.pad_token_id is not None
    return Data(
        train=train,
        validation=validation,
        pad_id=int(tokenizer.pad_token_id),
        loss_on=config.loss_on,
        report=report,
        notices=(
            *(told for part in parts.values() for told in part.told),
            *rows.notices,
            *_notices(report, max_length, read),
        ),
        parts=dict(zip(parts, _begins(parts), strict=True)),
        packing=config.packing,
        place=partial(_place, parts),
        example=show_row(read[0], tokenizer, config.loss_on, _place(parts, int(read.order[0]))),
    )


def is_encoded(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    fed: Fed | None = None,
    limits: ModelLimits = NO_LIMITS,
) -> bool:
    """Return True if the cache has all token ids that ``open_data`` would need."""
    mixture, parts, _ = _concatenate_parts(config, tokenizer, no_progress)
    if not all(part.is_indexed for part in parts.values()):
        return False
    max_length = _max_length(config, parts, limits)
    rows = _select_rows(mixture, parts, config, tokenizer, seed, max_length).encoded(fed)
    return not any(len(part.missing(numbers)) for part, _, numbers in split_by_part(list(parts.values()), rows))


Parts = dict[str, Part]
"""Prepared parts of a mixture by name: each once, with rows numbered consecutively through all."""


def _concatenate_parts(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> tuple[Mixture, Parts, list[str]]:
    """Return the mixture, its prepared parts, and the names of the parts that are not prepared."""
    mixture = find_mixture(config.mixture)
    prepared = {part.name: rows for part in mixture.parts if (rows := _part(part, config, tokenizer, progress))}
    absent = [part.name for part in mixture.parts if part.name not in prepared]
    if not prepared:
        raise UserError(f"nothing of {mixture.name} is in the source it was prepared from: {', '.join(absent)}")
    return mixture, prepared, absent


def _part(part: MixturePart, config: DataConfig, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> Part | None:
    """Return a part of a mixture, or None if the source of its task does not have its rows."""
    template = prompt_template(config.prompt_name)
    if part.task:
        rows = task_rows(part.task, part.split, template)
        return PartCache(rows, tokenizer, progress) if rows else None
    return RowCache(part.source(config.columns), tokenizer, template, config, progress)


def _max_length(config: DataConfig, parts: Parts, limits: ModelLimits) -> int:
    """Return the most tokens of a row: what is set, or what the data takes, and no more than the model does."""
    own = [part for part in parts.values() if isinstance(part, RowCache)]
    longest = max((int(part.needed(0).max()) for part in own if len(part)), default=0)
    wanted = config.max_length or max(longest, TASK_LENGTH if len(own) < len(parts) else 2)
    return min(wanted, limits.positions or wanted)


def _place(parts: Parts, row: int) -> str:
    """Return the place of a row."""
    begins = _begins(parts)
    number = int(np.searchsorted(begins, row, side="right")) - 1
    return list(parts.values())[number].place(row - begins[number])


def _begins(parts: Parts) -> list[int]:
    """Return the number of each part's first row."""
    return [0, *np.cumsum([len(part) for part in parts.values()])[:-1].tolist()]


@dataclass(frozen=True)
class _Selection:
    """Rows to train on and to hold out, numbered through all parts, and counts of rows.

    ``by_part`` counts the rows of each part of the mixture, ``total`` all of them, and ``dropped`` those that do not
    fit: of people's own rows ``too_long``, of which ``notices`` tell, and tasks' rows whose answers do not.
    """

    by_part: dict[str, int]
    total: int
    dropped: int
    train: Integers
    validation: Integers
    too_long: int = 0
    notices: tuple[str, ...] = ()

    def fed(self, fed: Fed | None) -> Integers:
        """Return the training rows that the steps use, each as often as the mixture has it."""
        return self.train if fed is None else self.train[np.unique(fed(len(self.train)))]

    def encoded(self, fed: Fed | None) -> Integers:
        """Return the rows that must be encoded, each once."""
        return np.union1d(self.fed(fed), self.validation)


def _select_rows(
    mixture: Mixture, parts: Parts, config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, max_length: int
) -> _Selection:
    """Return the rows to train on and to hold out, by the keys of their texts and their lengths."""
    draw = np.random.default_rng(seed)
    begins = dict(zip(parts, _begins(parts), strict=True))
    taken = {
        number: begins[part.name] + take_rows(len(parts[part.name]), part, draw)
        for number, part in enumerate(mixture.parts)
        if part.name in parts
    }
    order = np.concatenate(list(taken.values()))
    keys = np.concatenate([part.index[0] for part in parts.values()])
    if mixture.deduplicate:
        order = order[np.sort(np.unique(keys[order], return_index=True)[1])]

    # An answer needs a token before it, and is never cut; a row of one's own is not cut at all.
    prefix = len(tokenization.bos_prefix(tokenizer))
    needed = np.concatenate([part.needed(prefix) for part in parts.values()])
    kept = order[needed[order] <= max_length]
    too_long = _too_long(parts, order, needed, max_length)
    notices = (_tell_too_long(parts, too_long, needed, config, max_length),) if len(too_long) else ()
    if not len(kept):
        least = f"the shortest takes {needed[order].min()}" if len(order) else "it has none"
        raise UserError(f"no row of {mixture.name} fits into data.max_length={max_length} tokens: {least}")
    train, validation = hold_out(kept, keys, config.validation, mixture.name, draw)
    if config.limit is not None and config.limit < len(train):
        train = train[np.sort(draw.permutation(len(train))[: config.limit])]
    by_part: dict[str, int] = {}
    for number, part_rows in taken.items():
        name = _name(mixture.parts[number])
        by_part[name] = by_part.get(name, 0) + len(part_rows)
    return _Selection(by_part, len(order), len(order) - len(kept), train, validation, len(too_long), notices)


def _too_long(parts: Parts, order: Integers, needed: Integers, max_length: int) -> Integers:
    """Return the rows of people's own that do not fit."""
    own = np.concatenate([np.full(len(part), isinstance(part, RowCache)) for part in parts.values()])
    found: Integers = order[own[order] & (needed[order] > max_length)]
    return found


def _tell_too_long(parts: Parts, found: Integers, needed: Integers, config: DataConfig, max_length: int) -> str:
    """Return a notice about rows that do not fit, or raise UserError if they are to be refused."""
    limit = "data.max_length" if max_length == config.max_length else "the model's positions"
    first = ", ".join(f"{_place(parts, int(row))} ({needed[row]:,})" for row in found[:3])
    what = f"{len(found):,} rows are longer than {limit}, {max_length:,} tokens: {first}"
    what += ", ..." if len(found) > 3 else ""
    if config.too_long == "refuse":
        raise UserError(f"{what}. Shorten them, allow more, or leave them out: data.too_long=drop")
    return f"{what}. They are left out, because no row of yours is cut"


def _report(mixture: Mixture, absent: list[str], rows: _Selection, train: Tokenized, fed: Tokenized) -> dict[str, Any]:
    """Return counts of the rows, and of the tokens of the rows that the steps use (``fed``)."""
    return {
        "mixture": mixture.name,
        "rows": rows.total,
        "expected": mixture.rows,
        "absent": absent,
        "parts": rows.by_part,
        "train": len(train),
        "repeats": len(train) - len(np.unique(train.keys)),
        "validation": len(rows.validation),
        "fed": len(fed),
        "tokens": int(fed.lengths.sum()),
        "answer_tokens": int(fed.answers.sum()),
        "cut": int((fed.uncut_lengths > fed.max_length).sum()),
        "dropped": rows.dropped,
        "too_long": rows.too_long,
    }


def _notices(report: dict[str, Any], max_length: int, fed: Tokenized) -> Iterator[str]:
    """Yield messages about absent, truncated and dropped rows."""
    if report["absent"]:
        expected = f" of {report['expected']:,}" if report["expected"] else ""
        absent = ", ".join(report["absent"])
        yield f"{report['mixture']} has {report['rows']:,}{expected} rows: {absent} is not in the data's source"
    if report["cut"]:
        yield (
            f"{report['cut']:,} of {report['fed']:,} rows are longer than data.max_length={max_length} tokens and lose "
            f"the beginning of their prompt; {int(fed.uncut_lengths.max())} would keep all"
        )
    if report["dropped"] > report["too_long"]:
        dropped = report["dropped"] - report["too_long"]
        yield f"{dropped:,} rows were dropped: their answers alone are longer than data.max_length"


def _name(part: MixturePart) -> str:
    first = f"[:{part.first}]" if part.first else ""
    return f"{part.name}{first}"

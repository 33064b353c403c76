"""Cache of token ids: for each split (or file), prompt and tokenizer, the rows that any run has needed so far.

On disk a part has a folder ``tokens/NAME-KEY.index`` with two numbers for every row: a key of its text and its number
of answer tokens. These determine the rows that a run trains on, without encoding the prompts. Token ids are stored
beside it in folders ``NAME-KEY.rows-HASH``, each with the rows that one run needed and no earlier one had encoded. A
folder ``NAME-KEY``, in which an earlier version stored index and token ids of all rows, is read too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from subspace.common import paths
from subspace.common.files import build_dir_atomically, read_manifest
from subspace.common.hashing import hash_texts
from subspace.common.progress import Progress
from subspace.data import tokenization
from subspace.data.collate import TokenRow
from subspace.data.records import TextRows, Texts

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # of the cache; rows in another format are encoded again
ENCODED_AT_ONCE = 4096  # rows

Integers = npt.NDArray[np.int64]


class Spans(NamedTuple):
    """What carries loss in each row of a table, where that is not all from some token on.

    ``counts``, ``(rows,)``, has the number of each row's spans, and ``bounds``, ``(spans, 2)``, their first tokens and
    the ones behind them, row by row. A row without spans is trained from ``answer_start`` on.
    """

    counts: Integers
    bounds: Integers

    @classmethod
    def none(cls, rows: int) -> Self:
        """Return no spans for each row."""
        return cls(np.zeros(rows, dtype=np.int64), np.empty((0, 2), dtype=np.int64))

    @classmethod
    def joined(cls, several: Sequence[Spans]) -> Self:
        """Return the spans of tables that are put one after another."""
        return cls(*(np.concatenate(columns) for columns in zip(*several, strict=True)))

    def lengths(self) -> Integers:
        """Return the number of tokens in each row's spans."""
        row = np.repeat(np.arange(len(self.counts)), self.counts)
        sizes = self.bounds[:, 1] - self.bounds[:, 0]
        return np.bincount(row, weights=sizes, minlength=len(self.counts)).astype(np.int64)


@dataclass(frozen=True)
class TokenTable:
    """Token ids of rows that are numbered consecutively through all parts. Not every row is encoded.

    Attributes:
        keys: a key of every row's text, equal for equal texts.
        answer_lengths: the number of every row's answer tokens, end token included.
        ids: the encoded rows.
        position: the index of every row in ``ids``, or -1 if it is not encoded.
        spans: what carries loss in the rows of ``ids``.
    """

    keys: Integers
    answer_lengths: Integers
    ids: datasets.Dataset
    position: Integers
    spans: Spans

    def lengths(self, rows: Integers) -> Integers:
        """Return the number of tokens of each of these rows; 0 if it is not encoded."""
        lengths = column(self.ids, "length")
        at = self.position[rows]
        return np.where(at >= 0, lengths[at], 0) if len(lengths) else np.zeros(len(rows), dtype=np.int64)

    @cached_property
    def _first_spans(self) -> Integers:
        return np.concatenate([[0], np.cumsum(self.spans.counts)])

    def read(self, row: int) -> TokenRow:
        """Return a row's token ids, and which of them carry loss.

        Raises:
            LookupError: the row is not encoded.
        """
        at = int(self.position[row])
        if at < 0:
            raise LookupError(f"row {row} is not encoded: it was not requested when the data was opened")
        columns = self.ids[at]
        bounds = self.spans.bounds[self._first_spans[at] : self._first_spans[at + 1]].tolist()
        start = bounds[0][0] if bounds else columns["answer_start"]
        return TokenRow(columns["input_ids"], start, tuple((first, end) for first, end in bounds))


class PartCache:
    """Cache of the token ids of one part."""

    def __init__(self, part: TextRows, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> None:
        self.part, self.tokenizer, self.progress = part, tokenizer, progress
        inputs = (
            str(FORMAT),
            tokenization.tokenizer_fingerprint(tokenizer),
            str(tokenizer.eos_token_id),
            *part.fingerprint_inputs,
        )
        key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()
        self.folder = paths.cache_folder() / "tokens" / (re.sub(r"[^\w.-]", "-", part.name) + f"-{key[:16]}")

    @cached_property
    def texts(self) -> Texts:
        """The part's texts, read once."""
        return self.part.read()

    @property
    def is_indexed(self) -> bool:
        """True if the index is in the cache."""
        return is_good(self.folder) or is_good(self._beside("index"))

    @cached_property
    def index(self) -> tuple[Integers, Integers]:
        """The key of every row's text, and the number of its answer's tokens."""
        if is_good(self.folder):
            table = load_table(self.folder)
            return column(table, "key"), column(table, "length") - column(table, "answer_start")
        folder = self._beside("index")
        build_dir_atomically(folder, is_good, self._build_index)
        table = load_table(folder)
        return column(table, "key"), column(table, "answer_length")

    def __len__(self) -> int:
        return len(self.index[0])

    @property
    def told(self) -> list[str]:
        """Notices to the user about the rows: none."""
        return []

    def needed(self, prefix: int) -> Integers:
        """Return how long a row must be allowed to be for each of these: the answer and a token before it are kept.

        Args:
            prefix: the number of tokens that the tokenizer puts before every text.
        """
        return self.index[1] + max(prefix, 1)

    def spans_of(self, table: datasets.Dataset) -> Spans:
        """Return no spans: a task's rows are trained from the answer on."""
        return Spans.none(len(table))

    def place(self, row: int) -> str:
        """Return the place of a row."""
        return f"{self.part.name}, row {row + 1}"

    def _beside(self, suffix: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{suffix}")

    def missing(self, rows: Integers) -> Integers:
        """Return those of these rows that are not encoded yet, in ascending order."""
        return np.setdiff1d(rows, self._encoded()[0])

    def encode(self, rows: Integers) -> tuple[Integers, datasets.Dataset]:
        """Encode those of the rows that are not encoded yet; return the numbers and token ids of all encoded rows."""
        missing = self.missing(rows)
        if len(missing):
            # All processes of a run need the same rows: the first encodes them, and the others wait.
            folder = self._beside(f"rows-{hashlib.sha256(missing.tobytes()).hexdigest()[:16]}")
            build_dir_atomically(folder, is_good, lambda work: self._build_rows(work, missing))
        return self._encoded()

    def _encoded(self) -> tuple[Integers, datasets.Dataset]:
        import datasets

        # An empty table gives the columns their types where nothing is encoded.
        numbers, tables = [np.empty(0, dtype=np.int64)], [datasets.Dataset.from_dict(TOKEN_COLUMNS, token_features())]
        if is_good(self.folder):
            tables.append(load_table(self.folder))
            numbers.append(np.arange(len(tables[-1])))
        # By the whole hash: what another process is just writing has a longer name, and soon another one.
        pattern = f"{self.folder.name}.rows-{'[0-9a-f]' * 16}"
        for folder in filter(is_good, sorted(self.folder.parent.glob(pattern))):
            tables.append(load_table(folder))
            numbers.append(column(tables[-1], "row"))
        tables = [table.select_columns(list(TOKEN_COLUMNS)) for table in tables]
        return np.concatenate(numbers), datasets.concatenate_datasets(tables)

    def _build_index(self, work: Path) -> dict[str, Any]:
        answers = tokenization.encode_answers(self.tokenizer, self.texts)
        keys = np.array([hash_texts(prompt, answer) for prompt, answer in self.texts], dtype=np.uint64)
        columns = {
            "key": keys.view(np.int64),  # Arrow and the order of rows take them as signed
            "answer_length": [len(self._ended(ids)) for ids in answers],
        }
        return self._save(columns, work)

    def _build_rows(self, work: Path, rows: Integers) -> dict[str, Any]:
        columns: dict[str, Any] = {"row": rows, **self._encode([self.texts[row] for row in rows])}
        return self._save(columns, work)

    def _encode(self, texts: Texts) -> dict[str, list[Any]]:
        """Return the columns of the encoded texts, with an end token after every answer."""
        columns: dict[str, list[Any]] = {"input_ids": [], "answer_start": [], "length": []}
        with self.progress(f"encoding {self.part.name}", len(texts), "rows") as at:
            for begin in range(0, len(texts), ENCODED_AT_ONCE):
                chunk = texts[begin : begin + ENCODED_AT_ONCE]
                for ids, start in tokenization.encode_rows(self.tokenizer, chunk):
                    ended = self._ended(ids)
                    columns["input_ids"].append(np.asarray(ended, dtype=np.int32))
                    columns["answer_start"].append(start)
                    columns["length"].append(len(ended))
                at(begin + len(chunk))
        return columns

    def _ended(self, ids: list[int]) -> list[int]:
        # By id: as text, an end would have to be recognised again, which not every tokenizer does.
        return [*ids, self.tokenizer.eos_token_id]

    def _save(self, columns: dict[str, Any], work: Path) -> dict[str, Any]:
        save_table(columns, work)
        return {"rows": self.part.name, "key": self.folder.name.rpartition("-")[2]}


TOKEN_COLUMNS: dict[str, list[Any]] = {"input_ids": [], "answer_start": [], "length": []}


def token_features(names: Iterable[str] = TOKEN_COLUMNS) -> datasets.Features:
    """Return the types of these columns; those that have no other hold numbers."""
    import datasets

    lists, number = datasets.List(datasets.Value("int32")), datasets.Value("int64")
    types = {"input_ids": lists, "answers": lists, "where": datasets.Value("string")}
    return datasets.Features({name: types.get(name, number) for name in names})


def save_table(columns: dict[str, Any], work: Path) -> None:
    """Write a table into a folder that is being built."""
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns, features=token_features(columns)).save_to_disk(str(work / "rows"))


class Part(Protocol):
    """A part of the data: its rows' keys and lengths, and their token ids."""

    @property
    def is_indexed(self) -> bool: ...
    @property
    def index(self) -> tuple[Integers, Integers]: ...
    @property
    def told(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def needed(self, prefix: int) -> Integers: ...
    def missing(self, rows: Integers) -> Integers: ...
    def encode(self, rows: Integers) -> tuple[Integers, datasets.Dataset]: ...
    def spans_of(self, table: datasets.Dataset) -> Spans: ...
    def place(self, row: int) -> str: ...


def open_table(parts: Sequence[Part], rows: Integers) -> TokenTable:
    """Return the table of these rows, numbered through all parts, encoding those that are not encoded yet."""
    import datasets

    keys, answer_lengths, tables, spans = [], [], [], []
    position = np.full(sum(map(len, parts)), -1)
    encoded = 0
    for part, begin, numbers in split_by_part(parts, rows):
        encoded_rows, table = part.encode(numbers)
        position[begin + encoded_rows] = encoded + np.arange(len(table))
        encoded += len(table)
        tables.append(table)
        spans.append(part.spans_of(table))
        keys.append(part.index[0])
        answer_lengths.append(part.index[1])
    return TokenTable(
        np.concatenate(keys),
        np.concatenate(answer_lengths),
        datasets.concatenate_datasets(tables),
        position,
        Spans.joined(spans),
    )


def split_by_part(parts: Sequence[Part], rows: Integers) -> Iterator[tuple[Part, int, Integers]]:
    """Yield each part, the number of its first row, and those of ``rows`` in it, numbered within the part."""
    begin = 0
    for part in parts:
        end = begin + len(part)
        yield part, begin, rows[(rows >= begin) & (rows < end)] - begin
        begin = end


def column(table: datasets.Dataset, name: str) -> Integers:
    """Return an integer column of a table."""
    return np.asarray(table.data.column(name).to_numpy(), dtype=np.int64)


def is_good(folder: Path) -> bool:
    """Return True if a folder with a table is whole."""
    return read_manifest(folder, thorough=True) is not None


def load_table(folder: Path) -> datasets.Dataset:
    """Return the table in a folder."""
    import datasets

    return datasets.Dataset.load_from_disk(str(folder / "rows"))

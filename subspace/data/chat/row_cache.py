"""Cache of the token ids of people's own rows: all rows of a source together, with the tokens that carry loss.

On disk a source has a folder ``tokens/NAME-KEY.chat``. Its table has, for every row that can be trained on, its place,
token ids, the spans of its answers and a key of its text; its manifest has what is to be told about the rows. Folders
of earlier versions have other names and are not read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from subspace.common import paths
from subspace.common.files import build_dir_atomically, read_manifest
from subspace.common.progress import Progress
from subspace.data import tokenization
from subspace.data.chat.encoding import VERSION, RowEncoder
from subspace.data.chat.template import read_template
from subspace.data.config import DataConfig
from subspace.data.rows import BadRow
from subspace.data.sources.bad_rows import BadRows
from subspace.data.sources.find import Source
from subspace.data.sources.shapes import Seen
from subspace.data.token_cache import TOKEN_COLUMNS, Integers, Spans, column, is_good, load_table, save_table

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


class RowCache:
    """Cache of the token ids of one source of people's own rows; it is used as a ``PartCache`` is.

    Args:
        source: where the rows come from.
        tokenizer: the model's.
        prompt: the prompt template's text.
        config: the settings of the data.
        progress: progress display.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        config: DataConfig,
        progress: Progress,
    ) -> None:
        self.source, self.config, self.progress = source, config, progress
        asked = config.prompt is not None
        self.encoder = RowEncoder(
            tokenizer, prompt, asked=asked, date=config.date, template=read_template(config.chat_template)
        )
        inputs = (
            *("rows", str(VERSION), tokenization.tokenizer_fingerprint(tokenizer), str(tokenizer.eos_token_id)),
            *(self.encoder.fingerprint, *source.fingerprint),
        )
        key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
        name = re.sub(r"[^\w.-]", "-", source.short_name)[-80:]
        self.folder = paths.cache_folder() / "tokens" / f"{name}-{key}.chat"

    @property
    def is_indexed(self) -> bool:
        """True if the rows are in the cache."""
        return is_good(self.folder)

    @cached_property
    def table(self) -> datasets.Dataset:
        """The encoded rows.

        Raises:
            UserError: there are rows that cannot be trained on, and they are to be refused.
        """
        build_dir_atomically(self.folder, is_good, self._build)
        table = load_table(self.folder)
        self._bad_notices = BadRows.from_dict(self._facts["bad"]).settle(
            self.source.name, self._facts["seen"], self.config.bad_rows
        )
        return table

    @cached_property
    def _facts(self) -> Mapping[str, Any]:
        facts = read_manifest(self.folder)
        assert facts is not None
        return facts

    @property
    def told(self) -> list[str]:
        """Notices to the user about the rows."""
        assert self.table is not None
        return [*self.source.notices, *self._bad_notices, *self._facts["told"]]

    def spans_of(self, table: datasets.Dataset) -> Spans:
        """Return what carries loss in each row of the table."""
        return self._spans

    @cached_property
    def _spans(self) -> Spans:
        answers = self.table.data.column("answers").combine_chunks()
        counts = np.diff(np.asarray(answers.offsets.to_numpy())) // 3
        turns, starts, ends = np.asarray(answers.flatten().to_numpy(), dtype=np.int64).reshape(-1, 3).T
        if self.config.loss_on == "last-answer":
            last = np.repeat(turns[np.cumsum(counts) - 1], counts)
            kept = turns == last
            row = np.repeat(np.arange(len(counts)), counts)
            counts = np.bincount(row[kept], minlength=len(counts))
            starts, ends = starts[kept], ends[kept]
        return Spans(counts.astype(np.int64), np.stack([starts, ends], axis=1))

    @cached_property
    def index(self) -> tuple[Integers, Integers]:
        """The key of every row's text, and the number of its tokens that carry loss."""
        return column(self.table, "key"), self._spans.lengths()

    def needed(self, prefix: int) -> Integers:
        """Return how long a row must be allowed to be for each of these: such rows are never cut."""
        return column(self.table, "length")

    def place(self, row: int) -> str:
        """Return the place of a row, as ``rows.jsonl, line 3``."""
        return str(self.table[row]["where"])

    def __len__(self) -> int:
        return len(self.table)

    def missing(self, rows: Integers) -> Integers:
        """Return those of these rows that are not encoded: none."""
        return rows[:0]

    def encode(self, rows: Integers) -> tuple[Integers, datasets.Dataset]:
        """Return the numbers and the token ids of all rows."""
        return np.arange(len(self.table)), self.table.select_columns(list(TOKEN_COLUMNS))

    def _build(self, work: Path) -> dict[str, Any]:
        seen, bad = Seen(), BadRows()
        columns: dict[str, list[Any]] = {name: [] for name in (*TOKEN_COLUMNS, "answers", "key", "where")}
        with self.progress(f"encoding {self.source.name}", 0, "rows") as at:
            for row in self.source.rows(seen):
                encoded = row if isinstance(row, BadRow) else self.encoder.encode(row)
                if isinstance(encoded, BadRow):
                    bad.add(encoded)
                    continue
                columns["input_ids"].append(np.asarray(encoded.ids, dtype=np.int32))
                columns["answer_start"].append(encoded.answers[0][1])
                columns["length"].append(len(encoded.ids))
                columns["answers"].append(np.asarray(encoded.answers, dtype=np.int32).ravel())
                columns["key"].append(int(np.uint64(encoded.key).astype(np.int64)))
                columns["where"].append(encoded.where)
                at(len(columns["where"]))
        bad.settle(
            self.source.name, seen.rows, self.config.bad_rows
        )  # so that nothing is left of rows that are refused
        save_table(columns, work)
        told = [*seen.notices(self.source.name), *self.encoder.notices()]
        return {"rows": self.source.name, "seen": seen.rows, "bad": bad.as_dict(), "told": told}

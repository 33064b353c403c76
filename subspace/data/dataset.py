"""The one place where data becomes batches: texts to token ids, a mixture to rows, rows to the steps of a run.

Token ids are kept in an Arrow cache, once for each split, prompt and tokenizer; a mixture is only an order of rows in
it, so that its repeats and weights cost nothing. What a step trains on follows from the data and the seed alone, not
from how many processes share the step.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from subspace.common import files as files_module
from subspace.common import paths
from subspace.common.hashing import hash_texts
from subspace.common.progress import Progress, no_progress
from subspace.data import records as rows
from subspace.data import tasks as tasks_module
from subspace.data import tokenization as tokenization_module
from subspace.data.collate import IGNORE_INDEX
from subspace.data.tasks import Mixture, MixturePart
from subspace.errors import UserError

if TYPE_CHECKING:
    import datasets
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

from subspace.data.collate import TokenRow, collate
from subspace.data.config import DataConfig

FORMAT = 1  # of the cache of token ids
ENCODED_AT_ONCE = 4096  # rows

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tokenized:
    """Rows of token ids, each at most ``max_length`` long: ``order`` says which row of the cache is the i-th."""

    table: datasets.Dataset
    order: Integers
    max_length: int
    prefix: int

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> TokenRow:
        row = self.table[int(self.order[i])]
        ids, start = row["input_ids"], row["answer_start"]
        # A long row loses the beginning of its prompt. Its answer, and what the tokenizer begins a text with, stay.
        excess = max(0, len(ids) - self.max_length)
        return TokenRow(ids[: self.prefix] + ids[self.prefix + excess :], start - excess)

    @property
    def lengths(self) -> Integers:
        """The number of tokens of each row."""
        return np.minimum(_column(self.table, "length")[self.order], self.max_length)

    @property
    def answers(self) -> Integers:
        """How many of each row's tokens are its answer's, with its end."""
        return (_column(self.table, "length") - _column(self.table, "answer_start"))[self.order]

    @property
    def keys(self) -> Integers:
        """A number for each row's text: equal where the texts are."""
        return _column(self.table, "key")[self.order]


@dataclass(frozen=True)
class Data:
    """What a run trains on and what it holds out; ``report`` counts, and ``notices`` say what a user should know.

    ``parts`` names each (task, split), or file, that the cache of token ids is made of, and its first row there.
    """

    train: Tokenized
    validation: Tokenized
    pad_id: int
    loss_on: str
    report: dict[str, Any]
    notices: tuple[str, ...]
    parts: dict[tuple[str, str], int] = field(default_factory=dict)
    packing: bool = False

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Return these rows of the training data as tensors."""
        rows = [self.train[number] for number in numbers]
        return collate(rows, self.pad_id, self.loss_on, room=self.train.max_length if self.packing else None)

    def validation_batches(self, micro_batch: int, rank: int, ranks: int) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's part of the held-out rows. All ranks get equally many batches, maybe without labels."""
        if not len(self.validation):
            raise UserError("a loss on held-out rows was asked for, but data.validation is 0: no rows are held out")
        longest_first = np.argsort(-self.validation.lengths, kind="stable")
        for start in range(0, len(longest_first), micro_batch * ranks):
            together = longest_first[start : start + micro_batch * ranks]
            mine = [self.validation[i] for i in together[rank::ranks]]
            batch = collate(mine or [self.validation[int(together[0])]], self.pad_id, self.loss_on)
            if not mine:
                batch["labels"].fill_(IGNORE_INDEX)
            yield batch


def open_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int = 0, progress: Progress = no_progress
) -> Data:
    """Open the mixture as token ids, encoding what is not in the cache. Any number of processes may do so at once.

    The seed decides which rows are held out, and which are drawn where a mixture or ``limit`` takes a part of them.
    """
    draw = np.random.default_rng(seed)
    mixture, found = _parts(config, tokenizer)
    absent = [f"{part.task}/{part.split}" for part in mixture.parts if (part.task, part.split) not in found]
    if not found:
        raise UserError(f"nothing of {mixture.name} is in the source it was prepared from: {', '.join(absent)}")

    import datasets

    tables = {name: _tokenized(part, tokenizer, progress) for name, part in found.items()}
    begins = dict(zip(tables, np.cumsum([0, *map(len, tables.values())]), strict=False))
    table = datasets.concatenate_datasets(list(tables.values()))
    taken = {
        part: begins[name] + _take(len(tables[name]), part, draw)
        for part in mixture.parts
        if (name := (part.task, part.split)) in tables
    }
    order = np.concatenate(list(taken.values()))
    keys, lengths, starts = (_column(table, name) for name in ("key", "length", "answer_start"))
    if mixture.deduplicate:
        order = order[np.sort(np.unique(keys[order], return_index=True)[1])]

    # The answer needs a token before it, and is never cut.
    prefix = len(tokenization_module.bos_prefix(tokenizer))
    needed = lengths[order] - starts[order] + max(prefix, 1)
    kept = order[needed <= config.max_length]
    if not len(kept):
        least = f"its shortest answer takes {needed.min()} with the token before it" if len(needed) else "it has none"
        raise UserError(f"no row of {mixture.name} fits into data.max_length={config.max_length} tokens: {least}")
    train, validation = _hold_out(kept, keys, config.validation, mixture.name, draw)
    if config.limit is not None and config.limit < len(train):
        train = train[np.sort(draw.permutation(len(train))[: config.limit])]

    cut = int((lengths[train] > config.max_length).sum())
    report = {
        "mixture": mixture.name,
        "rows": len(order),
        "expected": mixture.rows,
        "absent": absent,
        "parts": {_name(part): len(part_rows) for part, part_rows in taken.items()},
        "train": len(train),
        "repeats": len(train) - len(np.unique(keys[train])),
        "validation": len(validation),
        "tokens": int(np.minimum(lengths[train], config.max_length).sum()),
        "answer_tokens": int((lengths[train] - starts[train]).sum()),
        "cut": cut,
        "dropped": len(order) - len(kept),
    }
    notices = []
    if absent:
        whole = f" of {mixture.rows:,}" if mixture.rows else ""
        notices.append(
            f"{mixture.name} has {len(order):,}{whole} rows: {', '.join(absent)} is not in the data's source"
        )
    if cut:
        notices.append(
            f"{cut:,} of {len(train):,} rows are longer than data.max_length={config.max_length} tokens and lose the "
            f"beginning of their prompt; {int(lengths[train].max())} would keep all"
        )
    if report["dropped"]:
        notices.append(f"{report['dropped']:,} rows were dropped: their answers alone are longer than data.max_length")

    def opened(order: Integers) -> Tokenized:
        return Tokenized(table, order, config.max_length, prefix)

    assert tokenizer.pad_token_id is not None
    parts = {name: int(begin) for name, begin in begins.items()}
    return Data(
        train=opened(train),
        validation=opened(validation),
        pad_id=int(tokenizer.pad_token_id),
        loss_on=config.loss_on,
        report=report,
        notices=tuple(notices),
        parts=parts,
        packing=config.packing,
    )


def is_encoded(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether all that a run trains on is in the cache of token ids."""
    return all(files_module.read_manifest(_folder(part, tokenizer)) for part in _parts(config, tokenizer)[1].values())


def _parts(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Mixture, dict[tuple[str, str], rows.TextRows]]:
    """Return the mixture, and what of it is prepared."""
    template = tasks_module.prompt_template(config.prompt)
    if config.mixture.endswith(rows.FILES):
        own = rows.file_rows(Path(config.mixture), template, tokenizer)
        mixture, found = Mixture(config.mixture, (MixturePart(own.name),)), {(own.name, "train"): own}
    else:
        mixture = tasks_module.find_mixture(config.mixture)
        splits = dict.fromkeys((part.task, part.split) for part in mixture.parts)
        found = {name: part for name in splits if (part := rows.task_rows(*name, template))}
    return mixture, found


def _tokenized(part: rows.TextRows, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> datasets.Dataset:
    """Return the cache of a part's token ids, written unless it is there."""
    import datasets

    folder = _folder(part, tokenizer)

    def is_good(folder: Path) -> bool:
        return files_module.read_manifest(folder) is not None

    def build(work: Path) -> dict[str, Any]:
        datasets.disable_progress_bars()
        table = datasets.Dataset.from_dict(_encode(part, tokenizer, progress), features=_features())
        table.save_to_disk(str(work / "rows"))
        return {"rows": part.name, "key": folder.name.rpartition("-")[2]}

    files_module.build_dir_atomically(folder, is_good, build)
    return datasets.Dataset.load_from_disk(str(folder / "rows"))


def _folder(part: rows.TextRows, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Return where a part's token ids are kept."""
    decided_by = (
        str(FORMAT),
        tokenization_module.tokenizer_fingerprint(tokenizer),
        str(tokenizer.eos_token_id),
        *part.decided_by,
    )
    key = hashlib.sha256("\0".join(decided_by).encode()).hexdigest()
    return paths.cache_folder() / "tokens" / (re.sub(r"[^\w.-]", "-", part.name) + f"-{key[:16]}")


def _features() -> datasets.Features:
    import datasets

    number = datasets.Value("int64")
    return datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32")), "answer_start": number, "length": number, "key": number}
    )


def _encode(part: rows.TextRows, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> dict[str, list[Any]]:
    """Encode texts, and end every answer. ``key`` is equal where the texts are."""
    texts = part.read()
    columns: dict[str, list[Any]] = {"input_ids": [], "answer_start": [], "length": [], "key": []}
    own_ends = set(tokenizer.all_special_ids) if part.chat else set()
    with progress(f"encoding {part.name}", len(texts), "rows") as at:
        for begin in range(0, len(texts), ENCODED_AT_ONCE):
            some = texts[begin : begin + ENCODED_AT_ONCE]
            for ids, start in tokenization_module.encode_rows(tokenizer, some, special=not part.chat):
                # By id: as text, an end would have to be recognised again, which not every tokenizer does.
                ended = ids if ids[-1] in own_ends else [*ids, tokenizer.eos_token_id]
                columns["input_ids"].append(np.asarray(ended, dtype=np.int32))
                columns["answer_start"].append(start)
                columns["length"].append(len(ended))
            at(begin + len(some))
    keys = np.array([hash_texts(prompt, answer) for prompt, answer in texts], dtype=np.uint64)
    columns["key"] = keys.view(np.int64).tolist()  # Arrow and the order of rows take them as signed
    return columns


def _take(available: int, part: MixturePart, draw: np.random.Generator) -> Integers:
    """Return the rows that a mixture takes of a part: all, as often as they fit whole, and a draw for the rest."""
    first = np.arange(available)[: part.first]
    wanted = round(part.weight * len(first)) if part.rows is None else part.rows
    whole, rest = divmod(wanted, len(first)) if len(first) else (0, 0)
    return np.concatenate([*[first] * whole, np.sort(draw.permutation(first)[:rest])]).astype(np.int64)


def _hold_out(
    order: Integers, keys: Integers, count: int, name: str, draw: np.random.Generator
) -> tuple[Integers, Integers]:
    """Split into rows to train on and to hold out: never one that is there twice, for it would be trained on, too."""
    _, inverse, times = np.unique(keys[order], return_inverse=True, return_counts=True)
    once = np.flatnonzero(times[inverse] == 1)
    if count > len(once) or count >= len(order):
        raise UserError(
            f"data.validation={count} rows were to be held out of {name}, but of its {len(order):,} rows {len(once):,} "
            "are there only once, and some must be left to train on. Make data.validation smaller"
        )
    held = np.sort(draw.permutation(once)[:count])
    return np.delete(order, held), order[held]


def _column(table: datasets.Dataset, name: str) -> Integers:
    return np.asarray(table.data.column(name).to_numpy(), dtype=np.int64)


def _name(part: MixturePart) -> str:
    first = f"[:{part.first}]" if part.first else ""
    return f"{part.task}/{part.split}{first}"

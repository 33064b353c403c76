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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from subspace import declarations, encoding, paths, rows, sources
from subspace.declarations import Mixture, Part
from subspace.encoding import IGNORE
from subspace.errors import UserError
from subspace.progress import Progress, silent
from subspace.settings import Settings, setting

if TYPE_CHECKING:
    import datasets
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # of the cache of token ids
GROUPED_STEPS = 64  # steps whose rows are sorted by length together: more pads less, fewer shuffles better
ENCODED_AT_ONCE = 4096  # rows

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """What a run trains on, and how it is read."""

    mixture: str = setting(
        "commonsense", "a mixture, a task, tasks with rows or weights, or a file; see data/README.md"
    )
    prompt: str = setting("alpaca-indented", "the text round instruction and answer, from data/prompts.yaml")
    max_length: int = setting(256, "tokens, prompt and answer together; a longer row loses its beginning", min=2)
    loss_on: str = setting(
        "answer", "the tokens that carry loss: the answer and its end, or all", choices=("answer", "all")
    )
    validation: int = setting(120, "rows held out", min=0)
    limit: int | None = setting(None, "rows to train on, drawn at random; null for all", min=1)
    group_by_length: bool = setting(True, "fill a step with rows of like length, which pads less")
    packing: bool = setting(
        False, "put rows one after another, blind to each other, into sequences of max_length, which pads hardly at all"
    )


class Row(NamedTuple):
    """Token ids of prompt and answer, and where the answer starts."""

    input_ids: list[int]
    answer_start: int


@dataclass(frozen=True)
class Tokenized:
    """Rows of token ids, each at most ``max_length`` long: ``order`` says which row of the cache is the i-th."""

    table: datasets.Dataset
    order: Integers
    max_length: int
    prefix: int

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> Row:
        row = self.table[int(self.order[i])]
        ids, start = row["input_ids"], row["answer_start"]
        # A long row loses the beginning of its prompt. Its answer, and what the tokenizer begins a text with, stay.
        excess = max(0, len(ids) - self.max_length)
        return Row(ids[: self.prefix] + ids[self.prefix + excess :], start - excess)

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
                batch["labels"].fill_(IGNORE)
            yield batch


def open_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int = 0, progress: Progress = silent
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
    prefix = len(encoding.prefix(tokenizer))
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
    return all(sources.sealed(_folder(part, tokenizer)) for part in _parts(config, tokenizer)[1].values())


def _parts(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Mixture, dict[tuple[str, str], rows.Rows]]:
    """Return the mixture, and what of it is prepared."""
    template = declarations.prompt(config.prompt)
    if config.mixture.endswith(rows.FILES):
        own = rows.file_rows(Path(config.mixture), template, tokenizer)
        mixture, found = Mixture(config.mixture, (Part(own.name),)), {(own.name, "train"): own}
    else:
        mixture = declarations.mixture(config.mixture)
        splits = dict.fromkeys((part.task, part.split) for part in mixture.parts)
        found = {name: part for name in splits if (part := rows.task_rows(*name, template))}
    return mixture, found


class StepPlan:
    """Which rows each optimizer step trains on: ``plan[k]`` are those of step k, longest first, over all processes.

    Every epoch is a fresh shuffle of all rows, and the epochs follow one another without a seam: a step that begins in
    one may end in the next. So every step has exactly ``batch`` rows, every epoch has every row once, and only what
    does not fill a step at the very end is left over. With ``group_by_length``, the rows of 64 successive steps are
    dealt out to them by length.
    """

    def __init__(
        self,
        lengths: npt.ArrayLike,
        batch: int,
        epochs: float = 1.0,
        steps: int | None = None,
        seed: int = 0,
        group_by_length: bool = True,
    ) -> None:
        lengths = np.asarray(lengths)
        if not len(lengths):
            raise UserError("there are no rows to train on")
        count = max(1, int(epochs * len(lengths) / batch)) if steps is None else steps
        passes = -(-count * batch // len(lengths))
        shuffled = [np.random.default_rng((seed, epoch)).permutation(len(lengths)) for epoch in range(passes)]
        order = np.concatenate(shuffled)[: count * batch].reshape(count, batch)

        if group_by_length:
            for start in range(0, count, GROUPED_STEPS):
                together = order[start : start + GROUPED_STEPS]
                by_length = together.ravel()[np.argsort(lengths[together.ravel()], kind="stable")]
                # Three numbers, so that this is never the draw of an epoch.
                together[:] = np.random.default_rng((seed, start, 0)).permutation(by_length.reshape(-1, batch))
        self._order = np.take_along_axis(order, np.argsort(-lengths[order], axis=1, kind="stable"), axis=1)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, step: int) -> list[int]:
        return [int(row) for row in self._order[step]]


def share(numbers: Sequence[int], rank: int, ranks: int, accumulate: int) -> list[list[int]]:
    """Return this rank's micro-batches of a step's rows.

    The rows come longest first. Rows of like length are fed at the same time, so that no rank waits for another.
    """
    if len(numbers) < ranks * accumulate:
        raise UserError(
            f"a step of {len(numbers)} rows cannot be shared by {ranks} processes in {accumulate} micro-batches each. "
            f"Make train.batch at least {ranks * accumulate}"
        )
    together = np.array_split(np.asarray(numbers), accumulate)
    return [[int(number) for number in part[rank::ranks]] for part in together]


def collate(
    batch: Sequence[Row], pad_id: int, loss_on: str = "answer", pad_to_multiple: int = 8, room: int | None = None
) -> dict[str, Tensor]:
    """Pad rows on the right into tensors (sequences, tokens). What is padding is told by position, whatever id it has.

    With ``room``, a sequence of so many tokens takes as many rows as fit, one after another. Their positions, which
    begin again with each row and with the padding, are then given, too.
    """
    import torch

    sequences = [[row] for row in batch] if room is None else packed(batch, room)
    longest = max(sum(len(row.input_ids) for row in sequence) for sequence in sequences)
    shape = (len(sequences), -(-longest // pad_to_multiple) * pad_to_multiple)
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    mask, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    for i, sequence in enumerate(sequences):
        begin = 0
        for row in sequence:
            end = begin + len(row.input_ids)
            # A row's first token follows none that it could be told from.
            start = begin + (1 if loss_on == "all" else row.answer_start)
            ids[i, begin:end] = torch.tensor(row.input_ids)
            mask[i, begin:end] = 1
            labels[i, start:end] = ids[i, start:end]
            positions[i, begin:end] = torch.arange(end - begin)
            begin = end
        positions[i, begin:] = torch.arange(shape[1] - begin)
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return tensors if room is None else {**tensors, "position_ids": positions}


def packed(rows: Sequence[Row], room: int) -> list[list[Row]]:
    """Put rows, the longest first, each into the first sequence that has room for it among so many tokens."""
    sequences: list[list[Row]] = []
    left: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        size = len(row.input_ids)
        at = next((i for i, free in enumerate(left) if size <= free), len(left))
        if at == len(left):
            sequences.append([])
            left.append(room)
        sequences[at].append(row)
        left[at] -= size
    return sequences


def _tokenized(part: rows.Rows, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> datasets.Dataset:
    """Return the cache of a part's token ids, written unless it is there."""
    import datasets

    folder = _folder(part, tokenizer)

    def is_good(folder: Path) -> bool:
        return sources.sealed(folder) is not None

    def build(work: Path) -> dict[str, Any]:
        datasets.disable_progress_bars()
        table = datasets.Dataset.from_dict(_encode(part, tokenizer, progress), features=_features())
        table.save_to_disk(str(work / "rows"))
        return {"rows": part.name, "key": folder.name.rpartition("-")[2]}

    sources.make_folder(folder, is_good, build)
    return datasets.Dataset.load_from_disk(str(folder / "rows"))


def _folder(part: rows.Rows, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Return where a part's token ids are kept."""
    decided_by = (str(FORMAT), encoding.fingerprint(tokenizer), str(tokenizer.eos_token_id), *part.decided_by)
    key = hashlib.sha256("\0".join(decided_by).encode()).hexdigest()
    return paths.cache() / "tokens" / (re.sub(r"[^\w.-]", "-", part.name) + f"-{key[:16]}")


def _features() -> datasets.Features:
    import datasets

    number = datasets.Value("int64")
    return datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32")), "answer_start": number, "length": number, "key": number}
    )


def _encode(part: rows.Rows, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> dict[str, list[Any]]:
    """Encode texts, and end every answer. ``key`` is equal where the texts are."""
    texts = part.read()
    columns: dict[str, list[Any]] = {"input_ids": [], "answer_start": [], "length": [], "key": []}
    own_ends = set(tokenizer.all_special_ids) if part.chat else set()
    with progress(f"encoding {part.name}", len(texts), "rows") as at:
        for begin in range(0, len(texts), ENCODED_AT_ONCE):
            some = texts[begin : begin + ENCODED_AT_ONCE]
            for ids, start in encoding.encode_rows(tokenizer, some, special=not part.chat):
                # By id: as text, an end would have to be recognised again, which not every tokenizer does.
                ended = ids if ids[-1] in own_ends else [*ids, tokenizer.eos_token_id]
                columns["input_ids"].append(np.asarray(ended, dtype=np.int32))
                columns["answer_start"].append(start)
                columns["length"].append(len(ended))
            at(begin + len(some))
    columns["key"] = [_key(prompt, answer) for prompt, answer in texts]
    return columns


def _key(prompt: str, answer: str) -> int:
    digest = hashlib.blake2b(f"{prompt}\0{answer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _take(available: int, part: Part, draw: np.random.Generator) -> Integers:
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


def _name(part: Part) -> str:
    first = f"[:{part.first}]" if part.first else ""
    return f"{part.task}/{part.split}{first}"

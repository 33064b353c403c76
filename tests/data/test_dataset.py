"""Texts to batches: what carries loss, what is cut, who trains on which row, and which line of a file is broken."""

from __future__ import annotations

import csv
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from subspace import run as run_module
from subspace.api import prepare
from subspace.common.files import build_dir_atomically
from subspace.common.paths import cache_folder
from subspace.data import tokenization as tokenization_module
from subspace.data.chat.limits import ModelLimits
from subspace.data.collate import IGNORE_INDEX, TokenRow, collate
from subspace.data.config import DataConfig
from subspace.data.dataset import Data, is_encoded, open_data
from subspace.data.prepare import task_items
from subspace.data.sampler import StepPlan, draw_steps, hold_out, shard_batch
from subspace.data.tokenization import encode_prompt
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from subspace.models.loading import open_tokenizer
from tests.helpers.tiny_models import bpe_tokenizer
from tests.helpers.toy_benchmark import TRAIN, make_world

CHAT = (
    "{% for m in messages %}<|begin_of_text|>{{ m.role }}: {{ m.content }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin_of_text|>assistant: {% endif %}"
)
PAD = "<|reserved_special_token_0|>"
PLAIN = "{{ instruction }}{{ input }}\nSay:\n   "  # the toy world's prompt


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return bpe_tokenizer(pad_token=PAD)


@pytest.fixture(autouse=True)
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tmp_path if "model" in request.keywords else make_world(tmp_path, monkeypatch)


@pytest.fixture
def prepared(world: Path) -> Path:
    prepare([], ["toy"], "pypi")
    return world


def settings(mixture: str | Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"mixture": str(mixture), "prompt": "plain", "validation": 0, "max_length": 500, **changes})


def answers(data: Data, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    rows = [data.train[i] for i in range(len(data.train))]
    return [str(tokenizer.decode(row.input_ids[row.answer_start :])) for row in rows]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["instruction", "input", "output"])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# Tensors.

ROWS = [TokenRow([5, 6, 7, 8, 1], 3), TokenRow([9, 1, 4, 1], 2)]


def test_only_the_answer_and_its_end_carry_loss() -> None:
    batch = collate(ROWS, pad_id=1, pad_to_multiple=8)  # pads that look like ends hide no end
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 1, 1, 1, 1], [9, 1, 4, 1, 1, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 4 + [0] * 4]
    assert batch["labels"].tolist() == [
        [IGNORE_INDEX] * 3 + [8, 1] + [IGNORE_INDEX] * 3,
        [IGNORE_INDEX] * 2 + [4, 1] + [IGNORE_INDEX] * 4,
    ]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_all_tokens_carry_loss_where_asked() -> None:
    labels = collate(ROWS, pad_id=1, loss_on="all", pad_to_multiple=1)["labels"]
    assert labels.tolist() == [
        [IGNORE_INDEX, 6, 7, 8, 1],
        [IGNORE_INDEX, 1, 4, 1, IGNORE_INDEX],
    ]  # nothing stands before the first


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (4, 8), (8, 8), (64, 64)])
def test_the_width_is_a_multiple(multiple: int, width: int) -> None:
    assert collate(ROWS, pad_id=0, pad_to_multiple=multiple)["input_ids"].shape == (2, width)


# Files of a user's own.

OWN = [
    {"instruction": "is ice cold?", "input": "", "output": "true"},
    {"instruction": "name a fox", "input": " quickly", "output": "the brown fox"},
    {"instruction": "sing", "output": "la la"},
]


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".parquet"])
def test_a_file_s_rows_are_read(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = open_data(settings(write(tmp_path / f"own{kind}", OWN)), tokenizer)
    assert answers(data, tokenizer) == [
        "\n   true<|end_of_text|>",
        "\n   the brown fox<|end_of_text|>",
        "\n   la la<|end_of_text|>",
    ]
    row = data.train[1]
    assert row.input_ids[: row.answer_start] == encode_prompt(tokenizer, "name a fox quickly\nSay:")
    assert row.input_ids.count(tokenizer.eos_token_id or -1) == 1


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("own.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a", "output"}\n', "line 2: not JSON"),
        ("own.jsonl", '{"instruction": "a", "output": "b"}\n\n{"instruction": "a"}\n', "line 3: no 'output'"),
        ("own.jsonl", '{"instruction": "a", "output": "b"}\n["a", "b"]\n', "line 2: a row should be an object"),
        ("own.jsonl", '{"instruction": "a", "output": 5}\n', "line 1: 'output' is int, not text"),
        ("own.jsonl", '{"instruction": " ", "output": "b"}\n', "line 1: 'instruction' is empty"),
        ("own.jsonl", '{"instruction": "a", "output": "b", "input": ["c"]}\n', "line 1: 'input' is list, not text"),
        ("own.jsonl", b'{"instruction": "a", "output": "b"}\n{"a": "\xff"}\n', "line 2: not UTF-8"),
        ("own.jsonl", "\n\n", "has no rows"),
        ("own.json", '[{"instruction": "a",\n "output": }]', "line 2: not JSON"),
        ("own.json", '{"instruction": "a"}\n{"instruction": "b"}', "line 1: no 'output'"),
        ("own.json", '"a text"', "should be a list of rows, not str"),
        ("own.json", '[{"instruction": "a", "output": "b"}, {"prompt": "x"}]', "row 2: no 'completion'"),
        ("own.parquet", "PAR1 and no more", "is damaged, cut, or not of the kind that its name says"),
        ("own.jsonl", '{"messages": []}\n', "line 1: 'messages' should be a list of turns"),
        ("own.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}\n', "line 1: no turn of the assistant's"),
        ("own.jsonl", '{"messages": [{"role": "user"}]}\n', "line 1: a turn has no 'content': turn 1 has role"),
    ],
)
def test_a_broken_file_is_named_with_its_line(
    name: str, content: str | bytes, says: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        open_data(settings(file), tokenizer)
    assert str(refused.value).startswith(str(file))
    assert says in str(refused.value)
    assert not [path for path in (tmp_path / "cache").glob("tokens/*") if path.is_dir()]


def test_a_file_that_is_not_there_names_its_neighbour(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    write(tmp_path / "mine.jsonl", OWN)
    with pytest.raises(UserError, match=r"is not there\. Did you mean 'mine\.jsonl'"):
        open_data(settings(tmp_path / "mien.jsonl"), tokenizer)


def test_data_of_one_s_own_is_mixed_with_a_task(prepared: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(prepared / "own.csv", OWN)
    data = open_data(settings(f"toy:4,{file}*2,{file}:1"), tokenizer)
    assert data.report["parts"] == {"toy/train": 4, str(file): 7}
    assert [text.count("la la") for text in answers(data, tokenizer)[4:7]] == [0, 0, 1]
    assert len(data.train) == 11
    assert list(data.report["sources"]) == [str(file)]  # which environment.json keeps
    assert data.report["sources"][str(file)]["files"] == 1


def test_bad_rows_are_refused_together_or_left_out_and_told_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = write(tmp_path / "own.json", [*OWN, {"instruction": "a"}, {**OWN[0], "id": 7, "output": 5}, {"output": "b"}])
    with pytest.raises(UserError, match=r"3 of 6 rows cannot be trained on: .*row 4: no 'output'.*row 5.*row 6"):
        open_data(settings(file), tokenizer)
    for _ in range(2):  # the second time from the cache
        data = open_data(settings(write(tmp_path / "own.json", [*OWN, {"id": 1}]), bad_rows="drop"), tokenizer)
        assert len(data.train) == 3
        assert data.notices[0].startswith(f"1 of 4 rows of {file} are left out: no keys that rows are recognised by")


def test_hosts_with_other_files_are_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for rows in (OWN, OWN[:2], OWN[::-1], OWN):
        data = open_data(settings(write(tmp_path / "own.json", rows)), tokenizer)
        digests.append(data.digest)
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]
    monkeypatch.setattr(run_module, "gather_objects", lambda own: [own, own])
    run_module.check_same_rows(data)
    monkeypatch.setattr(run_module, "gather_objects", lambda own: [own, ("b", digests[1])])
    with pytest.raises(UserError, match=r"own.json has other rows on b than on .*Copy one host's to all"):
        run_module.check_same_rows(data)


def test_columns_of_a_file_are_mapped(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "own.parquet", [{"frage": "is ice cold?", "antwort": "true", "chosen": "x"}])
    columns = {"instruction": "frage", "output": "antwort", "chosen": None}
    assert answers(open_data(settings(file, columns=columns), tokenizer), tokenizer) == ["\n   true<|end_of_text|>"]


# Chats.

TURNS = [
    {"role": "user", "content": "is ice cold?"},
    {"role": "assistant", "content": "true"},
    {"role": "user", "content": "and fire?"},
    {"role": "assistant", "content": "the answer is no"},
]


def labelled(data: Data, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the pieces of the first row that have labels, decoded from the labels."""
    (labels,) = collate([data.train[0]], 0, data.loss_on)["labels"].tolist()
    pieces = groupby(labels, lambda label: label != IGNORE_INDEX)
    return [str(tokenizer.decode(list(piece))) for has_loss, piece in pieces if has_loss]


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("answers", [" true<|end_of_text|>", " the answer is no<|end_of_text|>"]),
        ("answer", [" true<|end_of_text|>", " the answer is no<|end_of_text|>"]),  # its name until version 0.2
        ("last-answer", [" the answer is no<|end_of_text|>"]),
    ],
)
def test_a_chat_is_written_by_the_tokenizer_and_its_answers_are_trained(
    loss_on: str, expected: list[str], tmp_path: Path
) -> None:
    tokenizer = bpe_tokenizer(pad_token=PAD, chat_template=CHAT)
    data = open_data(settings(write(tmp_path / "chat.jsonl", [{"messages": TURNS}]), loss_on=loss_on), tokenizer)
    row = data.train[0]
    assert tokenizer.decode(row.input_ids) == (
        "<|begin_of_text|>user: is ice cold?<|end_of_text|>\n<|begin_of_text|>assistant: true<|end_of_text|>\n"
        "<|begin_of_text|>user: and fire?<|end_of_text|>\n<|begin_of_text|>assistant: the answer is no<|end_of_text|>"
    )
    assert labelled(data, tokenizer) == expected
    assert data.train.answers.tolist() == [sum(len(tokenizer.encode(t, add_special_tokens=False)) for t in expected)]
    everything = replace(data, loss_on="all")
    assert labelled(everything, tokenizer) == [str(tokenizer.decode(row.input_ids[1:]))]


def test_a_template_without_an_end_gets_one(tmp_path: Path) -> None:
    bare = CHAT.replace("<|begin_of_text|>", "").replace("<|end_of_text|>", "")
    tokenizer = bpe_tokenizer(pad_token=PAD, chat_template=bare)
    data = open_data(settings(write(tmp_path / "chat.jsonl", [{"messages": TURNS}])), tokenizer)
    assert labelled(data, tokenizer) == [" true", " the answer is no<|end_of_text|>"]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "tokenizer has none"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
        (
            "{{ messages | length }}{% if add_generation_prompt %}assistant{% endif %}",
            "leaves out a turn of the role 'user'",
        ),
    ],
)
def test_a_chat_that_cannot_be_written(template: str | None, says: str, tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(pad_token=PAD, **({"chat_template": template} if template else {}))
    with pytest.raises(UserError, match=f"chat.jsonl, line 1: .*{says}"):
        open_data(settings(write(tmp_path / "chat.jsonl", [{"messages": TURNS}])), tokenizer)


# Lengths.


def test_a_long_row_loses_the_beginning_of_its_prompt_and_nothing_else(
    prepared: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole, cut = (open_data(settings("toy", max_length=length), tokenizer) for length in (500, 40))
    row, short = whole.train[39], cut.train[39]
    assert len(row.input_ids) > 40 == len(short.input_ids)
    assert short.input_ids[0] == tokenizer.bos_token_id
    assert short.input_ids[1:] == row.input_ids[-39:]
    assert short.input_ids[short.answer_start :] == row.input_ids[row.answer_start :]
    long = int((whole.train.lengths > 40).sum())
    assert cut.report["cut"] == long > 0
    assert cut.notices[-1].startswith(f"{long} of {TRAIN} rows are longer than data.max_length=40 tokens")
    assert cut.train.lengths.tolist() == np.minimum(whole.train.lengths, 40).tolist()


def test_the_length_named_would_keep_all(prepared: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    enough = int(open_data(settings("toy", max_length=40), tokenizer).notices[-1].split()[-4])
    assert open_data(settings("toy", max_length=enough), tokenizer).report["cut"] == 0
    assert open_data(settings("toy", max_length=enough - 1), tokenizer).report["cut"] == 1


def test_a_row_whose_answer_does_not_fit_is_dropped(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [*OWN, {"instruction": "sing", "output": "la " * 50}]
    file = write(tmp_path / "own.jsonl", rows)
    data = open_data(settings(file, max_length=40), tokenizer)
    assert (len(data.train), data.report["dropped"], data.report["too_long"], data.report["rows"]) == (3, 1, 1, 4)
    assert data.notices[-1] == (
        f"1 rows are longer than data.max_length, 40 tokens: {file}, line 7 (63). They are left out, because no row of "
        "yours is cut"
    )
    with pytest.raises(UserError, match=r"1 rows are longer than .* line 7 \(63\)\. Shorten them"):
        open_data(settings(file, max_length=40, too_long="refuse"), tokenizer)


def test_by_default_the_longest_row_fits_and_the_models_positions_bound_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [*OWN, {"instruction": "sing", "output": "la " * 500}]
    file = write(tmp_path / "own.jsonl", rows)
    whole = open_data(settings(file, max_length=None), tokenizer)
    longest = int(whole.train.lengths.max())
    assert len(whole.train) == 4
    assert whole.train.max_length == longest > 500
    bounded = open_data(settings(file, max_length=None), tokenizer, limits=ModelLimits(positions=longest - 1))
    assert len(bounded.train) == 3
    assert f"1 rows are longer than the model's positions, {longest - 1} tokens" in bounded.notices[-1]


def test_tasks_are_cut_at_256_tokens_by_default(prepared: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert open_data(settings("toy", max_length=None), tokenizer).train.max_length == 256


def test_a_token_beyond_the_models_embedding_is_named_with_its_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [*OWN, {"instruction": "sing", "output": "a covid song"}]
    file = write(tmp_path / "own.jsonl", rows)
    tokenizer.add_tokens(["covid"])
    limits = ModelLimits(embeddings=384)
    with pytest.raises(UserError, match=r"own.jsonl, line 7: the token 'covid' has the id 384, .* only 384 rows"):
        open_data(settings(file), tokenizer, limits=limits)
    assert len(open_data(settings(write(tmp_path / "few.jsonl", OWN)), tokenizer, limits=limits).train) == 3


def test_no_row_that_fits_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "own.jsonl", [{"instruction": "sing", "output": "la la la"}])
    length = len(open_data(settings(file), tokenizer).train[0].input_ids)
    with pytest.raises(UserError, match=f"no row of .* the shortest takes {length}"):
        open_data(settings(file, max_length=length - 1), tokenizer)


def test_one_row_is_shown_with_what_is_trained_in_brackets(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(pad_token=PAD, chat_template=CHAT)
    turns = [*TURNS[:3], {"role": "assistant", "content": "no\x1b[2J"}]
    data = open_data(settings(write(tmp_path / "chat.jsonl", [{"messages": turns}])), tokenizer)
    head, _, text = data.example.partition("\n")
    assert f"chat.jsonl, line 1), {data.train.answers[0]} of its {len(data.train[0].input_ids)} tokens trained" in head
    assert text == (
        "<|begin_of_text|>user: is ice cold?<|end_of_text|>\n<|begin_of_text|>assistant:⟦ true<|end_of_text|>⟧\n"
        "<|begin_of_text|>user: and fire?<|end_of_text|>\n"
        "<|begin_of_text|>assistant: ⟦no\\x1b[2J<|end_of_text|>⟧"
    )


def test_rows_that_are_refused_leave_nothing_in_the_cache(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(pad_token=PAD, chat_template=CHAT)
    file = write(
        tmp_path / "chat.jsonl", [{"messages": TURNS}, {"messages": [*TURNS, {"role": "assistant", "content": ""}]}]
    )
    with pytest.raises(UserError, match="a turn of the assistant's says nothing"):
        open_data(settings(file), tokenizer)
    assert not [path for path in (tmp_path / "cache").glob("tokens/*") if path.is_dir()]
    data = open_data(settings(file, bad_rows="drop"), tokenizer)
    assert len(data.train) == 1
    assert "1 of 2 rows of" in data.notices[0]
    with pytest.raises(UserError, match="a turn of the assistant's says nothing"):
        open_data(settings(file), tokenizer)


# Mixtures.


def test_a_mixture_is_its_parts_one_after_the_other(prepared: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data, toy = (open_data(settings(mixture), tokenizer) for mixture in ("nested", "toy"))
    assert [data.train[i] for i in range(5)] == [toy.train[i] for i in range(5)]
    assert [data.train[5 + i] for i in range(TRAIN)] == [toy.train[i] for i in range(TRAIN)]
    assert (data.report["repeats"], len(data.train)) == (5, 5 + TRAIN)


def test_a_mixture_without_its_repeats(prepared: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data, toy = (open_data(settings(mixture), tokenizer) for mixture in ("apart", "toy"))
    assert [data.train[i] for i in range(TRAIN)] == [toy.train[i] for i in range(TRAIN)]
    assert (data.report["repeats"], len(data.train)) == (0, TRAIN)


def test_a_split_that_is_not_there_is_told_in_numbers(prepared: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = open_data(settings("both"), tokenizer)
    assert data.report["absent"] == ["toy/extra"]
    assert data.notices[0] == f"both has {TRAIN} of {TRAIN + 10} rows: toy/extra is not in the data's source"


@pytest.mark.parametrize(("mixture", "times"), [("toy*2", [2] * TRAIN), ("toy:7", [1] * 7), ("toy*0.5", [1] * 20)])
def test_weights_and_rows(mixture: str, times: list[int], prepared: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = open_data(settings(mixture), tokenizer)
    rows = Counter(tuple(data.train[i].input_ids) for i in range(len(data.train)))
    assert sorted(rows.values()) == times


def test_more_than_a_whole_multiple_is_drawn(prepared: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    drawn = [open_data(settings("toy*2.25"), tokenizer, seed).train.order.tolist() for seed in (0, 0, 1)]
    assert Counter(Counter(drawn[0]).values()) == {2: 30, 3: 10}
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_limit_draws_from_all_of_the_mixture(prepared: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    order = open_data(settings("toy", limit=10), tokenizer).train.order.tolist()
    assert len(set(order)) == 10
    assert order == sorted(order)
    assert max(order) > 10


# Held-out rows.


def test_held_out_rows_are_never_trained_on(prepared: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = open_data(settings("nested", validation=20), tokenizer)
    held = {tuple(data.validation[i].input_ids) for i in range(20)}
    trained = {tuple(data.train[i].input_ids) for i in range(len(data.train))}
    assert len(held) == 20
    assert not held & trained
    assert len(data.train) == TRAIN + 5 - 20


def test_held_out_rows_stay_when_fewer_are_trained_on(prepared: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    whole, few = (open_data(settings("toy", validation=9, limit=limit), tokenizer) for limit in (None, 5))
    assert whole.validation.order.tolist() == few.validation.order.tolist()


@pytest.mark.parametrize("count", [36, 40, 1000])
def test_more_rows_than_there_are_cannot_be_held_out(
    count: int, prepared: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match=f"data.validation={count} rows .* 45 rows 35 occur only once"):
        open_data(settings("nested", validation=count), tokenizer)


@pytest.mark.parametrize("rows", [3, 9, 10, 50, 200, 1000, 1199, 1200, 5000])
@pytest.mark.parametrize("copies", [0, 1])
def test_without_a_number_at_most_a_tenth_is_held_out(rows: int, copies: int) -> None:
    order = np.arange(rows)
    keys = np.where(order < copies, -1, order)  # the first of them equals none, or the last
    keys[-1] = -1
    train, held = hold_out(order, keys, None, "rows.jsonl", np.random.default_rng(0))
    assert len(held) == min(120, max(1, rows // 10))
    assert sorted([*train, *held]) == order.tolist()
    assert not copies or not {0, rows - 1} & set(held)


@pytest.mark.parametrize("keys", [[1], [1, 1], [1, 1, 2, 2]])
def test_a_validation_for_which_nothing_can_be_held_out_is_refused(keys: list[int]) -> None:
    with pytest.raises(UserError, match=r"a validation is due, for which no row of rows.jsonl .*validate_every=0"):
        hold_out(np.arange(len(keys)), np.array(keys), None, "rows.jsonl", np.random.default_rng(0))


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (2, 4), (3, 2), (8, 1)])
def test_ranks_share_the_held_out_rows(
    ranks: int, micro: int, prepared: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = open_data(settings("toy", validation=13), tokenizer)
    batches = [list(data.validation_batches(micro, rank, ranks)) for rank in range(ranks)]
    assert len({len(mine) for mine in batches}) == 1
    labelled = sum(batch.num_labelled for mine in batches for batch in mine)
    expected = [data.validation[i] for i in range(13)]
    assert labelled == sum(len(row.input_ids) - row.answer_start for row in expected)
    assert max(len(batch.input_ids) for mine in batches for batch in mine) <= micro


def test_a_loss_on_no_rows_is_refused(prepared: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="no rows are held out"):
        next(open_data(settings("toy"), tokenizer).validation_batches(2, 0, 1))


# The cache of token ids.


def count_encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []
    encode_rows = tokenization_module.encode_rows

    def counting(tokenizer: Any, rows: Any, **options: Any) -> Any:
        counted.append(len(rows))
        return encode_rows(tokenizer, rows, **options)

    monkeypatch.setattr(tokenization_module, "encode_rows", counting)
    return counted


def other_settings(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    return tokenizer


def other_end(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    return bpe_tokenizer(pad_token=PAD, eos_token="<|reserved_special_token_1|>")


def other_prompt(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    monkeypatch.setattr("subspace.data.dataset.prompt_template", lambda name: PLAIN.replace("Say", "Tell"))
    return tokenizer


@pytest.mark.parametrize(("change", "again"), [(other_settings, 0), (other_end, 1), (other_prompt, 1)])
def test_what_was_encoded_is_kept_until_something_changes(
    change: Callable[..., PreTrainedTokenizerBase],
    again: int,
    prepared: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_data(settings("toy"), tokenizer)
    counted = count_encodings(monkeypatch)
    data = open_data(settings("toy", max_length=30, validation=5), change(tokenizer, monkeypatch))
    assert counted == [TRAIN] * again
    assert len(data.train) == TRAIN - 5


def test_who_comes_at_the_same_time_encodes_once(
    prepared: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = count_encodings(monkeypatch)
    opened: list[Data] = []
    tokenizers = [bpe_tokenizer(pad_token=PAD) for _ in range(3)]
    threads = [threading.Thread(target=lambda t=t: opened.append(open_data(settings("toy"), t))) for t in tokenizers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted == [TRAIN]
    assert [opened[0].train[3]] * 3 == [data.train[3] for data in opened]


def test_what_another_process_is_just_writing_is_not_read(prepared: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A finished folder under an unfinished one's name: in the moment before it is renamed, it has a manifest."""
    first = open_data(settings("toy"), tokenizer)
    (rows,) = (path for path in (cache_folder() / "tokens").glob("*.rows-*") if path.is_dir())
    shutil.copytree(rows, rows.with_name(f"{rows.name}.partial"))
    shutil.rmtree(rows)
    again = open_data(settings("toy"), tokenizer)
    assert rows.is_dir()  # so it was encoded anew
    assert again.train[3] == first.train[3]


# Only what is fed is encoded.

FED = partial(draw_steps, batch=4, steps=3, seed=0, group_by_length=False)
NUMBER = datasets.Value("int64")
OLD_COLUMNS = datasets.Features(
    {"input_ids": datasets.List(datasets.Value("int32")), "answer_start": NUMBER, "length": NUMBER, "key": NUMBER}
)


def test_only_rows_that_are_fed_or_held_out_are_encoded(
    prepared: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = count_encodings(monkeypatch)
    data = open_data(settings("toy", validation=5), tokenizer, fed=FED)
    assert counted == [3 * 4 + 5]
    assert (data.report["fed"], data.report["train"]) == (12, TRAIN - 5)
    unfed = next(i for i in range(len(data.train)) if i not in FED(len(data.train)))
    with pytest.raises(LookupError, match="was not requested"):
        data.train[unfed]


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("mixture", ["toy", "nested", "apart", "toy*0.75"])
def test_a_run_is_fed_the_same_whether_or_not_all_is_encoded(
    mixture: str, group: bool, prepared: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    fed_rows = partial(draw_steps, batch=4, steps=3, seed=0, group_by_length=group)
    few, whole = (open_data(settings(mixture, validation=5), tokenizer, 3, fed=fed) for fed in (fed_rows, None))
    plans = [StepPlan(data.train.lengths, batch=4, steps=3, group_by_length=group) for data in (few, whole)]
    assert rows_of(plans[0]) == rows_of(plans[1])
    fed = rows_of(plans[0])
    assert [few.train[row] for row in fed] == [whole.train[row] for row in fed]
    assert list(map(few.validation.__getitem__, range(5))) == list(map(whole.validation.__getitem__, range(5)))
    assert (few.train.keys == whole.train.keys).all()
    assert (few.train.answers == whole.train.answers).all()


def test_a_longer_run_encodes_what_the_shorter_one_did_not(
    prepared: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_data(settings("toy"), tokenizer, fed=FED)
    counted = count_encodings(monkeypatch)
    longer = partial(draw_steps, batch=4, steps=5, seed=0, group_by_length=False)
    assert not is_encoded(settings("toy"), tokenizer, fed=longer)
    for _ in range(2):
        open_data(settings("toy"), tokenizer, fed=longer)
    assert counted == [2 * 4]
    assert is_encoded(settings("toy"), tokenizer, fed=longer)
    assert not is_encoded(settings("toy"), tokenizer)


def test_the_index_knows_the_answers_of_rows_that_are_not_encoded(
    prepared: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = open_data(settings("toy"), tokenizer)
    rows = [data.train[i] for i in range(len(data.train))]
    assert data.train.answers.tolist() == [len(row.input_ids) - row.answer_start for row in rows]


def test_a_cache_of_whole_parts_is_read_as_it_is(
    prepared: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to version 0.1 a part's folder had one table, with the token ids, lengths and keys of all rows."""
    before = open_data(settings("toy"), tokenizer)
    (index,) = (prepared / "tokens").glob("toy-train-*.index")
    part = index.with_suffix("")
    numbers = range(TRAIN)

    def build(work: Path) -> dict[str, Any]:
        columns = {
            "input_ids": [before.train[i].input_ids for i in numbers],
            "answer_start": [before.train[i].answer_start for i in numbers],
            "length": before.train.uncut_lengths,
            "key": before.train.keys,
        }
        datasets.Dataset.from_dict(columns, OLD_COLUMNS).save_to_disk(str(work / "rows"))
        return {"rows": "toy/train"}

    build_dir_atomically(part, lambda _: False, build)
    for folder in part.parent.glob(f"{part.name}.*"):
        shutil.rmtree(folder)
    counted = count_encodings(monkeypatch)
    after = open_data(settings("toy"), tokenizer)
    assert not counted
    assert [after.train[i] for i in numbers] == [before.train[i] for i in numbers]
    assert (after.train.keys == before.train.keys).all()
    assert (after.train.answers == before.train.answers).all()


# Steps.

LENGTHS = np.random.default_rng(0).integers(5, 300, 1003)


def rows_of(plan: StepPlan) -> list[int]:
    return [row for step in range(len(plan)) for row in plan[step]]


@pytest.mark.parametrize("group", [True, False])
def test_every_epoch_has_every_row_once(group: bool) -> None:
    plan = StepPlan(LENGTHS[:1000], batch=8, epochs=3, seed=1, group_by_length=group)
    assert {len(plan[step]) for step in range(len(plan))} == {8}
    assert Counter(rows_of(plan)) == dict.fromkeys(range(1000), 3)


def test_epochs_follow_one_another_without_a_seam() -> None:
    plan = StepPlan(LENGTHS, batch=8, epochs=3, group_by_length=False)
    assert [len(plan[step]) for step in range(len(plan))] == [8] * (3 * 1003 // 8) + [3 * 1003 % 8]
    for begin in (0, 1003, 2006):
        in_a_shuffle = [row for step in range(begin // 8 + 1, (begin + 1003) // 8) for row in plan[step]]
        assert len(set(in_a_shuffle)) == len(in_a_shuffle)


def some_data(number: int) -> dict[str, Any]:
    """Return lengths and settings of a plan: few rows or many, fewer than a step or not, grouped or not."""
    draw = np.random.default_rng(number)
    return {
        "lengths": draw.integers(5, 300, int(draw.integers(1, 1 + int(draw.choice([5, 60, 1500]))))),
        "batch": int(draw.integers(1, 40)),
        "seed": number,
        "group_by_length": bool(draw.integers(2)),
    }


@pytest.mark.parametrize("number", range(60))
def test_of_any_data_every_epoch_takes_every_row_once_and_the_last_step_what_is_left(number: int) -> None:
    data, epochs = some_data(number), number % 4 + 1
    rows, batch = len(data["lengths"]), data["batch"]
    plan = StepPlan(**data, epochs=epochs)
    assert Counter(rows_of(plan)) == dict.fromkeys(range(rows), epochs)
    sizes = [len(plan[step]) for step in range(len(plan))]
    assert sizes[:-1] == [batch] * (len(plan) - 1)
    assert sizes[-1] == rows * epochs - batch * (len(plan) - 1) > 0
    assert plan.ends_small == (sizes[-1] < batch and len(plan) > 1)
    assert [plan.rows_until(step) for step in range(len(plan) + 1)] == [0, *np.cumsum(sizes)]
    assert sorted(plan.all_rows) == sorted(rows_of(plan))


@pytest.mark.parametrize("number", range(60))
def test_of_any_data_a_longer_plan_begins_as_a_shorter_one(number: int) -> None:
    data, draw = some_data(number), np.random.default_rng(number)
    short, long = (StepPlan(**data, epochs=epochs) for epochs in (number % 3 + 1, number % 3 + 2))
    full = len(short) - (short.taken % data["batch"] > 0)
    assert all(short[step] == long[step] for step in range(full))
    if full < len(short):
        assert not Counter(short[full]) - Counter(long[full])  # the longer run's step has the same rows and some more
    few = int(draw.integers(1, 100))
    short, long = (StepPlan(**data, steps=steps) for steps in (few, few + int(draw.integers(0, 200))))
    assert [short[step] for step in range(few)] == [long[step] for step in range(few)]
    # Only the lengths of rows that are asked for matter.
    known = np.zeros_like(data["lengths"])
    asked = draw_steps(len(known), **{key: value for key, value in data.items() if key != "lengths"}, steps=few)
    known[asked] = data["lengths"][asked]
    again = StepPlan(**{**data, "lengths": known}, steps=few)
    assert [short[step] for step in range(few)] == [again[step] for step in range(few)]


def test_what_a_checkpoint_of_before_went_by_is_planned_as_it_was() -> None:
    """Up to version 0.1: full steps only, as many as fit, grouped 64 at a time from the first to the last."""
    plan = StepPlan(LENGTHS, batch=8, epochs=3, seed=2, former=True)
    shuffled = np.concatenate([np.random.default_rng((2, epoch)).permutation(1003) for epoch in range(3)])
    steps = shuffled[: 3 * 1003 // 8 * 8].reshape(-1, 8)
    for begin in range(0, len(steps), 64):
        block = steps[begin : begin + 64]
        by_length = block.ravel()[np.argsort(LENGTHS[block.ravel()], kind="stable")].reshape(block.shape)
        steps[begin : begin + 64] = np.random.default_rng((2, begin, 0)).permutation(by_length)
    assert [sorted(plan[step]) for step in range(len(plan))] == np.sort(steps, axis=1).tolist()
    assert len(StepPlan(np.ones(3), batch=16, epochs=1, former=True)[0]) == 16


def test_the_published_recipe_has_its_number_of_steps() -> None:
    plan = StepPlan(np.ones(170_420 - 120), batch=16, epochs=3)
    assert (len(plan), len(plan[-1])) == (31_932, 4)


def test_less_than_a_row_is_refused() -> None:
    for epochs in (0, 0.01):
        with pytest.raises(UserError, match=rf"train.epochs={epochs} of 31 rows are less than one row"):
            StepPlan(np.ones(31), batch=8, epochs=epochs)


@pytest.mark.parametrize(("epochs", "steps", "count"), [(0.5, None, 63), (3, 7, 7), (1, 400, 400)])
def test_steps_replace_epochs(epochs: float, steps: int | None, count: int) -> None:
    assert len(StepPlan(LENGTHS, batch=8, epochs=epochs, steps=steps)) == count


def test_a_plan_follows_from_its_seed() -> None:
    plans = [rows_of(StepPlan(LENGTHS, batch=8, steps=20, seed=seed)) for seed in (3, 3, 4)]
    assert plans[0] == plans[1] != plans[2]


def test_epochs_differ_in_order() -> None:
    plan = rows_of(StepPlan(np.ones(64), batch=8, epochs=2, group_by_length=False))
    assert plan[:64] != plan[64:]


def test_a_longer_plan_begins_as_a_shorter_one() -> None:
    short, long = (rows_of(StepPlan(LENGTHS, batch=8, steps=steps)) for steps in (64, 300))
    assert long[: 64 * 8] == short


def test_grouping_pads_less_and_keeps_steps_mixed() -> None:
    def padded(plan: StepPlan) -> int:
        return sum(8 * int(LENGTHS[plan[step]].max()) for step in range(len(plan)))

    grouped, free = (StepPlan(LENGTHS, batch=8, epochs=1, group_by_length=group) for group in (True, False))
    assert padded(grouped) < 1.1 * sum(int(LENGTHS[row]) for row in rows_of(grouped))
    assert padded(free) > 1.5 * sum(int(LENGTHS[row]) for row in rows_of(free))
    means = [LENGTHS[grouped[step]].mean() for step in range(64)]
    assert abs(np.corrcoef(means, range(64))[0, 1]) < 0.4  # short and long steps alternate


def test_a_step_begins_with_its_longest_row() -> None:
    plan = StepPlan(LENGTHS, batch=8, epochs=1, group_by_length=False)
    assert all((np.diff(LENGTHS[plan[step]]) <= 0).all() for step in range(len(plan)))


@pytest.mark.parametrize("size", [16, 15, 3, 1])
@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (1, 4), (2, 1), (2, 4), (4, 4), (3, 5)])
def test_a_step_is_shared_without_loss(ranks: int, accumulate: int, size: int) -> None:
    rows = list(range(100, 100 + size))
    parts = [shard_batch(rows, rank, ranks, accumulate) for rank in range(ranks)]
    assert sorted(row for mine in parts for micro in mine for row in micro) == rows
    assert {len(mine) for mine in parts} == {accumulate}
    sizes = [len(micro) for mine in parts for micro in mine]
    assert max(sizes) - min(sizes) <= (size % (ranks * accumulate) > 0)


def test_rows_that_are_fed_together_are_of_like_length() -> None:
    assert [shard_batch([9, 8, 7, 6, 5, 4, 3, 2], rank, 2, 2) for rank in (0, 1)] == [
        [[9, 7], [5, 3]],
        [[8, 6], [4, 2]],
    ]


# The real data.


@pytest.mark.model
def test_the_real_data_is_read_as_it_was_declared() -> None:
    tokenizer = open_tokenizer(ModelConfig())
    data = open_data(DataConfig(mixture="arc_challenge"), tokenizer)
    item, row = task_items("arc_challenge", "train")[int(data.train.order[0])], data.train[0]
    output = f"the correct answer is answer{item['label'] + 1}<|im_end|>"
    assert str(tokenizer.decode(row.input_ids[row.answer_start :])).strip() == output
    assert item["question"] in tokenizer.decode(row.input_ids)
    assert len(data.train) == 1119 - 111

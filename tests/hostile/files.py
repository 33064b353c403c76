"""Malformed files of others: tasks, rows, mixtures, adapters, results, logs, whole folders of runs and of models."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from subspace.adapters.serialization import SETTINGS, TENSORS, load_adapter
from subspace.config import read_run_subject
from subspace.data.config import DataConfig
from subspace.data.custom_tasks import custom_task, read_local_items
from subspace.data.tasks import find_mixture
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model, open_tokenizer
from subspace.reporting.row_report import report_rows
from subspace.training.checkpoint import read_environment
from subspace.training.logging import truncate_log
from tests.helpers.tiny_models import tiny_llama
from tests.hostile.inputs import OTHERS, Case, Place, command, replaced, spoilt, written


def cases(rng: random.Random) -> Iterator[Case]:
    """Yield the cases of this module."""
    yield from _tasks(rng)
    yield from _mixtures(rng)
    yield from _rows(rng)
    yield from _adapters(rng)
    yield from _results(rng)
    yield from _run_folders(rng)
    yield from _models(rng)


# Tasks.

ROWS = [{"question": f"Which, {n}?", "choices": ["one", "two"], "label": n % 2} for n in range(3)]
TASK: dict[str, Any] = {"title": "Planets", "file": "rows.jsonl", "item": {"label": "label"}}
TEMPLATES = {
    "syntax": "{{ question",
    "statement": "{% for %}",
    "unknown filter": "{{ question|nosuch }}",
    "undefined": "{{ nothing }}",
    "attribute of undefined": "{{ nothing.more }}",
    "division": "{{ 1 / 0 }}",
    "sandbox": "{{ question.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('id') }}",
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{{ 'a' * 10 ** 11 }}",
    "width": "{{ '%99999999999d' % 1 }}",
    "centre": "{{ question|center(99999999999) }}",
    "doubling": "{% set n = namespace(v='aa') %}{% for i in range(99) %}{% set n.v = n.v ~ n.v %}{% endfor %}",
    "output": "{% for a in range(9999) %}{% for b in range(999) %}x{% endfor %}{% endfor %}",
    "backtracking": "{{ ('a' * 40 ~ 'b')|regex_replace('(a+)+$', '') }}",
    "broken regex": "{{ question|regex_replace('(', '') }}",
    "no group": "{{ question|regex_group('(.*)', 7) }}",
    "range": "{{ range(10 ** 12)|list }}",
    "large": "x" * 100_000,
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}
PLACES = ("instruction", "answer", "output", "likelihood.context", "likelihood.choice")


def _tasks(rng: random.Random) -> Iterator[Case]:
    for name, text in TEMPLATES.items():
        where = PLACES if name in ("syntax", "undefined") else [rng.choice(PLACES)]
        for place in where:
            yield Case("task", f"{place} {name}", partial(_task, changes={place: text}))
        if "{{" in text and name != "syntax":
            inside = text.partition("{{")[2].partition("}}")[0].strip()
            yield Case("task", f"item {name}", partial(_task, changes={"item.question": inside or "("}))
    for key in ("title", "file", "item", "likelihood", "splits", "instruction", "answer_words", "published", "license"):
        for name, value in OTHERS.items():
            yield Case(
                "task", f"{key} {name}", partial(_task, changes={key: value}), refused=name in ("huge", "escape")
            )
    for name in ("../../x", "a/b", "/tmp/x", "..", "-x", "x\x1b[31m", "a b\nc"):
        yield Case("task", f"name {name!r}", partial(_task, changes={"name": name}))
        yield Case("task", f"split {name!r}", partial(_task, changes={"splits": {name: {"official": "test"}}}))
    for name, text in {"nowhere": "no.jsonl", "a folder": ".", "a device": "/dev/zero", "up": "../../../etc"}.items():
        yield Case("task", f"file is {name}", partial(_task, changes={"file": text}))
    bad: dict[str, list[Any]] = {
        "no rows": [],
        "numbers": [1, 2],
        "lists": [[1]],
        "no label": [{"question": "a", "choices": ["b"]}],
        "label too large": [{**ROWS[0], "label": 9}],
        "label below 0": [{**ROWS[0], "label": -1}],
        "label a word": [{**ROWS[0], "label": "x"}],
        "choices a text": [{**ROWS[0], "choices": 3}],
        "no choices": [{**ROWS[0], "choices": []}],
    }
    for name, rows in bad.items():
        yield Case("task", name, partial(_task, changes={}, rows=rows))
    for number in range(60):
        yield Case("task", f"spoilt {number}", partial(_task_spoilt, seed=rng.random()), refused=False)


def score_texts(file: Path) -> int:
    """Read a task and make all its texts, as a scoring does before it needs a model."""
    task = custom_task(file)
    for split in task.splits:
        for item in read_local_items(task, split, None):
            task.instruction(item), task.output(item)
            if task.likelihood.metrics:
                task.likelihood.requests(item), task.likelihood.normalizers(item)
    return 0


def _task(place: Place, folder: Path, changes: dict[str, Any], rows: list[Any] | None = None) -> int:
    content = json.loads(json.dumps(TASK))
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        (content.setdefault(section, {}) if section else content)[key] = value
    written(folder / "rows.jsonl", "\n".join(map(json.dumps, ROWS if rows is None else rows)))
    return score_texts(written(folder / "mine.yaml", yaml.safe_dump(content, allow_unicode=True)))


def _task_spoilt(place: Place, folder: Path, seed: float) -> int:
    rng = random.Random(seed)
    written(folder / "rows.jsonl", "\n".join(map(json.dumps, ROWS)))
    return score_texts(written(folder / "mine.yaml", spoilt(yaml.safe_dump(TASK).encode(), rng)))


# Mixtures.

MIXTURE: dict[str, Any] = {
    "title": "Both",
    "parts": [{"data": "rows.jsonl", "rows": 3}, {"task": "boolq", "weight": 0.5}],
}
BAD_MIXTURES: dict[str, Any] = {
    "no parts": {"title": "x"},
    "parts a word": {"parts": "x"},
    "parts a number": {"parts": 3},
    "parts of numbers": {"parts": [3]},
    "parts of words": {"parts": ["boolq"]},
    "an empty part": {"parts": [{}]},
    "both": {"parts": [{"task": "boolq", "data": "x.jsonl"}]},
    "unknown task": {"parts": [{"task": "nosuch"}]},
    "unknown split": {"parts": [{"task": "boolq", "split": "nosuch"}]},
    "unknown key": {"parts": [{"task": "boolq", "wait": 3}]},
    "negative": {"parts": [{"task": "boolq", "rows": -3}]},
    "negative weight": {"parts": [{"task": "boolq", "weight": -0.5}]},
    "not finite": {"parts": [{"task": "boolq", "weight": float("inf")}]},
    "not a number": {"parts": [{"task": "boolq", "weight": float("nan")}]},
    "huge": {"parts": [{"task": "boolq", "rows": 10**40}]},
    "rows a word": {"parts": [{"task": "boolq", "rows": "all"}]},
    "columns a word": {"parts": [{"data": "rows.jsonl", "columns": "x"}]},
    "columns of lists": {"parts": [{"data": "rows.jsonl", "columns": {"instruction": []}}]},
    "an escape": {"title": "\x1b[31m", "parts": [{"task": "boolq"}]},
}


def _mixtures(rng: random.Random) -> Iterator[Case]:
    for name, content in BAD_MIXTURES.items():
        yield Case("mixture", name, partial(_mixture, text=yaml.safe_dump(content)))
    for text in ("", "3", "- 1", "parts: &p [*p]", "a: \0", "{[a]: 1}", "parts: !!python/name:os.system"):
        yield Case("mixture", repr(text), partial(_mixture, text=text))
    for text in (
        "boolq:",
        "boolq:-3",
        "boolq*x",
        "boolq:1e9",
        ",",
        ",,",
        "boolq:" + "9" * 5000,
        "x" * 300,
        "a\0b",
        "\x1b[31m",
    ):
        yield Case("mixture", f"in a line {text[:20]!r}", partial(_mixture_line, text=text))
    for number in range(40):
        data = spoilt(yaml.safe_dump(MIXTURE).encode(), rng)
        yield Case("mixture", f"spoilt {number}", partial(_mixture, text=data), refused=False)


def _mixture(place: Place, folder: Path, text: str | bytes) -> int:
    written(folder / "rows.jsonl", "\n".join(map(json.dumps, [{"instruction": "a", "output": "b"}] * 3)))
    find_mixture(str(written(folder / "mix.yaml", text)))
    return 0


def _mixture_line(place: Place, folder: Path, text: str) -> int:
    return command("data", text)


# Rows.

GOOD_ROWS = "".join(f'{{"instruction": "Say {n}.", "output": "{n}"}}\n' for n in range(8)).encode()
BAD_ROWS: dict[str, bytes] = {
    "empty.jsonl": b"",
    "nothing.json": b"null",
    "number.json": b"3",
    "word.jsonl": b"word\n",
    "cut.json": b'[{"instruction": "a"',
    "deep.jsonl": b'{"instruction": ' + b"[" * 100_000 + b"\n",
    "digits.jsonl": b'{"instruction": ' + b"9" * 6000 + b"}\n",
    "numbers.jsonl": b"1\n2\n",
    "lists.jsonl": b"[1]\n[2]\n",
    "zeros.jsonl": bytes(1000),
    "binary.jsonl": bytes(range(256)) * 4,
    "latin.csv": "instruction,output\nM\xfcnchen,ja\n".encode("latin-1"),
    "head.csv": b"instruction,output\n",
    "twice.csv": b"a,a\n1,2\n",
    "quote.csv": b'instruction,output\n"a,b\n',
    "no.parquet": b"PAR1" + bytes(100),
    "no.arrow": b"ARROW1\0\0" + bytes(100),
    "no.jsonl.gz": b"\x1f\x8b\x08" + bytes(100),
    "no.jsonl.bz2": b"BZh9" + bytes(100),
    "no.jsonl.xz": b"\xfd7zXZ\0" + bytes(100),
    "no.jsonl.zst": b"\x28\xb5\x2f\xfd" + bytes(100),
    "no.zip": b"PK\x03\x04" + bytes(100),
    "cut.jsonl.gz": gzip.compress(GOOD_ROWS)[:-12],
    "unknown.exe": b"MZ",
    "other.jsonl": b'{"who": "a", "what": "b"}\n',
}


def _rows(rng: random.Random) -> Iterator[Case]:
    for name, data in BAD_ROWS.items():
        yield Case("rows", name, partial(_file_of_rows, name=name, data=data))
    up = io.BytesIO()
    with zipfile.ZipFile(up, "w") as archive:
        archive.writestr("../../up.jsonl", GOOD_ROWS)
        archive.writestr("/tmp/up.jsonl", GOOD_ROWS)
    yield Case("rows", "a zip that goes up", partial(_file_of_rows, name="up.zip", data=up.getvalue()), refused=False)
    yield Case("rows", "a pipe", _pipe_of_rows)
    for number in range(80):
        kind = rng.choice((".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".parquet", ".zip"))
        data = spoilt(gzip.compress(GOOD_ROWS, mtime=0) if kind.endswith("gz") else GOOD_ROWS, rng)
        yield Case(
            "rows", f"spoilt {number} {kind}", partial(_file_of_rows, name=f"rows{kind}", data=data), refused=False
        )


def count_rows(file: Path) -> int:
    """Read a file of rows as training does, up to the refusal of rows that cannot be trained on."""
    report = report_rows(DataConfig(mixture=str(file)))
    if report.refused:
        print("error: rows are refused")
    return UserError.status if report.refused else 0


def _file_of_rows(place: Place, folder: Path, name: str, data: bytes) -> int:
    return count_rows(written(folder / name, data))


def _pipe_of_rows(place: Place, folder: Path) -> int:
    os.mkfifo(folder / "rows.jsonl")
    return count_rows(folder / "rows.jsonl")


# Adapters.


def _adapters(rng: random.Random) -> Iterator[Case]:
    parts = (
        "adapters",
        "adapters.0",
        "adapters.0.method",
        "adapters.0.settings",
        "adapters.0.sites",
        "adapters.0.sites.0",
    )
    for path in parts:
        for name, value in OTHERS.items():
            yield Case("adapter", f"{path} {name}", partial(_adapter, path=path, value=value))
    for value in ("x", -1, 0, 10**12, 1.5, [], {}, None, True):
        yield Case("adapter", f"r {value}", partial(_adapter, path="adapters.0.settings.r", value=value))
    for value in ({"no": 1}, {"r": 4, "nosuch": 3}):
        yield Case("adapter", f"settings {value}", partial(_adapter, path="adapters.0.settings", value=value))
    for value in (3, "x", [], {"weights": 3}):
        yield Case("adapter", f"base {value}", partial(_adapter, path="base", value=value), refused=False)
    tensors = {
        "no": b"",
        "cut": b"\x10",
        "a huge header": (1 << 62).to_bytes(8, "little") + b"{}",
        "zeros": bytes(4096),
        "a pickle": pickle.dumps({"a": 1}),
        "text": b"x" * 1000,
    }
    for name, data in tensors.items():
        yield Case("adapter", f"{name} tensors", partial(_adapter_files, file=TENSORS, data=data))
    for text in (
        b"",
        b"[]",
        b"null",
        b"{",
        b"[" * 100_000,
        b'{"adapters": []}',
        b'{"adapters": 1, "adapters": 2}',
        b"\xff",
    ):
        yield Case("adapter", f"description {text[:20]!r}", partial(_adapter_files, file=SETTINGS, data=text))
    for number in range(30):
        yield Case("adapter", f"spoilt {number}", partial(_adapter_spoilt, seed=rng.random()), refused=False)
    for file in (SETTINGS, TENSORS):
        yield Case("adapter", f"{file} is a folder", partial(_adapter_files, file=file, data=None))


def _copy_of_adapter(place: Place, folder: Path) -> Path:
    return Path(shutil.copytree(place.adapter, folder / "adapter"))


def _adapter(place: Place, folder: Path, path: str, value: Any) -> int:
    copy = _copy_of_adapter(place, folder)
    content = json.loads((copy / SETTINGS).read_text())
    steps: list[str | int] = [int(step) if step.isdecimal() else step for step in path.split(".")]
    return _load(written(copy / SETTINGS, json.dumps(replaced(content, steps, value))).parent)


def _adapter_files(place: Place, folder: Path, file: str, data: bytes | None) -> int:
    copy = _copy_of_adapter(place, folder)
    (copy / file).unlink()
    if data is None:
        (copy / file).mkdir()
    else:
        written(copy / file, data)
    return _load(copy)


def _adapter_spoilt(place: Place, folder: Path, seed: float) -> int:
    rng = random.Random(seed)
    copy = _copy_of_adapter(place, folder)
    file = copy / rng.choice((SETTINGS, SETTINGS, TENSORS))
    return _load(written(file, spoilt(file.read_bytes(), rng)).parent)


def _load(folder: Path) -> int:
    load_adapter(tiny_llama(), folder)
    return 0


# Results and items.


def _results(rng: random.Random) -> Iterator[Case]:
    keys = ("metrics", "n", "majority", "seconds", "ingredients", "items", "fingerprint", "task", "protocol", "model")
    for key in keys:
        for name, value in OTHERS.items():
            harmless = (key, name) in {
                *((key, "word") for key in ("model", "task", "protocol", "items", "fingerprint")),
                *(("majority", name) for name in ("number", "negative", "fraction")),
                *(("seconds", name) for name in ("number", "negative", "fraction")),
                *(("n", name) for name in ("number", "negative")),
                ("items", "nothing"),
                ("seconds", "huge"),
                *((key, "escape") for key in ("model", "task", "protocol")),  # shown, without what it commands
            }
            yield Case("results", f"{key} {name}", partial(_row, path=[0, key], value=value), refused=not harmless)
    for value in ("../../etc/passwd", "/etc/passwd", "evaluation/../../x"):
        yield Case("results", f"items {value}", partial(_row, path=[0, "items"], value=value))
    for metric, value in (("value", "x"), ("value", None), ("error", []), ("value", float("nan")), ("value", 1e999)):
        path: list[str | int] = [0, "metrics", "acc", metric]
        yield Case("results", f"{metric} {value}", partial(_row, path=path, value=value))
    for text in (b"", b"{}", b"null", b"[3]", b"[[]]", b"[{}]", b"[" * 100_000, b"\xff\xfe", b'[{"a":1,"a":2}]'):
        yield Case("results", f"{text[:20]!r}", partial(_result_files, file="results.json", data=text))
    for text in (b"3\n", b"[]\n", b"{}\n", b"\0\n", b'{"id": 1}\n', b'{"id": [], "correct": {}}\n', b"[" * 100_000):
        yield Case("items", f"{text[:20]!r}", partial(_result_files, file="items", data=text))
    for number in range(40):
        yield Case("results", f"spoilt {number}", partial(_results_spoilt, seed=rng.random()), refused=False)


def _copy_of_scored(place: Place, folder: Path) -> Path:
    return Path(shutil.copytree(place.scored, folder / "scored"))


def _row(place: Place, folder: Path, path: list[str | int], value: Any) -> int:
    copy = _copy_of_scored(place, folder)
    rows = json.loads((copy / "results.json").read_text())
    written(copy / "results.json", json.dumps(replaced(rows, path, value)))
    return command("table", str(copy))


def _result_files(place: Place, folder: Path, file: str, data: bytes) -> int:
    copy = _copy_of_scored(place, folder)
    written(next(copy.rglob("*.jsonl")) if file == "items" else copy / file, data)
    return command("compare", str(copy), str(place.scored)) if file == "items" else command("table", str(copy))


def _results_spoilt(place: Place, folder: Path, seed: float) -> int:
    rng = random.Random(seed)
    copy = _copy_of_scored(place, folder)
    file = rng.choice((copy / "results.json", next(copy.rglob("*.jsonl"))))
    written(file, spoilt(file.read_bytes(), rng))
    return command("table", str(copy))


# Whole folders of runs.

EVIL = "open({canary!r}, 'w').close()\n"


def _run_folders(rng: random.Random) -> Iterator[Case]:
    for verb in ("evaluate", "merge", "train", "plan", "resume"):
        yield Case(
            "run", f"{verb} with a method's file", partial(_foreign_run, verb=verb, config={"method": METHOD_FILE})
        )
    outcomes: list[Any] = ["x", 3, [], {}, None]
    for value in outcomes:
        about = {"outcome": value}
        yield Case(
            "run", f"outcome {value}", partial(_environment_file, text=json.dumps(about)), refused=value is not None
        )
    for text in (
        "",
        "[]",
        "3",
        "{",
        "[" * 50_000,
        '{"outcome": {"steps": "x", "loss": 1.0, "seconds": 1}}',
        "\0",
        "\ud800",
    ):
        yield Case("run", f"environment {text[:20]!r}", partial(_environment_file, text=text))
    for number in range(30):
        yield Case("run", f"log {number}", partial(_log, seed=rng.random()), refused=False)


METHOD_FILE = {"name": "evil", "file": "method/evil.py", "sha256": "0" * 64}


def _foreign_run(place: Place, folder: Path, verb: str, config: dict[str, Any]) -> int:
    run = folder / "runs" / "theirs"
    _copy_of_adapter(place, run)
    written(run / "method" / "evil.py", EVIL.format(canary=str(place.canary)))
    written(run / "config.yaml", yaml.safe_dump(yaml.safe_load(place.config.read_text()) | config))
    if verb == "merge":
        read_run_subject(run, [])
        return 0
    words = {"train": ["train", str(run / "config.yaml"), "--dry-run"], "plan": ["plan", str(run / "config.yaml")]}
    words["resume"] = [*words["train"], "--resume"]
    return command(*words.get(verb, [verb, str(run), "--dry-run"]))


def _environment_file(place: Place, folder: Path, text: str) -> int:
    written(folder / "environment.json", text)
    if not read_environment(folder).get("outcome"):
        raise UserError("the training has not ended")
    return 0


def _log(place: Place, folder: Path, seed: float) -> int:
    good = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(9)).encode()
    file = written(folder / "log.jsonl", spoilt(good, random.Random(seed)))
    truncate_log(file, 5)
    assert all(json.loads(line)["step"] <= 5 for line in file.read_text().splitlines())
    return 0


# Models.


class _Pickled:
    """What makes the canary when it is unpickled."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.canary, "w")


def _models(rng: random.Random) -> Iterator[Case]:
    for file in ("config.json", "tokenizer_config.json"):
        yield Case("model", f"code named in {file}", partial(_model_code, file=file), refused=file == "config.json")
    yield Case("model", "weights that are a pickle", _model_pickle)
    for name, index in {
        "goes up": {"weight_map": {"a": "../../x.safetensors"}},
        "is absolute": {"weight_map": {"a": "/etc/passwd"}},
        "is a list": {"weight_map": []},
        "is empty": {},
        "has numbers": {"weight_map": {"a": 3}},
    }.items():
        yield Case("model", f"an index that {name}", partial(_model_index, index=index))
    for text in (b"", b"[]", b"3", b"{", b"[" * 50_000, b"{}", b"\xff", b'{"model_type": 3}', b'{"model_type": "x"}'):
        yield Case("model", f"config {text[:20]!r}", partial(_model_config, data=text))
    for key, value in {
        "hidden_size": "x",
        "num_hidden_layers": -1,
        "num_attention_heads": 0,
        "vocab_size": 10**15,
        "rope_parameters": [],
    }.items():
        yield Case("model", f"{key} {value}", partial(_model_key, key=key, value=value))


def _copy_of_model(place: Place, folder: Path) -> Path:
    return Path(shutil.copytree(place.model, folder / "model"))


def _open(folder: Path) -> int:
    config = ModelConfig(path=str(folder), dtype="float32")
    open_tokenizer(config)
    open_model(config)
    return 0


def _model_code(place: Place, folder: Path, file: str) -> int:
    copy = _copy_of_model(place, folder)
    content = json.loads((copy / file).read_text()) if (copy / file).is_file() else {}
    autos = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    written(copy / file, json.dumps({**content, "model_type": "theirs", "auto_map": autos, "tokenizer_class": "T"}))
    written(copy / "evil.py", EVIL.format(canary=str(place.canary)))
    run = folder / "runs" / "theirs"
    _copy_of_adapter(place, run)
    model = {"path": str(copy), "dtype": "float32", "trust_remote_code": True}
    written(run / "config.yaml", yaml.safe_dump(yaml.safe_load(place.config.read_text()) | {"model": model}))
    subject = read_run_subject(run, [])
    open_tokenizer(subject.model)
    open_model(subject.model)
    return 0


def _model_pickle(place: Place, folder: Path) -> int:
    copy = _copy_of_model(place, folder)
    (copy / "model.safetensors").unlink()
    written(copy / "pytorch_model.bin", pickle.dumps(_Pickled(str(place.canary))))
    return _open(copy)


def _model_index(place: Place, folder: Path, index: Any) -> int:
    copy = _copy_of_model(place, folder)
    (copy / "model.safetensors").unlink()
    written(copy / "model.safetensors.index.json", json.dumps(index))
    return _open(copy)


def _model_config(place: Place, folder: Path, data: bytes) -> int:
    return _open(written(_copy_of_model(place, folder) / "config.json", data).parent)


def _model_key(place: Place, folder: Path, key: str, value: Any) -> int:
    copy = _copy_of_model(place, folder)
    content = json.loads((copy / "config.json").read_text())
    return _open(written(copy / "config.json", json.dumps({**content, key: value})).parent)

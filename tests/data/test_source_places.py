"""Places of people's own data: files, patterns, folders, saved data sets and the hub, alone and mixed with weights."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import datasets
import pyarrow
import pytest

from subspace.data.rows import Row
from subspace.data.sources.find import find_source
from subspace.data.tasks import MixturePart, find_mixture
from subspace.errors import UserError
from tests.helpers.hub import Hub, serving


def lines(*names: str) -> bytes:
    """Return JSON lines of a row for each name."""
    return b"".join(json.dumps({"instruction": name, "output": "a"}).encode() + b"\n" for name in names)


def feather(name: str) -> bytes:
    """Return a Feather file of one row."""
    sink, table = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist([{"instruction": name, "output": "a"}])
    with pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def asked(text: str, **options: Any) -> list[str]:
    """Return the instructions of a source's rows."""
    rows = list(find_source(text, **options).rows())
    assert all(isinstance(row, Row) for row in rows)
    return [row.messages[0]["content"] for row in rows if isinstance(row, Row)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def fill(folder: Path, **files: bytes) -> Path:
    """Write files, whose names have __ for a folder and _ for a point."""
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


# Files, patterns, folders.


def test_files_are_found_by_path_home_and_pattern(here: Path) -> None:
    fill(here / "home", mine_JSONL=lines("home"))
    fill(here / "d", a_jsonl=lines("a"), b_jsonl_gz=gzip.compress(lines("b")), c_JSON=lines("c"), notes_txt=b"no")
    (here / "d,e [1].jsonl").write_bytes(lines("odd"))
    assert asked("~/mine.JSONL") == ["home"]
    assert asked("d/a.jsonl") == asked(str(here / "d/a.jsonl")) == asked("./d/a.jsonl") == ["a"]
    assert asked("d/*.jsonl*") == ["a", "b"]
    assert asked(str(here / "*/[ac].*")) == ["a", "c"]
    assert asked("**/*.jsonl.gz") == ["b"]
    assert asked("d,e [1].jsonl") == ["odd"]
    assert [part.data for part in find_mixture("d,e [1].jsonl").parts] == ["d,e [1].jsonl"]
    source = find_source("d/*")
    assert source.notices == ("d/*: 1 files of other kinds are not read: notes.txt",)


def test_a_folder_s_shards_are_read_and_what_is_left_out_is_told(here: Path) -> None:
    shards = {f"train-0000{n}-of-00002_jsonl": lines(f"train {n}") for n in range(2)}
    declared = b"{config_name: default, data_files: [{split: train, path: train*}, {split: test, path: test*}]}"
    card = b"---\nconfigs: [" + declared + b"]\n---\n"
    fill(here / "d", **shards, test_jsonl=lines("test"), extra_csv=b"a,b\n1,2\n", notes_txt=b"no", README_md=card)
    assert asked("d") == asked("d/") == asked("d[train]") == ["train 0", "train 1"]
    assert asked("d[test]") == asked("d", split="test") == ["test"]
    told = find_source("d").notices
    assert "the split train is trained on, and not test" in told[0]
    assert told[1] == "d: 2 other files are not read: extra.csv, notes.txt"
    with pytest.raises(UserError, match=r"d has no split 'dev': write d\[SPLIT\]. There are: test, train"):
        find_source("d[dev]")
    assert find_source("d").files[0].shown == "d/train-00000-of-00002.jsonl"


def test_a_folder_of_one_kind_without_splits_is_read_whole(here: Path) -> None:
    fill(here / "d", x_jsonl_gz=gzip.compress(lines("x")), y__z_jsonl_gz=gzip.compress(lines("z")))
    assert asked("d") == ["x", "z"]
    with pytest.raises(UserError, match=r"holds no data file of a kind that is read. Files of these kinds are read"):
        find_source(str(fill(here / "empty", notes_docx=b"x")))


def test_a_folder_s_files_of_several_kinds_are_read_together_by_their_splits(here: Path) -> None:
    csv = b"instruction,output\n%s,a\n"
    fill(here / "d", train_JSONL=lines("upper"), train2_csv_gz=gzip.compress(csv % b"csv"), config_json=b"{}")
    fill(here / "d", test_ndjson_xz=lzma.compress(lines("test")), LICENSE=b"x", _hidden_jsonl=lines("hidden"))
    assert sorted(asked("d")) == ["csv", "upper"]
    assert asked("d[test]") == ["test"]
    assert find_source("d").notices[1:] == ("d: 1 other files are not read: LICENSE",)
    folder = fill(here / "e", x_feather=feather("x"), y_txt=b"a", z_txt=b"b", v_txt=b"c")
    assert asked(str(folder)) == ["x"]
    assert find_source(str(folder)).notices == (f"{folder}: 3 other files are not read: v.txt, y.txt, z.txt",)


def test_a_saved_data_set_is_read_with_its_order_and_splits(here: Path) -> None:
    whole = datasets.Dataset.from_list([json.loads(line) for line in lines(*"abcd").splitlines()])
    whole.select([3, 1]).save_to_disk("saved")
    datasets.DatasetDict({"train": whole, "test": whole.select([2])}).save_to_disk("splits")
    assert asked("saved") == ["d", "b"]
    assert asked("splits") == list("abcd")
    assert asked("splits[test]") == ["c"]
    assert find_source("saved").fingerprint != find_source("splits").fingerprint
    next((here / "saved").glob("*.arrow")).write_bytes(b"cut")
    with pytest.raises(UserError, match="saved was saved by 'save_to_disk' and cannot be loaded"):
        asked("saved")


def test_what_determines_the_rows_is_in_the_fingerprint(here: Path) -> None:
    fill(here, a_jsonl=lines("a"), b_jsonl=lines("b"))
    fill(here / "else", a_jsonl=lines("a"))
    assert find_source("a.jsonl").fingerprint == find_source("else/a.jsonl").fingerprint
    different = [find_source("a.jsonl"), find_source("b.jsonl"), find_source("*.jsonl")]
    different += [find_source("a.jsonl", {"output": "instruction"}), find_source("a.jsonl", {"id": None})]
    assert len({source.fingerprint for source in different}) == len(different)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mien.jsonl", r"the data file mien.jsonl is not there. Did you mean 'mine.jsonl'"),
        (
            "gone/x.csv",
            "the data file gone/x.csv is not there. No data file lies in gone. Files of these kinds are read",
        ),
        ("./gone", "the data file ./gone is not there"),
        ("*.parquet", r"the data file \*.parquet is not there. .*mine.jsonl"),
        ("notes.docx", "notes.docx is no data file of a kind that is read. Files of these kinds are read.*jsonl"),
    ],
)
def test_what_is_not_there_or_not_read_names_what_is(name: str, says: str, here: Path) -> None:
    fill(here, mine_jsonl=lines("a"), notes_docx=b"x")
    with pytest.raises(UserError, match=says):
        find_mixture(name).parts[0].source({})


# Mixtures.


def test_tasks_files_and_the_hub_are_mixed_by_rows_and_weights(here: Path) -> None:
    fill(here, mine_jsonl=lines("a"))
    assert find_mixture("boolq,mine.jsonl:500,org/name:config@v1.0[test]*0.5,piqa*2, ./x/*.csv").parts == (
        MixturePart("boolq"),
        MixturePart(data="mine.jsonl", rows=500),
        MixturePart(data="org/name:config@v1.0[test]", weight=0.5),
        MixturePart("piqa", weight=2.0),
        MixturePart(data="./x/*.csv"),
    )


def test_a_mixture_s_file_names_data_beside_itself(here: Path) -> None:
    fill(here / "d", mine_jsonl=lines("a"), org__name__x_csv=b"")
    (here / "d/mix.yaml").write_text(
        "parts:\n- {data: mine.jsonl, weight: 2, columns: {output: reply}}\n- {data: org/name, split: test}\n"
        "- {data: else/where}\n- {task: boolq, first: 3}\n"
    )
    assert find_mixture("d/mix.yaml").parts == (
        MixturePart(data="d/mine.jsonl", weight=2.0, columns={"output": "reply"}),
        MixturePart(data="d/org/name", split="test"),
        MixturePart(data="else/where"),
        MixturePart("boolq", first=3),
    )
    for broken in ("parts: [{split: test}]", "parts: [{task: boolq, data: mine.jsonl}]"):
        (here / "mix.yaml").write_text(broken)
        with pytest.raises(UserError, match="should have either a task or data"):
            find_mixture("mix.yaml")


# The hub.

CARD = b"""---
configs:
- config_name: plain
  data_files: [{split: train, path: "plain/train*"}, {split: test, path: plain/test.jsonl}]
- config_name: other
  data_files: other.csv
---
"""
FILES = {
    "README.md": CARD,
    "plain/train-0.jsonl": lines("train 0"),
    "plain/train-1.jsonl": lines("train 1"),
    "plain/test.jsonl": lines("test"),
    "other.csv": b"question,answer\nother,a\n",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("SUBSPACE_CACHE", str(tmp_path / "cache"))
    with serving() as served:
        served.use(monkeypatch, tmp_path / "hub")
        yield served


def downloads(hub: Hub) -> set[str]:
    """Return the names of the files that were downloaded, and forget what was asked."""
    names = {unquote(path).partition("/resolve/")[2].partition("/")[2] for path in hub.asked if "/resolve/" in path}
    hub.asked.clear()
    return names


def test_a_data_set_on_the_hub_is_read_by_configuration_and_split(hub: Hub) -> None:
    hub.push("org/name", FILES)
    assert asked("org/name:plain") == ["train 0", "train 1"]
    assert downloads(hub) == {"README.md", "plain/train-0.jsonl", "plain/train-1.jsonl"}
    assert asked("org/name:plain[test]") == ["test"]
    assert asked("org/name:other") == ["other"]
    assert find_source("org/name:other").files[0].shown == "org/name/other.csv"
    downloads(hub)
    assert asked("org/name:plain") == ["train 0", "train 1"]
    assert downloads(hub) == set()  # nothing twice
    for text, says in {
        "org/name": "org/name has several configurations: write org/name:CONFIG. There are: other, plain",
        "org/name:plian": "has no configuration 'plian': write org/name:CONFIG. Did you mean 'plain'",
        "org/name:plain[dev]": r"org/name:plain has no split 'dev': write org/name:plain\[SPLIT\]",
        "org/gone": "the hub has no data set org/gone, or not for you",
        "org/name:plain@v9": "v9",
    }.items():
        with pytest.raises(UserError, match=says):
            find_source(text)


def test_a_path_that_has_the_form_of_a_name_on_the_hub_is_told_as_both(hub: Hub, here: Path) -> None:
    fill(here / "org", mine_jsonl=lines("a"))
    with pytest.raises(UserError, match="no file or folder org/gone is here; and the hub has no data set org/gone"):
        find_source("org/gone")


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub) -> None:
    first = hub.push("org/name", {"rows.jsonl": lines("old")}, "v1")
    hub.push("org/name", {"rows.jsonl": lines("new")})
    assert asked("org/name") == ["new"]
    assert asked("org/name@v1") == asked(f"org/name@{first}") == ["old"]
    hub.asked.clear()
    assert asked(f"org/name@{first}") == ["old"]
    assert hub.asked == []  # a commit never changes
    record = find_source("org/name@v1").record
    assert (record["commit"], record["files"]) == (first, 1)
    assert record["sha256"] != find_source("org/name").record["sha256"]
    hub.push("org/name", {"rows.jsonl": lines("newer")})
    assert asked("org/name") == ["newer"]


def test_without_the_hub_the_last_commit_is_used_and_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.push("org/name", {"rows.jsonl": lines("a")})
    assert asked("org/name") == ["a"]
    hub.set_offline(monkeypatch, offline=True)
    assert asked("org/name") == ["a"]
    told = f"the hub does not answer: org/name is as it was at its commit {commit[:12]}, which lies here"
    assert find_source("org/name").notices == (told,)
    with pytest.raises(UserError, match="the hub was asked for the data set org/name and did not answer"):
        find_source("org/name@v1")
    found = find_source("org/name").files[0].path
    found.resolve().unlink()
    with pytest.raises(UserError, match="the hub was asked for the data set org/name and did not answer"):
        find_source("org/name")


def test_a_broken_download_is_thrown_away(hub: Hub) -> None:
    hub.push("org/name", {"rows.jsonl.gz": gzip.compress(lines("a"))})
    hub.broken.add("rows.jsonl.gz")
    with pytest.raises(UserError, match=r"org/name came from the hub with a broken rows.jsonl.gz"):
        find_source("org/name")
    hub.broken.clear()
    assert asked("org/name") == ["a"]

"""Checkpoints on disk: none that is damaged is taken, the last whole one always is, and a full disk loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from subspace import config as config_module
from subspace.common import files
from subspace.common.paths import REPOSITORY
from subspace.errors import UserError
from subspace.run import train_run
from subspace.training.checkpoint import (
    MANIFEST,
    begin_checkpoint,
    checkpoint_path,
    checkpoints,
    find_corruption,
    find_newest,
    finish_checkpoint,
    prune_checkpoints,
    step_of,
)
from tests.helpers.material import logged, make_material

FILES = {"adapter/adapter.json": b"{}\n", "training.json": b"[1, 2, 3]" * 9, "training.safetensors": bytes(range(256))}


def save(folder: Path, step: int, run: str | None = None) -> Path:
    unfinished = begin_checkpoint(checkpoint_path(folder, step))
    for name, content in FILES.items():
        (unfinished / name).parent.mkdir(exist_ok=True)
        (unfinished / name).write_bytes(content)
    finish_checkpoint(unfinished, checkpoint_path(folder, step), run)
    return checkpoint_path(folder, step)


def test_a_checkpoint_is_vouched_for(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert find_corruption(path) is None
    assert find_newest(tmp_path) == (path, [])
    assert set(json.loads((path / MANIFEST).read_text())["files"]) == set(FILES)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert find_newest(tmp_path) == (None, [])


def truncate(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def lose(path: Path, draw: random.Random) -> None:
    path.unlink()


def half_rename(path: Path, draw: random.Random) -> None:
    path.rename(path.with_name(path.name + draw.choice([".partial", ".tmp", "~"])))


def swap(path: Path, draw: random.Random) -> None:
    """Put another checkpoint's file in its place: as long, and sound in itself."""
    path.write_bytes(path.read_bytes()[::-1])


DAMAGES = [truncate, flip, lose, half_rename, swap]


def test_damage_is_found_and_the_last_whole_one_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)  # thousands of flushes take half a minute
    for seed in range(200):
        damage_and_find(tmp_path / str(seed), seed)


def damage_and_find(tmp_path: Path, seed: int) -> None:
    """Damage up to three of four checkpoints in the way that the seed says; the newest whole one must be found."""
    draw = random.Random(seed)
    paths = [save(tmp_path, step) for step in (5, 10, 15, 20)]
    damaged = draw.randint(1, 3)
    for path in paths[-damaged:]:
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        for file in draw.sample(inside, draw.randint(1, 2)):
            DAMAGES[seed % len(DAMAGES)](file, draw)
        assert find_corruption(path) is not None, seed
    if draw.random() < 0.5:  # and a save was under way
        shutil.copytree(paths[0], begin_checkpoint(checkpoint_path(tmp_path, 25)), dirs_exist_ok=True)
    found, passed_over = find_newest(tmp_path)
    assert found == paths[-damaged - 1], seed
    assert len(passed_over) == damaged
    assert {p.name: p.read_bytes() for p in found.glob("*.*") if p.name != MANIFEST} == {
        name: content for name, content in FILES.items() if "/" not in name
    }


def test_no_bit_of_a_manifest_can_change(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    sound = (path / MANIFEST).read_bytes()
    for i in range(len(sound)):
        for bit in (i % 8, (i + 3) % 8):
            (path / MANIFEST).write_bytes(sound[:i] + bytes([sound[i] ^ (1 << bit)]) + sound[i + 1 :])
            assert find_corruption(path), (i, bit)


def test_the_newest_is_the_one_of_the_highest_number(tmp_path: Path) -> None:
    steps = [999_999, 1_000_000, 20_000_000]
    for step in steps:
        save(tmp_path, step)
    assert [step_of(path) for path in checkpoints(tmp_path)] == steps
    assert find_newest(tmp_path)[0] == checkpoint_path(tmp_path, 20_000_000)
    prune_checkpoints(tmp_path, 2)
    assert [step_of(path) for path in checkpoints(tmp_path)] == steps[1:]


def test_a_renamed_checkpoint_is_not_taken(tmp_path: Path) -> None:
    older = save(tmp_path, 3)
    save(tmp_path, 5).rename(checkpoint_path(tmp_path, 7))
    found, told = find_newest(tmp_path)
    assert found == older
    assert told == ["the checkpoint step-000007 cannot be used: it is of step 5, and was renamed"]


def test_exchanged_checkpoints_are_not_taken(tmp_path: Path) -> None:
    one, other = save(tmp_path, 3), save(tmp_path, 5)
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    assert find_newest(tmp_path)[0] is None


def test_another_run_s_checkpoint_is_put_aside_and_kept(tmp_path: Path) -> None:
    own = save(tmp_path, 3, "own")
    save(tmp_path, 5, "other")
    assert find_newest(tmp_path)[0] == checkpoint_path(tmp_path, 5)  # where nothing says which run it is
    found, told = find_newest(tmp_path, run="own")
    assert found == own
    assert told == ["the checkpoint step-000005 is another run's: it is put aside as step-000005.foreign"]
    prune_checkpoints(tmp_path, 1, run="own")
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-000003", "step-000005.foreign"}


def test_another_run_s_checkpoints_push_out_none_of_the_run(tmp_path: Path) -> None:
    save(tmp_path, 900, "other")
    for step in (1, 2):
        save(tmp_path, step, "own")
        prune_checkpoints(tmp_path, 1, run="own")
    assert [step_of(path) for path in checkpoints(tmp_path)] == [2, 900]


def as_before(checkpoint: Path) -> None:
    """Give a checkpoint a manifest as an earlier version wrote it, which names neither run nor step."""
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    seal = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps({"format": 1, "files": files, "seal": seal}, indent=1) + "\n")


def test_a_checkpoint_of_an_earlier_version_is_taken_by_the_step_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FILES, "training.json", b'{"step": 3}')
    for path in (save(tmp_path, 3), save(tmp_path, 5)):
        as_before(path)
    assert find_newest(tmp_path, run="own")[0] == checkpoint_path(tmp_path, 3)


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    begin_checkpoint(checkpoint_path(tmp_path, 6))
    prune_checkpoints(tmp_path, 2, also=[2])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002", "step-000004", "step-000005"]
    assert not checkpoint_path(tmp_path, 6).with_suffix(".partial").exists()


def test_what_is_put_aside_pushes_out_nothing_good(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in (2, 3):
        (checkpoint_path(tmp_path, step) / MANIFEST).unlink()
    find_newest(tmp_path)
    prune_checkpoints(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize("moment", ["flush", "rename"])
def test_a_kill_while_saving_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    older = save(tmp_path, 1)

    class Killed(BaseException):
        pass

    def die(*arguments: object) -> None:
        raise Killed

    if moment == "flush":
        monkeypatch.setattr(files, "fsync_path", die)
    else:
        monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(Killed):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert find_newest(tmp_path) == (older, [])
    assert find_corruption(save(tmp_path, 2)) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that a few checkpoints of the tiny model fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    options = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(disk)]
    if not mounted or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("needs to mount a small tmpfs, which only root may, outside most containers")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


SETTINGS = ["train.steps=9", "train.save_every=1", "train.keep_checkpoints=99", "method=lora", "method.r=4"]


def test_a_full_disk_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    config = make_material(tmp_path)
    settings = [f"runs={small_disk}", "name=full", *SETTINGS]
    with pytest.raises(
        UserError, match=r"no space is left on the disk.*\. The last good checkpoint is \S+step-00000\d$"
    ):
        train_run(config_module.read_config(config, settings))
    folder = small_disk / "full"
    there = checkpoints(folder)
    assert there
    assert [path for path in there if find_corruption(path)] == []
    assert list((folder / "checkpoints").glob("*.partial")) == []
    assert not (folder / "adapter").exists()

    # Once there is space, the same run goes on from there, as if there always had been.
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    train_run(config_module.read_config(config, settings), resume=True)
    whole = train_run(config_module.read_config(config, [*settings, f"runs={tmp_path}", "name=whole"]))
    assert logged(folder) == logged(whole)


WRITER = """
import sys
from pathlib import Path
from subspace.training.checkpoint import begin_checkpoint, checkpoint_path
target = checkpoint_path(Path(sys.argv[1]), 2)
folder = begin_checkpoint(target)
(folder / "training.json").write_bytes(bytes(5000))
"""


def test_a_file_that_the_system_refuses_is_an_error(tmp_path: Path) -> None:
    """With a limit on a file's size, which any user may set, in place of a full disk."""
    older = save(tmp_path, 1)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert "File too large" in done.stderr
    assert find_newest(tmp_path) == (older, [])

"""Malformed configurations, settings on the command line, engine files, hostfiles, and the environment of launchers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from subspace.adapters.registry import list_methods
from subspace.common.settings import SettingInfo
from subspace.config import METHOD, all_settings
from subspace.distributed.deepspeed_config import (
    check_by_deepspeed,
    compute_batch_layout,
    read_engine_file,
    resolve_deepspeed_config,
)
from tests.hostile.inputs import MORSELS, OTHERS, Case, Place, command, replaced, spoilt, written


def cases(rng: random.Random) -> Iterator[Case]:
    """Yield the cases of this module."""
    yield from _settings()
    yield from _yaml(rng)
    yield from _command_line()
    yield from _engines(rng)
    yield from _hostfiles(rng)
    yield from _environment()


def train(config: Path, *more: str) -> int:
    """Let ``train`` read a configuration, and all that stands in it, without starting."""
    return command("train", str(config), *more, "--dry-run")


# Settings of a wrong type, in the file and on the command line.


def _wrong(info: SettingInfo) -> Iterator[tuple[str, Any]]:
    """Yield values that are none of a setting."""
    names = {getattr(kind, "__name__", str(kind)) for kind in info.types} | {str(kind) for kind in info.types}
    listed, mapped = "list" in str(names), "dict" in str(names)
    for name, value in OTHERS.items():
        fits = {
            "true": bool in info.types,
            "number": bool({int, float} & {*info.types}) and not info.choices and info.min <= 3 <= info.max,
            "negative": bool({int, float} & {*info.types}) and info.min <= -7,
            "fraction": float in info.types and info.min <= 2.5 <= info.max,
            "huge": False,
            "word": (str in info.types or listed) and not info.choices,
            "list": False,
            "mapping": mapped,
            "nothing": type(None) in info.types,
            "nan": False,
            "infinity": False,
            "escape": False,
        }
        if not fits[name]:
            yield name, value


def _settings() -> Iterator[Case]:
    for setting, info in all_settings({METHOD: list_methods()["lora"]}).items():
        if setting == "published" or setting.startswith("method.patterns"):
            continue
        for name, value in _wrong(info):
            yield Case("setting", f"{setting} {name}", partial(_in_file, setting=setting, value=value))
            if (
                name in ("huge", "list", "negative", "mapping")
                and str not in info.types
                and "list" not in str(info.type)
            ):
                yield Case("override", f"{setting} {name}", partial(_typed, text=f"{setting}={json.dumps(value)}"))


def _in_file(place: Place, folder: Path, setting: str, value: Any) -> int:
    content = yaml.safe_load(place.config.read_text())
    section, _, key = setting.rpartition(".")
    (content.setdefault(section, {}) if section else content)[key] = value
    return train(written(folder / "run.yaml", yaml.safe_dump(content)))


def _typed(place: Place, folder: Path, text: str) -> int:
    return train(place.config, text)


# YAML.

DEEP = "a: " + "[" * 400 + "]" * 400
BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{name}: &{name} [{','.join([f'*{below}'] * 10)}]" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS = {
    "empty": "",
    "a list": "- 1\n- 2\n",
    "a word": "word",
    "NUL": "train: {steps: 3\0}\n",
    "escape": 'name: "\\e[31mred"\n',
    "deep": DEEP,
    "deeper": "[" * 60_000,
    "deep mappings": "\n".join(f"{' ' * depth}a:" for depth in range(300)),
    "bomb": BOMB,
    "recursion": "train: &t {steps: *t}\n",
    "own key": "&a ? *a : 1\n",
    "list as a key": "? [a, b]\n: 1\n",
    "mapping as a key": "{{a: 1}: 2}\n",
    "number as a key": "1: x\n",
    "on as a key": "on: x\n",
    "null as a key": "~: x\n",
    "twice": "train: {steps: 1, steps: 2}\n",
    "python": "train: !!python/object/apply:os.system ['touch CANARY']\n",
    "python name": "train: !!python/name:os.system\n",
    "python module": "!!python/object/new:subprocess.Popen [[touch, CANARY]]\n",
    "digits": f"train: {{seed: {'9' * 5000}}}\n",
    "hexadecimal": "train: {seed: 0x_}\n",
    "date": "train: {seed: 2025-02-31}\n",
    "binary": "train: {seed: !!binary '%%%'}\n",
    "set": "train: !!set {steps, seed}\n",
    "tag": "train: !!int abc\n",
    "unknown tag": "train: !steps 3\n",
    "merge of a number": "train: {<<: 3}\n",
    "two documents": "name: a\n---\nname: b\n",
    "version": "%YAML 9.9\n---\nname: a\n",
    "tab": "train:\n\tsteps: 3\n",
    "half a character": 'name: "\\ud800"\n',
    "large": "# " + "x" * (1 << 19) + "\n",
    "many keys": "train: {" + ", ".join(f"k{i}: 1" for i in range(60_000)) + "}\n",
    "unknown": "trainn: {steps: 3}\n",
    "unknown inside": "train: {stepps: 3}\n",
    "very long key": f"{'k' * 100_000}: 1\n",
    "section is a list": "train: [1]\n",
    "section is a number": "model: 3\n",
    "method is a number": "method: 3\n",
    "method is an empty list": "method: []\n",
    "method of numbers": "method: [1, 2]\n",
    "method of lists": "method: [[lora]]\n",
    "methods without names": "method: [{r: 3}]\n",
    "name goes up": "name: ../../x\n",
    "name is a path": "name: /tmp/x\n",
    "name is dots": "name: ..\n",
    "base is a number": "base: 3\n",
    "base is itself": "base: run.yaml\n",
    "base is a folder": "base: .\n",
    "base is nowhere": "base: nowhere.yaml\n",
    "base is a device": "base: /dev/zero\n",
    "engine is nowhere": "engine: nowhere.json\n",
    "engine is a folder": "engine: .\n",
    "engine is a device": "engine: /dev/zero\n",
    "patterns of numbers": "method: {name: lora, patterns: {a: 3}}\n",
    "pattern with an unknown setting": "method: {name: lora, patterns: {q_proj: {x: 3}}}\n",
    "method is code": "method: {name: x, file: evil.py}\nname: config\n",
    "date that is none": "data: {date: yesterday}\n",
}
BYTES = {
    "UTF-16": "train: {steps: 3}".encode("utf-16"),
    "Latin-1": "name: M\xfcnchen".encode("latin-1"),
    "random": bytes(range(256)),
    "gzip": b"\x1f\x8b\x08\0" + bytes(100),
}


def _yaml(rng: random.Random) -> Iterator[Case]:
    for name, text in TEXTS.items():
        yield Case("configuration", name, partial(_text, text=text))
    for name, data in BYTES.items():
        yield Case("configuration", name, partial(_text, text=data))
    yield Case("configuration", "a pipe", _pipe)
    yield Case("configuration", "a folder", lambda place, folder: train(folder))
    yield Case("configuration", "a name of 300 letters", lambda place, folder: train(folder / ("x" * 300)))
    for number in range(150):
        yield Case("configuration", f"spoilt {number}", partial(_spoilt, seed=rng.random()), refused=False)


def _text(place: Place, folder: Path, text: str | bytes) -> int:
    canary = str(place.canary)
    text = text.replace("CANARY", canary) if isinstance(text, str) else text
    # As in a run's folder, which somebody else may have made: no code of it is run.
    (folder / "checkpoints").mkdir()
    written(folder / "evil.py", f"open({canary!r}, 'w')\n")
    return train(written(folder / ("config.yaml" if "evil.py" in str(text) else "run.yaml"), text))


def _pipe(place: Place, folder: Path) -> int:
    import os

    os.mkfifo(folder / "run.yaml")
    return train(folder / "run.yaml")


def _spoilt(place: Place, folder: Path, seed: float) -> int:
    return train(written(folder / "run.yaml", spoilt(place.config.read_bytes(), random.Random(seed))))


# The command line.

ARGUMENTS: dict[str, list[str]] = {
    "no key": ["=3"],
    "no value": ["train.batch_size="],
    "nothing": [""],
    "no setting": ["steps"],
    "unknown": ["train.stepz=3"],
    "section": ["train=3"],
    "deeper": ["train.steps.more=3"],
    "dots": ["...=3"],
    "brackets": ["train.steps=" + "[" * 5000],
    "digits": ["train.steps=" + "9" * 6000],
    "long": ["train.steps=" + "x" * 300_000],
    "escape": ["train.steps=\x1b[31m"],
    "escape in the key": ["\x1b[31m=3"],
    "turned": ["train.\u202esteps=3"],
    "python": ["train.steps=!!python/object/apply:os.system [id]"],
    "bomb": [f"train.steps={BOMB}"],
    "method": ["method=nonsense"],
    "method with an escape": ["method=\x1b[31m"],
    "method goes up": ["method=../../x"],
    "method file": ["method=nowhere.py"],
    "method number": ["method.99.r=3"],
    "quantisation": ["model.quantize=5bit"],
    "processes": ["--processes", "0"],
    "negative processes": ["--processes", "-3"],
    "a million processes": ["--processes", "1000000"],
    "many digits of processes": ["--processes", "9" * 5000],
    "processes as a word": ["--processes", "many"],
    "hostfile": ["--hostfile", "nowhere"],
    "hostfile a folder": ["--hostfile", "."],
    "hostfile a device": ["--hostfile", "/dev/zero"],
    "option": ["--lr", "1"],
    "option with an escape": ["--\x1b[31m"],
    "long option": ["--" + "x" * 100_000],
    "engine a device": ["engine=/dev/zero"],
    "name": ["name=../x"],
    "many targets": ["targets=3"],
}


def _command_line() -> Iterator[Case]:
    for name, arguments in ARGUMENTS.items():
        yield Case("command line", name, partial(_arguments, arguments=arguments))
    for verb in ("recipes", "methods", "plan", "evaluate", "table", "compare", "merge", "data", "nonsense", "\x1b[31m"):
        for name, word in {"escape": "\x1b[31m", "long": "x" * 5000, "up": "../../nowhere"}.items():
            more = ["--out", "never"] if verb == "merge" else []
            yield Case("command line", f"{verb!r} {name}", partial(_verb, words=[verb, word, *more]))


def _arguments(place: Place, folder: Path, arguments: list[str]) -> int:
    return train(place.config, *arguments)


def _verb(place: Place, folder: Path, words: list[str]) -> int:
    return command(*words)


# Engine files.

ENGINE: dict[str, Any] = {
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": False},
    "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 100},
    "aio": {"block_size": "auto"},
}
WRONG_ENGINES: list[tuple[tuple[str, ...], list[Any]]] = [
    (("zero_optimization",), [3, "x", [], True]),
    (("zero_optimization", "stage"), ["1", 1.5, True, [], {}, None, 4, -1, 10**30]),
    (("zero_optimization", "offload_optimizer"), ["cpu", 3, [], True]),
    (("zero_optimization", "offload_optimizer", "device"), [3, [], {}, True]),
    (("zero_optimization", "reduce_bucket_size"), ["x", [], {}, None, float("nan"), float("inf")]),
    (("zero_optimization", "overlap_comm"), ["x", [], {}]),
    (("zero_optimization", "contiguous_gradients"), [[], {}, "x"]),
    (("zero_optimization", "sub_group_size"), ["x", [], {}]),
    (("zero_optimization", "no_such_key"), [1, "x"]),
    (("fp16",), [3, "x", [], None, True]),
    (("fp16", "enabled"), ["yes", 1, None, [], {}]),
    (("bf16",), [3, "x", [], None]),
    (("bf16", "enabled"), ["no", 0, None, [], {}]),
    (("aio",), [3, "x", []]),
    (("aio", "block_size"), ["x", 1.5, [], {}]),
    (("gradient_clipping",), ["x", [], {}, None, -1]),
    (("train_batch_size",), [7, "x", [], {}, None]),
    (("optimizer",), [{}, 3]),
    (("scheduler",), [{}, "x"]),
    (("name\x1b[31m", "x"), [{}]),
]
ENGINE_TEXTS = {
    "empty": "",
    "a list": "[]",
    "a word": '"x"',
    "nothing": "null",
    "cut": '{"zero_optimization": {"sta',
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 200 + "1" + "}" * 200,
    "twice": '{"aio": {}, "aio": {}}',
    "digits": '{"train_batch_size": ' + "9" * 5000 + "}",
    "half a character": '{"a": "\\ud800"}',
    "NUL": '{"a": "\\u0000"}',
    "escape": '{"\\u001b[31m": 1}',
    "comment": "{} // all",
    "control": '{"a": "\x01"}',
}


def check_engine(file: Path) -> int:
    """Read an engine file as a run does, up to what DeepSpeed itself says of it."""
    layout = compute_batch_layout(8, None, 1)
    read = resolve_deepspeed_config(read_engine_file(file), layout, dtype="float32", clip=1.0, source=str(file))
    check_by_deepspeed(read)
    return 0


def _engines(rng: random.Random) -> Iterator[Case]:
    for path, values in WRONG_ENGINES:
        for value in values:
            yield Case("engine", f"{'.'.join(path)!r} {str(value)[:20]}", partial(_engine, path=path, value=value))
    for name, text in ENGINE_TEXTS.items():
        yield Case("engine", name, partial(_engine_text, text=text))
    for number in range(60):
        yield Case("engine", f"spoilt {number}", partial(_engine_spoilt, seed=rng.random()), refused=False)


def _engine(place: Place, folder: Path, path: tuple[str, ...], value: Any) -> int:
    spoiled = replaced(ENGINE | ({path[0]: {}} if path[0] not in ENGINE else {}), path, value)
    return check_engine(written(folder / "e.json", json.dumps(spoiled)))


def _engine_text(place: Place, folder: Path, text: str) -> int:
    return train(place.config, f"engine={written(folder / 'e.json', text)}")


def _engine_spoilt(place: Place, folder: Path, seed: float) -> int:
    text = json.dumps(ENGINE, indent=1).encode()
    return train(place.config, f"engine={written(folder / 'e.json', spoilt(text, random.Random(seed)))}")


# Hostfiles.

HOSTS = {
    "empty": "",
    "comments": "# nothing\n",
    "no slots": "node1\n",
    "option": "-oProxyCommand=touch${IFS}CANARY slots=1\n",
    "option of ssh": "-lroot slots=1\n",
    "command": "$(touch${IFS}CANARY) slots=1\n",
    "backticks": "`touch${IFS}CANARY` slots=1\n",
    "semicolon": "node;touch slots=1\n",
    "comma": "a,b slots=1\n",
    "range": "node[1-99999999] slots=1\n",
    "pdsh's module": "exec:node slots=1\n",
    "per cent": "%h slots=1\n",
    "empty user": "@node slots=1\n",
    "slash": "../node slots=1\n",
    "escape": "node\x1b[31m slots=1\n",
    "no slots at all": "node slots=0\n",
    "negative": "node slots=-1\n",
    "fraction": "node slots=1.5\n",
    "words": "node slots=two\n",
    "huge": "node slots=99999999999999\n",
    "digits": f"node slots={'9' * 5000}\n",
    "other digits": "node slots=\u0663\n",
    "junk behind": "node slots=2abc\n",
    "twice": "node slots=1\nnode slots=1\n",
    "NUL": "no\0de slots=1\n",
    "large": "# x\n" * 400_000,
    "long": "n" * 200_000 + " slots=1\n",
}


def _hostfiles(rng: random.Random) -> Iterator[Case]:
    for name, text in HOSTS.items():
        yield Case("hostfile", name, partial(_hosts, text=text))
    yield Case("hostfile", "UTF-16", partial(_hosts, text="node slots=1".encode("utf-16")))
    for number in range(40):
        morsel = rng.choice(MORSELS)
        data = spoilt(b"node1 slots=2\nnode2 slots=2\n" + morsel + b" slots=1\n", rng)
        yield Case("hostfile", f"spoilt {number}", partial(_hosts, text=data), refused=False)


def _hosts(place: Place, folder: Path, text: str | bytes) -> int:
    text = text.replace("CANARY", str(place.canary)) if isinstance(text, str) else text
    return train(place.config, "--hostfile", str(written(folder / "hosts", text)))


# What a launcher says in the environment.

GOOD_LAUNCH = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
WRONG_LAUNCH = {
    "RANK": ["abc", "-1", "2", "99", "1.5", "", "0x0", " 1", "9" * 5000, "\u0663"],
    "WORLD_SIZE": ["abc", "0", "-1", "1e3", "", "9" * 30, "\x1b[31m", "None"],
    "LOCAL_RANK": ["abc", "-1", "2", "", "9" * 30],
    "LOCAL_SIZE": ["abc", "0", "-4", ""],
    "MASTER_PORT": ["abc", "-1", "0", "65536", "99999999", "", "80 80"],
    "MASTER_ADDR": ["a b", "$(id)", "-oX", "\x1b[31m", "x" * 300, "a/b", ""],
}


def _environment() -> Iterator[Case]:
    for name, values in WRONG_LAUNCH.items():
        for value in values:
            yield Case(
                "environment",
                f"{name}={value[:12]!r}",
                lambda place, folder: command("train", str(place.config)),
                environment={**GOOD_LAUNCH, name: value},
            )
    one = {key: GOOD_LAUNCH[key] for key in ("RANK", "WORLD_SIZE")}
    for verb in (["evaluate", "x"], ["doctor"], ["train", "x.yaml"]):
        yield Case(
            "environment", f"{verb[0]} without an address", partial(_verb, words=verb), environment={**one, "RANK": "7"}
        )
    for name, value in {"SUBSPACE_DATA": "/nowhere", "DS_ACCELERATOR": "abacus"}.items():
        where = partial(_verb, words=["data", "boolq"]) if name == "SUBSPACE_DATA" else _train_here
        yield Case("environment", f"{name}={value}", where, environment={name: value})
    for name, value in {"COLUMNS": "-5", "LINES": "abc", "SLURM_PROCID": "x", "RANK": "abc", "WORLD_SIZE": "x"}.items():
        yield Case(
            "environment",
            f"{name}={value} alone",
            lambda place, folder: command("table", str(place.scored)),
            refused=False,
            environment={name: value},
        )


def _train_here(place: Place, folder: Path) -> int:
    from subspace.distributed import launcher

    launcher.check_launch()
    return 0

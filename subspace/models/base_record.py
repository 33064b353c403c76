"""Which model a base is, by the bytes of its weights and tokenizer and by its configuration, wherever its files lie.

An adapter, a checkpoint, a score and a merged model keep the :class:`BaseRecord` of their base, and what is opened
beside them is compared with it. The weights' checksum is of every tensor's name, dtype, shape and SHA-256, so it does
not depend on how a checkpoint is cut into files.

Checksums of a file are kept in the cache, under what the system tells of it: path, size, inode, and times to the
nanosecond. The time of the last change of the inode is among them, which no program can set back. One process of a
machine computes them, with a thread for each core; the others wait for its file lock, outside any collective.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NotRequired

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from subspace.common import paths
from subspace.common.files import file_sha256, write_file
from subspace.common.foreign.text import checked, read_text
from subspace.common.hashing import hash_json
from subspace.common.locks import locked
from subspace.distributed.zero import is_sharded
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from subspace.models.files import MOST_FILE, ModelFiles, as_user_error, read_header, read_json
from subspace.models.lazy_safetensors import DTYPES
from subspace.models.prepare import find_files

#: Keys of a configuration that say how a model is stored, opened or asked, not what it computes.
VOLATILE = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id",
    "model_type", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "quantization_config",
    "return_dict", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
#: Settings of tokenizer_config.json that decide how a text is encoded.
TOKENIZER_SETTINGS = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "additional_special_tokens", "bos_token", "eos_token",
    "extra_special_tokens", "legacy", "pad_token", "unk_token",
)  # fmt: skip
BLOCK = 1 << 23  # bytes that are read at a time
#: Seconds within which a file may change again without its times showing it.
SETTLED = 2.0
LABELS = {dtype: label for label, dtype in DTYPES.items()}

#: Of each tensor, by its name: dtype, shape and SHA-256.
Tensors = dict[str, tuple[str, list[int], str]]
Stamp = list[Any]


@dataclass(frozen=True)
class BaseRecord:
    """A base model, as it is recorded beside what was made with it.

    Attributes:
        path: where it was opened from, for people.
        commit: the hub's commit, if it came from there.
        weights: SHA-256 of all tensors.
        layout: SHA-256 of the tensors' names, dtypes and shapes.
        tokenizer: SHA-256 of what decides how a text is encoded; None where there is no tokenizer.
        chat_template: SHA-256 of the tokenizer's chat template, None if it has none.
        config: the architecture's configuration, without what does not change what the model computes.
        in_memory: whether the tensors are those of a model that came from no files.
    """

    path: str
    commit: str | None
    weights: str
    layout: str
    tokenizer: str | None = None
    chat_template: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    in_memory: bool = False

    def __str__(self) -> str:
        return f"{self.path or 'a model in memory'}{f' at commit {self.commit[:12]}' if self.commit else ''}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as they are recorded."""
        return asdict(self)

    def short(self) -> dict[str, str]:
        """Return what identifies the base, without its configuration: for results."""
        plain = {key: value for key, value in self.as_dict().items() if key != "config" and isinstance(value, str)}
        return {key: value for key, value in plain.items() if value}


# Comparing.


class _Recorded(TypedDict):
    """What is read of a record."""

    path: str
    commit: str | None
    weights: str
    layout: str
    tokenizer: NotRequired[str | None]
    chat_template: NotRequired[str | None]
    config: NotRequired[dict[str, Any]]
    in_memory: NotRequired[bool]


def check_base(what: str, recorded: Mapping[str, Any] | None, here: BaseRecord | None, cure: str) -> str | None:
    """Return a notice if a base cannot be compared with the one on record, None if they are the same.

    Args:
        what: what was made with the recorded one, as ``the adapter in runs/a/adapter``.
        recorded: :meth:`BaseRecord.as_dict` of then; None for what an earlier version wrote.
        here: the base that is to be used.
        cure: what the user can do, besides opening the recorded one.

    Raises:
        UserError: it is another base. The message says in what.
    """
    if not recorded:
        return f"{what} is of a version that did not record its base: whether this is the same one is not known"
    if here is None:
        return f"{what} records its base, but where this model came from is not known: they were not compared"
    checked(recorded, _Recorded, what)
    before = BaseRecord(**{key: recorded[key] for key in BaseRecord.__dataclass_fields__ if key in recorded})
    differences = list(_differences(before, here))
    if differences:
        place = f" (model.path={before.path}{f' model.revision={before.commit}' if before.commit else ''})"
        raise UserError(
            f"{what} was made with {before}, and {here} is another base: {'; '.join(differences)}. "
            f"Open that one{place if before.path else ''}{cure}"
        )
    if not _comparable(before, here):
        return f"{what}: the tensors of its base are named or held otherwise in this model, so they were not compared"
    return None


def _comparable(before: BaseRecord, here: BaseRecord) -> bool:
    """Return True if two checksums of the weights can be compared: models in memory may have another dtype."""
    return before.layout == here.layout or not (before.in_memory or here.in_memory)


def _differences(before: BaseRecord, here: BaseRecord) -> Iterator[str]:
    comparable = _comparable(before, here)
    if comparable and before.weights != here.weights:
        kind = "weights" if before.layout == here.layout else "tensors' names, dtypes or shapes"
        at = f", at commit {here.commit[:12]}" if here.commit and here.commit != before.commit else ""
        yield f"its {kind} differ (SHA-256 {here.weights[:12]}{at}, recorded {before.weights[:12]})"
    if before.tokenizer and here.tokenizer and before.tokenizer != here.tokenizer:
        yield f"its tokenizer differs (SHA-256 {here.tokenizer[:12]}, recorded {before.tokenizer[:12]})"
    if comparable and (changed := list(_changed_keys(before.config, here.config))):
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        yield f"its configuration differs ({', '.join(changed[:3])}{more})"


def _changed_keys(before: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys that two configurations both have, with other values; other versions have other keys."""
    for key in sorted(before.keys() & here.keys() - VOLATILE):
        old, new = before[key], here[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changed_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} {new}, recorded {old}"


# Of a model's files.

_known: dict[str, tuple[Stamp, Any]] = {}


def identify(config: ModelConfig) -> BaseRecord:
    """Return the record of the model that these settings open. Every byte of its weights is read the first time."""
    files = find_files(config)
    files.check_weights()
    described = files.architecture(trust_remote_code=config.trust_remote_code)
    tensors: Tensors = {}
    for file in files.weight_files():
        tensors |= _stamped(file, _tensors)
    tokenizer, template = (hash_json(part) if part else None for part in _tokenizer(files))
    return BaseRecord(
        files.name, files.commit, *_checksums(tensors), tokenizer, template, plain_config(described.to_dict())
    )


def stamp(files: ModelFiles) -> list[Stamp]:
    """Return what the system tells of a model's weight files, which is other where one was written to."""
    return [_stamp(file) for file in files.weight_files()]


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model computes by, of its configuration: without where it lies and how it is stored or asked."""
    kept = {key: value for key, value in config.items() if key not in VOLATILE and not key.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return plain


def _checksums(tensors: Tensors) -> tuple[str, str]:
    """Return the checksums of all tensors, with and without their values."""
    listed = sorted([name, dtype, list(shape), checksum] for name, (dtype, shape, checksum) in tensors.items())
    return hash_json(listed), hash_json([entry[:3] for entry in listed])


def _tensors(file: Path) -> Tensors:
    if file.suffix == ".safetensors":
        tensors = read_header(file)
        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
            # The largest first, so that no thread is left alone with one at the end.
            order = sorted(tensors, key=lambda name: tensors[name].start - tensors[name].end)
            checksums = pool.map(lambda name: _hash_range(file, tensors[name].start, tensors[name].end), order)
            found = dict(zip(order, checksums, strict=True))
        return {name: (tensor.dtype, list(tensor.shape), found[name]) for name, tensor in tensors.items()}
    if file.suffix == ".bin":
        with as_user_error(f"cannot open {file}"):
            stored = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        return {name: _describe(tensor) for name, tensor in stored.items() if isinstance(tensor, Tensor)}
    return {file.suffix: ("file", [file.stat().st_size], file_sha256(file))}


def _hash_range(file: Path, start: int, end: int) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(min(BLOCK, max(1, end - start))))
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        while start < end:
            count = opened.readinto(block[: end - start])
            if not count:
                raise UserError(f"{file} was cut while it was read")
            digest.update(block[:count])
            start += count
    return digest.hexdigest()


def _describe(tensor: Tensor) -> tuple[str, list[int], str]:
    values = tensor.detach().cpu().contiguous()
    data: Any = values.reshape(-1).view(torch.uint8).numpy()
    return LABELS.get(tensor.dtype, str(tensor.dtype)), list(tensor.shape), hashlib.sha256(data).hexdigest()


def _tokenizer(files: ModelFiles) -> tuple[Any, Any]:
    """Return what decides how the tokenizer encodes a text, and its chat template, from the files alone.

    Their contents, not their bytes: another version of a library writes the same tokenizer with other spaces.
    """
    if files.gguf:
        return None, None  # in the file, whose checksum covers them
    settings = {
        **read_json(files.folder / "special_tokens_map.json"),
        **read_json(files.folder / "tokenizer_config.json"),
    }
    backend = read_json(files.folder / "tokenizer.json")
    state: dict[str, Any] = {key: backend[key] for key in backend.keys() - {"padding", "truncation", "version"}}
    for file in () if backend else files.tokenizer_files():
        state[file.name] = _stamped(file, file_sha256)
    if state:
        state["settings"] = {key: _content(settings[key]) for key in TOKENIZER_SETTINGS if settings.get(key)}
    template: Any = settings.get("chat_template")
    if (separate := files.folder / "chat_template.jinja").exists():
        template = read_text(separate, most=MOST_FILE)
    return state, template


def _content(token: Any) -> Any:
    """Return the text of a special token, which is written with its flags or without."""
    if isinstance(token, list):
        return [_content(each) for each in token]
    return token.get("content", token) if isinstance(token, Mapping) else token


# The cache.


def _stamp(file: Path) -> Stamp:
    about = file.stat()
    return [str(file.resolve()), about.st_size, about.st_ino, about.st_dev, about.st_mtime_ns, about.st_ctime_ns]


def _stamped(file: Path, compute: Any) -> Any:
    """Return what is computed from a file, from this process's memory or the cache if the file is as it was."""
    path, key = str(file.resolve()), _stamp(file)
    if (known := _known.get(path)) and known[0] == key:
        return known[1]
    entry = paths.cache_folder() / "checksums" / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.json"
    value = _cached(entry, key)
    if value is None:
        value = _computed(file, entry, key, compute)
    if _stamp(file) != key:
        raise UserError(f"{file} was written to while it was read. Start again when it is complete")
    _known[path] = key, value
    return value


def _cached(entry: Path, key: Stamp) -> Any:
    content = read_json(entry)
    return content.get("value") if content.get("file") == key else None


def _computed(file: Path, entry: Path, key: Stamp, compute: Any) -> Any:
    """Compute under the entry's lock and store the value; without either where the cache cannot be written."""
    began, value = time.time(), None
    with suppress(OSError, NotImplementedError), locked(entry):
        value = _cached(entry, key)
        if value is None:
            value = compute(file)
            # A file that changes twice within a clock's tick has the times of the first change.
            if max(key[-2:]) < (began - SETTLED) * 1e9:
                write_file(entry, json.dumps({"file": key, "value": value}))
    return compute(file) if value is None else value


# Of a model.


@dataclass
class _Origin:
    """Where a model's files are, as they were when it was opened, and their record once it was asked for."""

    config: ModelConfig
    stamps: list[Stamp]
    record: BaseRecord | None = None


_origins: weakref.WeakKeyDictionary[nn.Module, _Origin] = weakref.WeakKeyDictionary()
_in_memory: weakref.WeakKeyDictionary[nn.Module, BaseRecord] = weakref.WeakKeyDictionary()


def note_origin(model: nn.Module, config: ModelConfig, files: ModelFiles) -> None:
    """Remember which files a model was opened from. They are read for their checksums when a record is asked for."""
    _origins[model] = _Origin(config, stamp(files))


def note_base(model: nn.Module) -> None:
    """Remember a model's tensors before adapters change it, if it came from no files. Cheap for all others."""
    whole = not any(tensor.is_meta or is_sharded(tensor) for tensor in model.parameters())
    if model in _in_memory or not whole or _origin(model) is not None:
        return
    stored, buffers = model.state_dict(keep_vars=True), {name for name, _ in model.named_buffers()}
    tensors = {**dict(model.named_parameters()), **{name: stored[name] for name in stored.keys() & buffers}}
    checksums = _checksums({name: _describe(tensor) for name, tensor in tensors.items()})
    config: Any = getattr(model, "config", None)
    described = plain_config(config.to_dict()) if hasattr(config, "to_dict") else {}
    _in_memory[model] = BaseRecord("", None, *checksums, config=described, in_memory=True)


def note_copy(copy: nn.Module, model: nn.Module) -> None:
    """Remember of a copy what is known of its model's origin."""
    if model in _origins:
        _origins[copy] = _origins[model]
    if model in _in_memory:
        _in_memory[copy] = _in_memory[model]


def base_record(model: nn.Module) -> BaseRecord | None:
    """Return the record of the base that a model was opened from; None if where it came from is not known.

    Raises:
        UserError: its files are no longer those that it was opened from.
    """
    if (origin := _origin(model)) is None:
        return _in_memory.get(model)
    if origin.record is None:
        if stamp(find_files(origin.config)) != origin.stamps:
            raise UserError(
                f"the files of model {origin.config.path!r} were changed after it was opened, so what it was is not "
                "known. Open it again"
            )
        origin.record = identify(origin.config)
    return origin.record


def _origin(model: Any) -> _Origin | None:
    """Return where a model's files are: as noted, or where transformers says that it opened them."""
    if model in _origins:
        return _origins[model]
    path = str(getattr(model, "name_or_path", "") or "")
    if not path:
        return None
    commit = None if Path(path).exists() else getattr(model.config, "_commit_hash", None)
    try:
        opened = ModelConfig(path=path, revision=commit)
        files = find_files(opened)
        files.check_weights()
        files.architecture(trust_remote_code=False)
    except UserError:
        return None
    note_origin(model, opened, files)
    return _origins[model]

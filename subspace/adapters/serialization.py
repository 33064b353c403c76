"""Adapter files: what training leaves behind, in safetensors, with everything needed to put it into a fresh model.

A folder holds ``adapter.safetensors`` (every adapter's trained tensors and persistent buffers, by their names in the
model, float32) and ``adapter.json`` (method, settings and sites of each group, and the record of the base model,
:mod:`subspace.models.base_record`; of a method from outside the package, also where it came from). Nothing is pickled,
and nothing that stands there is run. ``adapter.json`` seals both: it has the SHA-256 of the tensors' file and of
itself, so that a flipped bit, a changed setting or another run's tensors are noticed. Files of earlier versions have no
seal.

Writing is collective, because under ZeRO-3 each rank holds a part; rank 0 writes, and what it wrote is read back and
compared before the call returns.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from subspace.adapters.inject import adapter_groups, adapters, assign_groups, inject
from subspace.adapters.registry import method_origin, resolve_recorded_method
from subspace.common.files import file_sha256, settle_folder, write_folder, write_json
from subspace.common.foreign.text import checked, open_regular, parse_json, read_bytes
from subspace.common.hashing import hash_json
from subspace.distributed.collectives import barrier, broadcast_object, is_main
from subspace.distributed.zero import full_shape, gather_copies
from subspace.errors import UserError, file_trouble
from subspace.models.base_record import BaseRecord, base_record, check_base, note_base

logger = logging.getLogger("subspace")

TENSORS = "adapter.safetensors"
SETTINGS = "adapter.json"
KEPT_IN = f"A run keeps its adapter in runs/NAME/adapter ({SETTINGS} and {TENSORS})"
FORMAT = 2
#: The first format whose ``adapter.json`` has checksums.
SEALED = 2
DTYPE = "F32"  # of every tensor in the file, as safetensors calls it


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], /, **about: Any) -> Path:
    """Write the model's adapters into a folder, whole or not at all; ``about`` goes into ``adapter.json``. Collective.

    Raises:
        UserError: a tensor that is not finite, or a disk that does not take the file. An older file in the folder
        stays as it was.
    """
    folder = Path(folder)
    tensors = gather_copies(named_tensors(model).items())
    problem = write_adapter(model, folder, tensors, about) if is_main() else None
    problem = broadcast_object(problem)
    barrier()
    if problem:
        raise UserError(problem)
    return folder


class _Part(TypedDict):
    method: str
    settings: dict[str, Any]
    sites: list[str]
    group: NotRequired[int]
    origin: NotRequired[dict[str, str]]


class _Description(TypedDict):
    """What an adapter's description is taken apart by."""

    adapters: list[_Part]
    about: NotRequired[dict[str, Any]]
    base: NotRequired[dict[str, Any] | None]


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, trained: bool = False, any_base: bool = False
) -> dict[str, Any]:
    """Inject the adapters that a folder describes into a fresh model, and fill them. Returns the file's description.

    Args:
        model: the base that the adapters were trained on, from whatever path.
        folder: the adapter's.
        trained: leave the adapters trainable; they are frozen otherwise.
        any_base: do not compare the model with the base on record, only names and shapes.

    Raises:
        UserError: no adapter there, one of another base, or one that does not fit the model.
    """
    folder = Path(folder)
    description, tensors = read_adapter(folder)
    checked(description, _Description, str(folder / SETTINGS))
    if not any_base:
        if not adapters(model):
            note_base(model)
        check_adapter_base(folder, description, base_record(model), " or load with any_base=True")
    for group in description["adapters"]:
        targets = [re.escape(site) for site in group["sites"]]
        try:
            method = resolve_recorded_method(group["method"], group.get("origin", {}))
            inject(model, method, method.settings_of_file(group["settings"]), targets=targets, start=False)
        except UserError as error:
            trained_on = description.get("about", {}).get("model", "another model")
            raise UserError(
                f"the adapter in {folder} (trained on {trained_on}) does not fit this model: {error}"
            ) from None
    parts = enumerate(description["adapters"])
    assign_groups(model, {site: part.get("group", number) for number, part in parts for site in part["sites"]})
    fill_adapters(model, tensors, folder, trained=trained)
    return description


def fill_adapters(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path, *, trained: bool = False) -> None:
    """Give a model's adapters the values of all of these tensors, by :func:`named_tensors`; freeze or train them.

    Raises:
        UserError: they are not the adapters' own, in names or shapes; ``folder`` is where they are from.
    """
    own = named_tensors(model)
    misfits = [f"{name} is missing from the file" for name in own.keys() - tensors.keys()]
    misfits += [f"{name} has no place in the model" for name in tensors.keys() - own.keys()]
    misfits += [
        f"{name} is {tuple(tensors[name].shape)}, the model takes {tuple(full_shape(own[name]))}"
        for name in own.keys() & tensors.keys()
        if tensors[name].shape != full_shape(own[name])
    ]
    if misfits:
        listed = "; ".join(sorted(misfits)[:3])
        raise UserError(f"the adapter in {folder} does not fit this model in {len(misfits)} tensors: {listed}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
            tensor.requires_grad_(trained and isinstance(tensor, nn.Parameter))


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an adapter folder's description and tensors, once every byte is as it was written.

    Raises:
        UserError: no adapter there, or a damaged one.
    """
    description = read_description(folder)
    with _damage_errors(folder):
        open_regular(folder / TENSORS).close()  # a pipe would be waited for
        sealed = description.get("tensors")
        if sealed is None:
            _note_unsealed(folder)
        elif file_sha256(folder / TENSORS) != sealed["sha256"]:
            raise _Damage(f"{TENSORS} is not what {SETTINGS} was written with: a checksum differs")
        with safe_open(folder / TENSORS, framework="pt") as stored:
            dtypes = {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118  (no mapping)
        if wrong := sorted(name for name, dtype in dtypes.items() if dtype != DTYPE):
            raise _Damage(f"{wrong[0]} is {dtypes[wrong[0]]}, but every tensor of an adapter is {DTYPE}")
        tensors = load_file(folder / TENSORS)
        if broken := sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()):
            raise _Damage(f"{broken[0]} is not finite")
        return description, tensors


def read_description(folder: Path) -> dict[str, Any]:
    """Return an adapter folder's description.

    Raises:
        UserError: there is none, or one that is damaged or of a newer version.
    """
    with _damage_errors(folder):
        with contextlib.suppress(OSError):
            settle_folder(folder)
        description = parse_json(read_bytes(folder / SETTINGS).decode(), str(folder / SETTINGS))
        if not isinstance(description, dict) or not isinstance(description.get("adapters"), list):
            raise _Damage(f"{SETTINGS} describes no adapters")
        number = description.get("format")
        if isinstance(number, int) and number > FORMAT:
            raise UserError(
                f"the adapter in {folder} has format {number}, which a newer version wrote; this one reads formats 1 "
                f"to {FORMAT}. Upgrade with: pip install --upgrade subspace"
            )
        if not isinstance(number, int) or not 1 <= number <= FORMAT:
            raise _Damage(f"{SETTINGS} has the format {number!r}")
        if number >= SEALED and description.get("seal") != _seal(description):
            raise _Damage(f"{SETTINGS} was changed after it was written: its checksum differs")
        return description


def _seal(description: Mapping[str, Any]) -> str:
    """Return the checksum of all that a description says, as it is read from a file."""
    return hash_json({key: value for key, value in description.items() if key != "seal"})


#: Adapters of earlier versions that the user has been told of.
_unsealed: set[Path] = set()


def _note_unsealed(folder: Path) -> None:
    if is_main() and folder not in _unsealed:
        _unsealed.add(folder)
        logger.warning("note: %s was saved by an earlier version, without checksums: damage may go unnoticed", folder)


class _Damage(Exception):
    """What is wrong with an adapter's files."""


@contextlib.contextmanager
def _damage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        theirs = (folder / "adapter_config.json").is_file()
        cure = f"It is HF PEFT's: `subspace import {folder}`, subspace.load_peft" if theirs else KEPT_IN
        raise UserError(
            f"no adapter in {folder}: {Path(str(error.filename or TENSORS)).name} is not there. {cure}"
        ) from None
    except (_Damage, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        if trouble := file_trouble(error):
            raise UserError(f"the adapter in {folder} cannot be read: {trouble}") from None
        raise UserError(f"the adapter in {folder} is damaged: {error}. Train again, or copy the file again") from None


def check_adapter_base(
    folder: Path, description: Mapping[str, Any] | None = None, base: BaseRecord | None = None, cure: str = ""
) -> None:
    """Raise UserError if an adapter's folder records another base than ``base``; log a note if they cannot be compared.

    Args:
        folder: the adapter's.
        description: what its ``adapter.json`` says; None reads it.
        base: the model that it is to be put into.
        cure: see :func:`subspace.models.base_record.check_base`.
    """
    description = read_description(folder) if description is None else description
    notice = check_base(f"the adapter in {folder}", description.get("base"), base, cure)
    if notice and is_main():
        logger.warning("note: %s", notice)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' tensors by their names in the model; one that two sites share, by its first name."""
    names: dict[Tensor, str] = {}
    for site, adapter in adapters(model).items():
        for name, tensor in adapter.own_tensors().items():
            names.setdefault(tensor, f"{site}.{name}")
    return {name: tensor for tensor, name in names.items()}


def _describe(model: nn.Module, base: BaseRecord | None, about: dict[str, Any]) -> dict[str, Any]:
    names = {id(adapter): site for site, adapter in adapters(model).items()}
    return {
        "format": FORMAT,
        "base": base and base.as_dict(),
        "about": about,
        "adapters": [
            {
                "method": group[0].name,
                "group": group[0].group,  # which share a schedule, though their settings differ by site
                "settings": asdict(config),
                **({"origin": origin} if (origin := method_origin(group[0].method_class)) else {}),
                "sites": [names[id(adapter)] for adapter in group if adapter.config == config],
            }
            for group in adapter_groups(model)
            for config in dict.fromkeys(adapter.config for adapter in group)
        ],
    }


def write_adapter(model: nn.Module, folder: Path, tensors: Mapping[str, Tensor], about: dict[str, Any]) -> str | None:
    """Write the folder, whole or not at all, and read the tensors back; return what went wrong. Not collective.

    Args:
        model: the one with the adapters.
        folder: to write.
        tensors: all of :func:`named_tensors`, whole.
        about: goes into ``adapter.json``.
    """
    try:
        base = base_record(model)
    except UserError as error:  # what was trained is worth more than the record
        logger.warning("note: %s is saved without a record of its base: %s", folder, error)
        base = None
    if not tensors:
        return f"nothing to save in {folder}: the model has no adapters"
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        return (
            f"the adapter was not saved in {folder}: {broken[0]} is not finite, in all {len(broken)} of {len(tensors)}"
        )
    float32 = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    try:
        if others := _others(folder):
            return f"the adapter was not saved in {folder}, because it would replace {others[0]}. Give a new folder"
        with write_folder(folder) as work:
            save_file(float32, work / TENSORS, metadata={"format": "pt"})
            if different := _differing(work / TENSORS, float32):
                raise OSError(errno.EIO, f"it reads back differently ({different[0]}); is the disk sound?")
            sealed = {"tensors": {"sha256": file_sha256(work / TENSORS), "dtype": DTYPE, "count": len(float32)}}
            # The checksum is of what a reader finds, where numbers and paths have become JSON's.
            description = json.loads(json.dumps({**_describe(model, base, about), **sealed}, default=str))
            write_json(work / SETTINGS, {**description, "seal": _seal(description)})
    except OSError as error:
        trouble = file_trouble(error)
        return f"the adapter could not be saved in {folder}: {trouble or error}"
    return None


def _others(folder: Path) -> list[str]:
    """Return the names of what lies in a folder and belongs to no adapter, unless an adapter lies there too."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return [] if SETTINGS in names else sorted(names)


def _differing(file: Path, expected: dict[str, Tensor]) -> list[str]:
    with safe_open(file, framework="pt") as stored:
        if set(stored.keys()) != set(expected):
            return sorted(set(stored.keys()) ^ set(expected))
        return [name for name, tensor in expected.items() if not torch.equal(stored.get_tensor(name), tensor)]

"""A training that begins with the values of adapters that were trained before."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from subspace.adapters.inject import adapters
from subspace.adapters.registry import resolve_recorded_method
from subspace.adapters.serialization import TENSORS, check_adapter_base, fill_adapters, read_adapter
from subspace.common.files import file_sha256
from subspace.errors import UserError
from subspace.models.base_record import BaseRecord
from subspace.training.checkpoint import own_adapter


def start_adapters(model: nn.Module, path: str | os.PathLike[str], base: BaseRecord | None) -> list[str]:
    """Give a model's new adapters the values of saved ones, to be trained further; return notices for the user.

    Args:
        model: with adapters of the same methods and sizes, at the same sites.
        path: a run's folder, or an adapter's.
        base: the record of the model.

    Raises:
        UserError: no such adapters, ones of another base, or ones that differ in more than what training may change.
    """
    folder = Path(path).expanduser()
    folder = own_adapter(folder) if (folder / "config.yaml").is_file() else folder
    asked = f"train.start_from={path}"
    description, tensors = read_adapter(folder)
    check_adapter_base(folder, description, base)
    saved = {site: part for part in description["adapters"] for site in part["sites"]}
    own = adapters(model)
    if saved.keys() != own.keys():
        alone = sorted(saved.keys() ^ own.keys())
        raise UserError(
            f"{asked}: its adapters are at {len(saved)} sites and this run's at {len(own)}; {alone[0]} is in one "
            "alone. Give both the same targets"
        )
    changed: dict[str, str] = {}
    for site, adapter in own.items():
        part = saved[site]
        if adapter.name != part["method"]:
            raise UserError(f"{asked}: at {site} its method is {part['method']}, and this run's {adapter.name}")
        if adapter.delayed_grad_params:
            raise UserError(
                f"{asked}: {adapter.name} has launched there, and would choose its directions anew. Merge that run, "
                "and train on the merged model"
            )
        method = resolve_recorded_method(part["method"], part.get("origin", {}))
        now, before = asdict(adapter.config), {**asdict(method.Config()), **method.settings_of_file(part["settings"])}
        changed |= {
            key: f"{key} was {_said(before[key])} and is {_said(value)}"
            for key, value in now.items()
            if before.get(key) != value and key in before
        }
    fill_adapters(model, tensors, folder, trained=True)
    notices = [
        f"begins with the adapter in {folder} (SHA-256 {file_sha256(folder / TENSORS)[:12]}); what that was trained on "
        "is not compared with the suites"
    ]
    if changed:
        notices.append(f"other settings than that adapter was trained with: {'; '.join(changed.values())}")
    return notices


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

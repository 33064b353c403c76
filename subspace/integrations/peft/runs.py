"""A run's folder made of an adapter of HF PEFT, and a folder of PEFT's made of a run.

Neither needs the weights of the base model: a shape and the adapters' own tensors are enough. An imported run is
scored, compared and merged as any other. What it was trained on is not known, unless ``data.mixture`` says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from subspace import __version__
from subspace.adapters.exchange.model_card import HUB_ID, adapter_facts, base_name
from subspace.adapters.inject import adapters
from subspace.adapters.parameter_count import count_adapters
from subspace.adapters.serialization import check_adapter_base, load_adapter, read_adapter, write_adapter
from subspace.common.declarations import write_yaml
from subspace.common.download import hub_model
from subspace.common.files import write_folder, write_json
from subspace.common.locks import in_use
from subspace.config import RunConfig, read_defaults, read_run_subject
from subspace.errors import UserError
from subspace.integrations.peft.reading import ANYWHERE, CONFIG, PeftAdapter, put_adapters, read_peft
from subspace.integrations.peft.writing import export_peft, short_targets
from subspace.models.base_record import identify, note_origin
from subspace.models.loading import open_model, open_shape
from subspace.models.prepare import find_files
from subspace.resolve import with_absolute_paths
from subspace.resumption import new_run_id
from subspace.training.checkpoint import ADAPTER, ENVIRONMENT_FILE

logger = logging.getLogger(__name__)


#: How the settings begin that an import takes.
OWN_SETTINGS = ("name=", "runs=", "model.", "data.", "evaluate.")


class Imported(NamedTuple):
    """What was made of an adapter of PEFT's."""

    folder: str
    base: str
    methods: list[str]
    sites: int
    trained: int

    def __str__(self) -> str:
        return (
            f"{', '.join(self.methods)} on {self.base}: {self.trained:,} trained numbers at {self.sites} sites\n"
            f"imported: {self.folder}"
        )


def import_run(source: str, overrides: Sequence[str] = ()) -> Imported:
    """Make a run's folder of an adapter that HF PEFT saved. It appears whole or not at all.

    Args:
        source: a folder, or a name on the hub: ``ORGANIZATION/NAME``, also with ``@REVISION``.
        overrides: ``key=value``: of ``name``, ``model``, ``evaluate``, or ``data.mixture``.

    Raises:
        UserError: no such adapter, one without an equal here, or one that does not fit its base.
    """
    read = read_peft(_find(source))
    config = _run_config(read, source, overrides)
    folder = config.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already. Give the run another name (name=...), or remove that folder")
    try:
        base = identify(config.model)
    except UserError as error:
        named = f"its {CONFIG} names {read.base}" if config.model.path == read.base else "as asked for"
        raise UserError(f"the base of {source} ({named}): {error}. Another place: model.path=NAME") from None
    shape: Any = open_shape(replace(config.model, quantize="none"))
    note_origin(shape, config.model, find_files(config.model))
    created, tensors = put_adapters(shape, read)
    trained, run = count_adapters(created.values()), new_run_id()
    about = {"model": config.model.path, "run": run, "imported": source}
    with in_use(folder.with_name(f".{folder.name}.importing")), write_folder(folder, replace=False) as work:
        if problem := write_adapter(shape, work / ADAPTER, tensors, about):
            raise UserError(problem)
        write_yaml(work / "config.yaml", _values(config, read, shape, overrides))
        facts = {"methods": [part.method for part in read.parts], "sites": list(created), "trained": trained}
        write_json(work / ENVIRONMENT_FILE, {"run": run, "imported": _origin(read, source), "adapters": facts})
    read_run_subject(folder)
    methods = sorted({part.method for part in read.parts})
    return Imported(str(folder), base.path, methods, len(created), trained)


def _find(source: str) -> Path:
    """Return the folder of an adapter, which is brought from the hub if it is there."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    name, _, revision = source.partition("@")
    if not HUB_ID.fullmatch(name):
        raise UserError(f"there is no folder '{source}', and no name on the hub is written so (ORGANIZATION/NAME)")
    return hub_model(name, revision or None)


def _run_config(read: PeftAdapter, source: str, overrides: Sequence[str]) -> RunConfig:
    for override in overrides:
        if not override.startswith(OWN_SETTINGS):
            raise UserError(
                f"'{override}': an import takes name, runs, model, data and evaluate; the adapter has the rest"
            )
    path = Path(source).expanduser()
    name = path.resolve().name if path.exists() else source
    name = re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "imported"
    if read.base is None and not any(override.startswith("model.path=") for override in overrides):
        raise UserError(f"{read.folder / CONFIG} names no base model. Say which it is: model.path=NAME")
    return read_defaults(name, "model.path", read.base or "", overrides)


def _values(config: RunConfig, read: PeftAdapter, shape: nn.Module, overrides: Sequence[str]) -> dict[str, Any]:
    """Return what stands in the run's ``config.yaml``: nothing that is not known of it."""
    config = with_absolute_paths(config)
    entries = [
        {
            "name": part.method,
            **part.settings,
            "targets": None if ANYWHERE in part.sites else short_targets(shape, list(part.sites)),
        }
        for part in read.parts
    ]
    method: dict[str, Any] = {"method": entries}
    if len(entries) == 1:
        method = {"method": entries[0], "targets": entries[0].pop("targets")}
    known = any(override.startswith("data.") for override in overrides)
    return {
        "name": config.name,
        "model": asdict(config.model),
        **method,
        "data": asdict(config.data) if known else {"mixture": ""},
        "evaluate": asdict(config.evaluate),
    }


def _origin(read: PeftAdapter, source: str) -> dict[str, Any]:
    config = read.config
    return {
        "from": source,
        "format": f"HF PEFT {config.get('peft_version') or ''}".strip(),
        "type": config.get("peft_type"),
        "base": read.base,
    }


# Out.


def export_run(
    run: Path, out: Path, *, base: str | None = None, dtype: str = "float32", overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Write a run's adapter as a folder of HF PEFT's, with a model card; return its configuration.

    Args:
        run: the run's folder.
        out: the folder to write; it must not exist, or be empty.
        base: what to call the base model; default: its name on the hub, or its folder's.
        dtype: of the tensors.
        overrides: settings instead of the run's.

    Raises:
        UserError: a method that has no equal in PEFT, or another base than the run's.
    """
    subject = read_run_subject(run, overrides)
    assert subject.adapter
    with in_use(run, reads=True):
        files, record = find_files(subject.model), identify(subject.model)
        check_adapter_base(subject.adapter, base=record)
        model: Any
        if subject.model.trust_remote_code:  # foreign code may not bear a model without values
            model = open_model(subject.model)
            load_adapter(model, subject.adapter)
        else:
            model = open_shape(replace(subject.model, quantize="none"))
            load_adapter(model, subject.adapter, any_base=True)
            _give_values(model, read_adapter(subject.adapter)[1])
        named = base or base_name(subject.model.path, files)
        about = {**adapter_facts(subject.adapter), "name": out.name, "base": named, "weights": record.weights}
        if not base and not HUB_ID.fullmatch(named):
            logger.warning(
                "note: the base has no name on the hub, so the adapter says %s, by which others may not find it: "
                "--base ORGANIZATION/NAME", named,
            )  # fmt: skip
        revision = files.commit if named == base_name(subject.model.path, files) else None
        return export_peft(
            model, out, base=named, revision=revision, dtype=getattr(torch, dtype),
            card=lambda config: _card(config, about),
        )  # fmt: skip


def _give_values(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put an adapter's tensors in the places of those of a model without values."""
    given: dict[Tensor, Tensor] = {}  # of a tensor that several sites share, once
    for site, adapter in adapters(model).items():
        for name, empty in adapter.own_tensors().items():
            if empty not in given:
                value = tensors[f"{site}.{name}"]
                given[empty] = nn.Parameter(value) if isinstance(empty, nn.Parameter) else value
            setattr(adapter, name, given[empty])


def _card(config: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    base = str(about["base"])
    header = ["library_name: peft", "pipeline_tag: text-generation", "tags:", "- subspace"]
    if HUB_ID.fullmatch(base):
        header = [f"base_model: {base}", *header]
    rows = [
        f"| {m['method']} | {m['sites']} | {', '.join(f'{key} {value}' for key, value in m['settings'].items())} |"
        for m in about["methods"]
    ]
    lines = [
        "---", *header, "---", "", f"# {about['name']}", "",
        f"An adapter of `{base}`, trained and written for HF PEFT (type {config['peft_type']}) by `subspace export`, "
        f"version {__version__}. It computes what it was trained to, up to rounding.", "",
        "| method | sites | settings |", "| :--- | ---: | :--- |", *rows, "",
        "```python", "from peft import AutoPeftModelForCausalLM", "",
        'model = AutoPeftModelForCausalLM.from_pretrained("THIS FOLDER")', "```", "",
        f"- Base: SHA-256 of its weights `{about['weights']}`",
        f"- Adapter: `{about['adapter']}`, SHA-256 `{about['adapter_sha256']}`",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"

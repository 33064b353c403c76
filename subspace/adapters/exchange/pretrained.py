"""``save_pretrained`` and ``load_state_dict`` of a model with adapters: what is saved loads right, or is refused.

A transformers model writes all of its tensors under the names of the moment, and ``from_pretrained`` draws at random
what it does not find: an adapted linear layer's weight is called ``q_proj.base.weight`` and would be drawn. So a model
with adapters writes them alone, as :func:`subspace.save_adapter` does, and a copy under the names of its
``state_dict``, with what schedules remember, in ``model.safetensors``. That is the file which HF Trainer goes on from
and takes the best model from; loading it leaves the frozen tensors as they are. Without a ``config.json`` beside it,
``from_pretrained`` does not take the folder for a model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from subspace.adapters.base import HISTORY, Adapter
from subspace.common.files import temporary_folder, write_file
from subspace.distributed.zero import is_sharded
from subspace.errors import UserError

WEIGHTS = "model.safetensors"
#: The attribute of a model that says that it was prepared. It is the model's, so that a copy of the model has it.
_PREPARED = "_subspace_prepared_to_save"


def prepare_saving(model: Any) -> None:
    """Let a model save and load with adapters in it, by the methods that it has; called before the first are injected.

    What is attached to the model stays when they are merged or removed, and does nothing then.
    """
    if hasattr(model, _PREPARED):
        return
    setattr(model, _PREPARED, True)
    model.register_load_state_dict_post_hook(_allow_missing_base)
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = SavePretrained(model)


class SavePretrained:
    """The ``save_pretrained`` of one model. An object and no closure, so that the model can be copied and pickled."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write the model as its class does, or where it has adapters, those. Arguments as in transformers.

        Raises:
            UserError: what would be written could not be loaded as it was.
        """
        model = self.model
        if not own_tensors(model):
            _check_plain(model, save_directory)
            given = {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub}
            type(model).save_pretrained(model, save_directory, **given, **options)
        elif push_to_hub:
            raise UserError(
                f"cannot push {save_directory} to the hub: the model's adapters are not merged, and the hub's readers "
                "would not know them. Merge them first (subspace.merge, `subspace merge`), or push without adapters"
            )
        elif is_main_process:
            save_adapters(model, Path(save_directory), state_dict)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what adapters add to a model's ``state_dict``, by its names there; of a tensor that two share, the first.

    That is their trained tensors, their persistent buffers, and what schedules remember.
    """
    names: dict[Tensor, str] = {}
    for site, module in model.named_modules():
        if isinstance(module, Adapter):
            remembered = {f"{HISTORY}{key}": value for key, value in module.history.items()}
            for name, tensor in {**module.own_tensors(), **remembered}.items():
                names.setdefault(tensor, f"{site}.{name}")
    return {name: tensor for tensor, name in names.items()}


def save_adapters(model: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a model's adapters into a folder, beside what else lies there. Not collective.

    Args:
        model: the one with the adapters.
        folder: gets ``adapter.json``, ``adapter.safetensors`` and ``model.safetensors``, each whole or not at all.
        state: what to take the tensors' values from, by their names in ``state_dict``; None for the model's own.
    """
    from subspace.adapters.serialization import named_tensors, write_adapter

    own = own_tensors(model)
    _check_savable(model, folder, own)
    if state is None and any(is_sharded(tensor) for tensor in own.values()):
        raise UserError(
            f"cannot save the adapters in {folder}: ZeRO-3 holds them in parts. Call subspace.save_adapter on all "
            "processes, or give this call a state_dict of whole tensors"
        )
    taken: Mapping[str, Tensor] = own if state is None else state
    if absent := own.keys() - taken.keys():
        raise UserError(
            f"cannot save the adapters in {folder}: the state_dict lacks {sorted(absent)[0]}, in all {len(absent)} of "
            f"their {len(own)} tensors. Give the whole model's, under its own names"
        )
    values = {name: taken[name].detach().cpu().contiguous() for name in own}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder / "adapter") as work:
            written = work / "adapter"
            problem = write_adapter(model, written, {name: values[name] for name in named_tensors(model)}, {})
            if problem:
                raise UserError(problem)
            for file in sorted(written.iterdir()):
                write_file(folder / file.name, partial(shutil.copyfile, file))
        write_file(folder / WEIGHTS, partial(save_file, values, metadata={"format": "pt"}))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the adapters could not be saved in {folder}: {reason}. Free some space") from error


def _check_savable(model: nn.Module, folder: Path, own: Mapping[str, Tensor]) -> None:
    if (folder / "config.json").exists():
        raise UserError(
            f"cannot save the adapters in {folder}: it holds a model, whose {WEIGHTS} they would replace. Give another "
            "folder"
        )
    tensors = {id(tensor) for tensor in own.values()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in tensors]
    if others:
        raise UserError(
            f"cannot save the model in {folder}: {others[0]} is trained and belongs to no adapter (in all "
            f"{len(others)} tensors), and would be lost. Freeze it, train it by method full, or save model.state_dict()"
        )


def _check_plain(model: Any, folder: str | os.PathLike[str]) -> None:
    """Raise UserError if merging gave a model biases that a reader of its configuration would drop."""
    with torch.device("meta"):
        announced = {name for name, _ in type(model)(deepcopy(model.config)).named_parameters()}
    extra = [name for name, _ in model.named_parameters() if name.endswith(".bias") and name not in announced]
    if extra:
        raise UserError(
            f"cannot save the merged model in {folder}: merging created {extra[0]} (in all {len(extra)} biases), which "
            f"a {type(model).__name__} with this configuration does not read. `subspace merge RUN --out DIR` makes "
            "room for them"
        )


def _allow_missing_base(model: nn.Module, keys: Any) -> None:
    """Let a load of exactly the adapters' tensors pass as complete: the frozen ones stay as they are."""
    if not keys.missing_keys:
        return
    missing, own = set(keys.missing_keys), own_tensors(model).keys()
    frozen = {name for name, _ in model.named_parameters()} - own
    if own and frozen <= missing and not missing & own:
        keys.missing_keys.clear()

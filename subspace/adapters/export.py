"""Fold adapters into the weights that they wrap: in memory, and as a plain HF folder that is proved before it exists.

A method is merged by its own equation, in float32: ``adapter.merged()`` tells what replaces the frozen tensors.
A folder is put in place only after its model gave the same logits as the unmerged one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from subspace.adapter_file import load_adapter
from subspace.base import storage
from subspace.errors import UserError
from subspace.inject import adapters
from subspace.method import Adapter
from subspace.model import ModelConfig, open_model, open_tokenizer
from subspace.model_files import quiet
from subspace.sites import names_of
from subspace.zero import is_sharded

TOLERANCE = 1e-3  # of the largest logit; float32 gives about 1e-5, a wrong merge gives about 1

PROBE = (
    "The capital of France is Paris, and the river in it is the Seine. People have lived there for a long time.",
    "To remove a stain from a carpet, dry it with a towel; then use 2 cups of water, soap, and a little patience.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. Answer:",
)


@dataclass(frozen=True)
class Replaced:
    """What a merge took out of the model at one site."""

    adapter: Adapter
    held: dict[str, nn.Parameter | None]  # the module's own parameters, by their names in it

    def changes(self) -> Iterator[tuple[str, Tensor | None, Tensor]]:
        """Tell the name, the frozen value, None for what the merge created, and the merged one of each tensor."""
        for name, held in self.held.items():
            merged = getattr(self.adapter.base, name)
            if merged is not None:
                yield name, self.adapter.aside.get(name, held), merged


def merge(model: nn.Module) -> None:
    """Replace every adapter by the plain layer that computes the same. ``unmerge`` undoes it.

    Raises:
        UserError: no adapters, a method that cannot be merged, or weights that are quantised or spread over processes.
            The model is then as before.
    """
    found = adapters(model)
    if not found:
        raise UserError("cannot merge: the model has no adapters (it may be merged already)")
    for site, adapter in found.items():
        _check_mergeable(site, adapter)

    replaced: dict[str, Replaced] = {}
    shared: dict[nn.Parameter, nn.Parameter] = {}
    for site, adapter in found.items():
        layer: Any = adapter.base
        merged = _merged(adapter)
        held = {name: getattr(layer, name) for name in merged}
        replaced[site] = Replaced(adapter, held)
        for name, value in merged.items():
            like = adapter.aside.get(name, held[name])
            # New parameters, not new values: the old ones are kept as they are, bit for bit, and may be shared.
            new = None if value is None else _frozen(value, like=held["weight"] if like is None else like)
            if new is not None and isinstance(value, nn.Parameter):  # a trained tensor itself: other sites may have it
                new = shared.setdefault(value, new)
            setattr(layer, name, new)
        model.set_submodule(site, layer)
    if model.config.tie_word_embeddings and not _shares(model):  # type: ignore[union-attr]
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    model.merged = replaced  # type: ignore[assignment]


def unmerge(model: nn.Module) -> None:
    """Put the adapters and the frozen weights back that ``merge`` replaced: the very same tensors."""
    replaced: dict[str, Replaced] | None = getattr(model, "merged", None)
    if replaced is None:
        raise UserError("cannot unmerge: the model is not merged")
    if adapters(model):
        raise UserError("cannot unmerge: adapters were injected after the merge. Merge those first, or save them")
    for site, old in replaced.items():
        layer: Any = old.adapter.base
        for name, held in old.held.items():
            setattr(layer, name, held)
        model.set_submodule(site, old.adapter)
    if _shares(model):
        model.config.tie_word_embeddings = True  # type: ignore[union-attr]
    del model.merged


@dataclass(frozen=True)
class MergeReport:
    """What a merged folder was proved by. Differences are the largest of any logit, relative to the largest logit."""

    layers: int
    dtype: str
    update: float  # ||W' - W|| / ||W||
    rounding: float  # ||round(W') - W'|| / ||W' - W||, from writing the weights in ``dtype``
    merged_difference: float  # merged against unmerged, in float32
    written_difference: float  # the written folder against unmerged: what the rounding costs
    same_tokens: float  # share of the probe's positions where the written folder prefers the same next token

    def __str__(self) -> str:
        advice = ". Write float32 to keep more" if self.rounding > 0.1 else ""
        return (
            f"{self.layers} layers merged. The update is {self.update:.2e} of the weights' norm; {self.dtype} rounds "
            f"away {self.rounding:.1%} of it{advice}.\nLargest difference of a logit from the unmerged model, relative "
            f"to the largest: {self.merged_difference:.1e} merged, {self.written_difference:.1e} as written "
            f"({self.same_tokens:.1%} of next tokens equal)."
        )


def merged_folder(
    config: ModelConfig,
    adapter: Path,
    out: Path,
    *,
    dtype: str | None = None,
    as_trained: bool = False,
    tolerance: float = TOLERANCE,
) -> MergeReport:
    """Write base model and adapter as one ordinary HF folder, after proving its logits against the unmerged model.

    All is computed in float32. The folder appears whole or not at all.

    Args:
        config: the base model.
        adapter: the folder of the adapter's file.
        out: the folder to write; it must not exist, or be empty.
        dtype: what to write: ``float32``, ``bfloat16`` or ``float16``; default: the dtype of ``config``.
        as_trained: for a quantised base, merge into its weights as they dequantise, which are those that the adapter
            was trained with; else into the original ones.
        tolerance: the largest difference of a logit that is let through, relative to the largest logit.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"cannot write the merged model to {out}: it exists. Give another folder, or remove it")
    attention = "sdpa" if config.attention == "flash_attention_2" else config.attention
    exact = replace(config, dtype="float32", quantize="none", attention=attention, gradient_checkpointing=False)
    written = replace(config, dtype=dtype or config.dtype).dtype

    tokenizer = open_tokenizer(exact)
    model = open_model(replace(exact, quantize=config.quantize if as_trained else "none"))
    if getattr(model, "is_quantized", False):  # also where the base's own files are
        with quiet():
            model = model.dequantize(dtype=torch.float32).requires_grad_(False)  # type: ignore[no-untyped-call]
    load_adapter(model, adapter)
    probe = _probe(tokenizer).to(model.device)
    unmerged = _logits(model, probe)
    merge(model)
    difference = _difference(_logits(model, probe), unmerged)
    if not difference <= tolerance:  # also where it is not a number
        other = config.quantize != "none" and not as_trained
        cure = f"Merge into the {config.quantize} weights as trained, or evaluate" if other else "Evaluate"
        raise UserError(
            f"the merged model of {adapter} was not written: its logits differ from the unmerged model's by "
            f"{difference:.1e} of the largest, and {tolerance:.0e} is allowed. {cure} the adapter unmerged"
        )
    update, rounding = _sizes(model, getattr(torch, written))
    layers = len(model.merged)  # type: ignore[arg-type]
    _make_room_for_biases(model)
    del model.merged
    for name, parameter in model.named_parameters():  # not buffers: files have none, and rotary angles need all digits
        parameter.data = parameter.data.to(getattr(torch, written))
        if not torch.isfinite(parameter).all():
            raise UserError(f"the merged model was not written: {name} is beyond {written}. Write bfloat16 or float32")

    partial = out.with_name(f"{out.name}.partial")
    with _whole_or_not(partial, out):
        with quiet():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        rounded = _logits(model.float(), probe)  # type: ignore[no-untyped-call]
        del model
        after = _logits(open_model(replace(exact, path=str(partial))), probe)
        if not _difference(after, rounded) <= tolerance:
            raise UserError(
                f"the merged model was not written to {out}: its files read back as another model. Is the disk sound?"
            )
        report = MergeReport(
            layers=layers,
            dtype=written,
            update=update,
            rounding=rounding,
            merged_difference=difference,
            written_difference=_difference(after, unmerged),
            same_tokens=float((after.argmax(-1) == unmerged.argmax(-1)).float().mean()),
        )
        about = {"base": config.path, "adapter": str(adapter), **asdict(report)}
        (partial / "merge.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return report


def _shares(model: nn.Module) -> bool:
    """Tell whether modules share a parameter, as embedding and head of a model that ties them do."""
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return any(count > 1 for count in users.values())


def _check_mergeable(site: str, adapter: Adapter) -> None:
    if not adapter.mergeable:
        raise UserError(
            f"cannot merge {adapter.name}: what it does at {site} is not what a linear layer can do. "
            "Evaluate it unmerged: `subspace evaluate RUN` needs no merged model"
        )
    layer: Any = adapter.base
    if hasattr(layer, "weight") and storage(layer) != "plain":
        raise UserError(
            f"cannot merge {adapter.name} into the {storage(layer)} layer {site}: the result would be rounded to "
            f"{storage(layer)} again. Open the base with `quantize: none`, as `subspace merge RUN --out DIR` does"
        )
    if any(is_sharded(parameter) for parameter in (*layer.parameters(), *adapter.trained().values())):
        raise UserError(
            f"cannot merge {adapter.name} at {site}: ZeRO-3 holds the weights in parts. Save the adapter and merge the "
            "file: `subspace merge RUN --out DIR`"
        )


@torch.no_grad()
def _merged(adapter: Adapter) -> dict[str, Tensor | None]:
    """Return the tensors that replace the frozen ones, in float32."""
    own = adapter.own_tensors().values()
    kept = [tensor.data for tensor in own]
    try:
        for tensor in own:  # an engine may have made them bfloat16
            tensor.data = tensor.data.float()
        return adapter.merged()
    finally:
        for tensor, data in zip(own, kept, strict=True):
            tensor.data = data


def _frozen(value: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype).contiguous(), requires_grad=False)


def _probe(tokenizer: Any) -> Tensor:
    """Return a few rows of tokens of one length, so that nothing is padded."""
    rows = [tokenizer(text).input_ids for text in PROBE]
    length = min(len(row) for row in rows)
    return torch.tensor([row[:length] for row in rows])


@torch.no_grad()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()


def _difference(logits: Tensor, reference: Tensor) -> float:
    return float((logits - reference).abs().max() / reference.abs().max())


def _sizes(model: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Return the relative size of the update, and the share of it that rounding to ``dtype`` takes, over all layers."""
    before = update = lost = 0.0
    for old in model.merged.values():
        for _, frozen, merged in old.changes():
            W = torch.zeros_like(merged) if frozen is None else frozen.to(merged.device)
            before += float(W.double().square().sum())
            update += float((merged.double() - W.double()).square().sum())
            lost += float((merged.to(dtype).double() - merged.double()).square().sum())
    return (update / before) ** 0.5, (lost / update) ** 0.5 if update else 0.0


def _make_room_for_biases(model: Any) -> None:
    """Declare the biases that a method created; a file's reader drops tensors that its configuration does not announce.

    A configuration announces them for all linears of the attentions or of the MLPs, so the others get zeros.
    """
    from transformers import AutoModelForCausalLM

    created = [
        site
        for site, old in model.merged.items()
        if any(name == "bias" and frozen is None for name, frozen, _ in old.changes())
    ]
    if not created:
        return
    attention = names_of(model).attention
    for flag in {"attention_bias" if attention in site.split(".") else "mlp_bias" for site in created}:
        if hasattr(model.config, flag):
            setattr(model.config, flag, True)
    with torch.device("meta"):
        announced = AutoModelForCausalLM.from_config(model.config)  # type: ignore[no-untyped-call]
    for name, module in announced.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            layer = model.get_submodule(name)
            if layer.bias is None:
                layer.bias = _frozen(torch.zeros(layer.out_features, device=layer.weight.device), like=layer.weight)
    homeless = [site for site in created if announced.get_submodule(site).bias is None]
    if homeless:
        method = model.merged[homeless[0]].adapter.name
        raise UserError(
            f"cannot write the merged model: {method} gives {homeless[0]} a bias, for which files of "
            f"{model.config.model_type} have no place. Evaluate it unmerged: `subspace evaluate RUN`"
        )


@contextlib.contextmanager
def _whole_or_not(partial: Path, out: Path) -> Iterator[None]:
    """Let the folder be written as ``partial`` and rename it at the end; leave nothing behind where that fails."""
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot write the merged model to {out}: {reason}. Free some space, or give another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)

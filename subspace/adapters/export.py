"""Write base model and adapter as a plain Hugging Face folder, which is verified before it appears.

A method is merged by its own equation, in float32: ``adapter.merged()`` returns what replaces the frozen tensors.
A folder is put in place only after its model gave the same logits as the unmerged one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from subspace.adapters.merging import _frozen, discard_undo, merge, replaced_by_merge
from subspace.adapters.serialization import load_adapter
from subspace.adapters.targets import PARTS
from subspace.common.files import write_folder, write_json
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from subspace.models.files import suppress_library_logs
from subspace.models.loading import open_model, open_tokenizer
from subspace.models.transformers_compat import is_quantized

TOLERANCE = 1e-3  # of the largest logit; float32 gives about 1e-5, a wrong merge gives about 1

PROBE = (
    "The capital of France is Paris, and the river in it is the Seine. People have lived there for a long time.",
    "To remove a stain from a carpet, dry it with a towel; then use 2 cups of water, soap, and a little patience.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. Answer:",
)


@dataclass(frozen=True)
class MergeReport:
    """The verification of a merged folder. Differences are the largest of any logit, relative to the largest logit."""

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


def export_merged(
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
    if is_quantized(model):  # also where the base's own files are
        with suppress_library_logs():
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
    layers = len(replaced_by_merge(model))
    _make_room_for_biases(model)
    discard_undo(model)
    for name, parameter in model.named_parameters():  # not buffers: files have none, and rotary angles need all digits
        parameter.data = parameter.data.to(getattr(torch, written))
        if not torch.isfinite(parameter).all():
            raise UserError(f"the merged model was not written: {name} is beyond {written}. Write bfloat16 or float32")

    with _disk_errors(out), write_folder(out, replace=False) as partial:
        with suppress_library_logs():
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
        write_json(partial / "merge.json", about)
    return report


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
    for old in replaced_by_merge(model).values():
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
        for site, old in replaced_by_merge(model).items()
        if any(name == "bias" and frozen is None for name, frozen, _ in old.changes())
    ]
    if not created:
        return
    (attention,) = PARTS["attention"]
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
        method = replaced_by_merge(model)[homeless[0]].adapter.name
        raise UserError(
            f"cannot write the merged model: {method} gives {homeless[0]} a bias, for which files of "
            f"{model.config.model_type} have no place. Evaluate it unmerged: `subspace evaluate RUN`"
        )


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot write the merged model to {out}: {reason}. Free some space, or give another folder"
        ) from error

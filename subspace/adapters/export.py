"""Write base model and adapter as a plain Hugging Face folder, which is verified before it appears.

A method is merged by its own equation, in float32: ``adapter.merged()`` returns what replaces the frozen tensors.
A folder is put in place only after its model gave the same logits as the unmerged one.

Memory: one copy of the model in the dtype of its files, and one decoder layer in float32. A 7B model in 16 bits is
merged on a card of 24 GB.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspace.adapters.exchange.base_files import CARD, RECORD, check_tokenizer, copy_base_files, write_config
from subspace.adapters.exchange.model_card import adapter_facts, base_name, model_card
from subspace.adapters.inject import adapters
from subspace.adapters.merging import (
    SharedTensors,
    frozen,
    merge_site,
    mergeable_adapters,
    note_untied,
    scale_updates,
)
from subspace.adapters.serialization import check_adapter_base, load_adapter
from subspace.adapters.targets import PARTS
from subspace.common.files import write_folder, write_json
from subspace.common.paths import nearest_existing
from subspace.distributed.device import device
from subspace.errors import UserError, file_trouble
from subspace.models.base_record import identify
from subspace.models.config import ModelConfig
from subspace.models.files import suppress_library_logs
from subspace.models.float32_blocks import blocks, float32_blocks
from subspace.models.inspection import inspect_model
from subspace.models.loading import open_model, open_shape, open_tokenizer, stored_dtype
from subspace.models.prepare import find_files
from subspace.models.transformers_compat import decoder_layers, is_quantized

HALVES = (torch.float16, torch.bfloat16)
SHARD = "2GB"  # of a file; its tensors are copied to be written
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
    scale: float = 1.0  # the share of the update that was merged

    def __str__(self) -> str:
        advice = ". Write float32 to keep more" if self.rounding > 0.1 else ""
        part = "" if self.scale == 1 else f" at {self.scale:g} of what was trained"
        return (
            f"{self.layers} layers merged{part}. The update is {self.update:.2e} of the weights' norm; {self.dtype} "
            f"rounds away {self.rounding:.1%} of it{advice}.\nLargest difference of a logit from the unmerged model, "
            f"relative to the largest: {self.merged_difference:.1e} merged, {self.written_difference:.1e} as written "
            f"({self.same_tokens:.1%} of next tokens equal)."
        )


def export_merged(
    config: ModelConfig,
    adapter: Path,
    out: Path,
    *,
    dtype: str | None = None,
    as_trained: bool = False,
    scale: float = 1.0,
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
        scale: the share a of the update: the weights become W + a (W' - W). 0 is the base, 1 what was trained.
        tolerance: the largest difference of a logit that is let through, relative to the largest logit.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"cannot write the merged model to {out}: it exists. Give another folder, or remove it")
    if not os.access(above := nearest_existing(out.absolute()), os.W_OK):
        raise UserError(f"cannot write the merged model to {out}: {above} may not be written to. Give another folder")
    config = inspect_model(config)
    base = identify(config)
    check_adapter_base(adapter, base=base)
    if not config.trust_remote_code:  # foreign code may not bear a model without values
        shape = open_shape(replace(config, quantize="none"))
        load_adapter(shape, adapter, any_base=True)
        mergeable_adapters(shape)
        scale_updates(shape, scale)
    attention = "sdpa" if config.attention == "flash_attention_2" else config.attention
    exact = replace(config, dtype="float32", quantize="none", attention=attention, gradient_checkpointing=False)
    written = replace(config, dtype=dtype or config.dtype).dtype

    tokenizer = open_tokenizer(exact)
    model, files = _open(exact, adapter, quantize=config.quantize if as_trained else "none"), find_files(exact)
    if scale != 1:
        scale_updates(model, scale)
    opened = model.config.to_dict()
    probe = _probe(tokenizer).to(model.device)
    unmerged = _logits(model, probe)
    merging = _LayerwiseMerge(model, getattr(torch, written))
    difference = _difference(merging.logits(probe), unmerged)
    if not difference <= tolerance:  # also where it is not a number
        other = config.quantize != "none" and not as_trained
        cure = f"Merge into the {config.quantize} weights as trained, or evaluate" if other else "Evaluate"
        raise UserError(
            f"the merged model of {adapter} was not written: its logits differ from the unmerged model's by "
            f"{difference:.1e} of the largest, and {tolerance:.0e} is allowed. {cure} the adapter unmerged"
        )
    update, rounding = merging.relative_sizes()
    _make_room_for_biases(model, merging.created_biases)
    for name, parameter in model.named_parameters():  # not buffers: files have none, and rotary angles need all digits
        parameter.data = parameter.data.to(getattr(torch, written))
        if not torch.isfinite(parameter).all():
            raise UserError(f"the merged model was not written: {name} is beyond {written}. Write bfloat16 or float32")

    with _disk_errors(out), write_folder(out, replace=False) as partial:
        with suppress_library_logs():
            model.save_pretrained(partial, max_shard_size=SHARD)
            if files.gguf:
                tokenizer.save_pretrained(partial)
        copy_base_files(files, partial)
        write_config(files, partial, model, opened, written)
        rounded = _logits(model, probe)
        del model, merging.model
        there = replace(exact, path=str(partial), revision=None)
        check_tokenizer(tokenizer, open_tokenizer(there), PROBE, out)
        reread = _open(there)  # without an adapter
        after = _logits(reread, probe.to(reread.device)).to(rounded.device)
        del reread
        if not _difference(after, rounded) <= tolerance:
            raise UserError(
                f"the merged model was not written to {out}: its files read back as another model. Is the disk sound?"
            )
        report = MergeReport(
            layers=len(merging.sizes),
            dtype=written,
            update=update,
            rounding=rounding,
            merged_difference=difference,
            written_difference=_difference(after, unmerged),
            same_tokens=float((after.argmax(-1) == unmerged.argmax(-1)).float().mean()),
            scale=scale,
        )
        name = base_name(config.path, files)
        # Nothing of this machine: the folder is made to be given away.
        about = {
            "base": name,
            "base_record": {**base.as_dict(), "path": name},
            **adapter_facts(adapter),
            **asdict(report),
        }
        write_json(partial / RECORD, about)
        (partial / CARD).write_text(model_card(out.name, about, files.folder), encoding="utf-8")
    return report


def _probe(tokenizer: Any) -> Tensor:
    """Return a few rows of tokens of one length, so that nothing is padded."""
    rows = [tokenizer(text).input_ids for text in PROBE]
    length = min(len(row) for row in rows)
    return torch.tensor([row[:length] for row in rows])


def _open(exact: ModelConfig, adapter: Path | None = None, quantize: str = "none") -> Any:
    """Open a model, with an adapter or none, to be computed with in float32, on this process's device if it fits there.

    Weights are held in the 16 bits that their files have, if that gives the same results. In float32 are those of
    other files, and quantised ones, dequantised.
    """
    dtypes = [torch.float32] if quantize != "none" else list(dict.fromkeys([stored_dtype(exact), torch.float32]))
    model: Any = None
    for dtype in dtypes:
        del model  # before another takes as much
        model = open_model(replace(exact, quantize=quantize), held=dtype, where=_place(exact, dtype))
        if is_quantized(model):  # also where the base's own files are
            with suppress_library_logs():
                model = model.dequantize(dtype=torch.float32).requires_grad_(False)
        if adapter:
            load_adapter(model, adapter)
        if not _rounded(model):
            break
    return model


def _rounded(model: Any) -> bool:
    """Return True if a tensor besides the weights was rounded to the dtype in which the model was opened.

    That are constants of some models, such as Gemma's scale of the embedding, and tensors of methods that take up W's
    dtype: singular vectors, and the weights that ``full`` replaces.
    """
    replaced = [tensor for adapter in adapters(model).values() for tensor in adapter.original_params.values()]
    return any(tensor.dtype in HALVES for tensor in (*model.buffers(), *replaced))


def _place(exact: ModelConfig, dtype: torch.dtype) -> torch.device:
    """Return this process's device if a model in a dtype fits there while it is merged, else the CPU."""
    here = device()
    if here.type == "cpu":
        return here
    shape = open_shape(exact)
    numbers = sum(parameter.numel() for parameter in shape.parameters())
    largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks(shape))
    # A block's weights in float32, before and after the merge, and as much again for what computes with them.
    needed = dtype.itemsize * numbers + 4 * 4 * largest
    free, _ = torch.cuda.mem_get_info(here)
    return here if needed < free else torch.device("cpu")


@torch.no_grad()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    """Return the logits that the model gives in float32, whatever it holds its weights in."""
    with float32_blocks(model):
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()


def _difference(logits: Tensor, reference: Tensor) -> float:
    return float((logits - reference).abs().max() / reference.abs().max())


class _LayerwiseMerge:
    """Merging of all adapters of a model, each decoder layer's when a forward pass comes to it.

    So only one layer has its merged weights in float32. When the pass has left it they are rounded, in place of the
    frozen ones, and the adapters are gone.

    Attributes:
        model: with adapters, without gradients.
        dtype: what merged weights are rounded to.
        sizes: of each site, for each tensor: the squared norms of W, of its update, and of what rounding takes.
        created_biases: the sites that had no bias before, with their methods.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.waiting, self.shared = mergeable_adapters(model), SharedTensors()
        self.sizes: dict[str, list[tuple[float, float, float]]] = {site: [] for site in self.waiting}
        self.created_biases: dict[str, str] = {}
        names = {module: name for name, module in model.named_modules()}
        self.inside: dict[nn.Module, list[str]] = {
            layer: [site for site in self.waiting if site.startswith(f"{names[layer]}.")]
            for layer in decoder_layers(model)
        }

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Merge all adapters and return the merged model's logits, from weights in float32."""
        in_layers = {site for sites in self.inside.values() for site in sites}
        for site in [site for site in self.waiting if site not in in_layers]:
            self._merge(site)  # a head may be tied to the embedding: neither is rounded before both have run
        with float32_blocks(self.model, self._enter, self._leave):
            logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        assert not self.waiting
        note_untied(self.model)
        return logits.float()

    def relative_sizes(self) -> tuple[float, float]:
        """Return the relative size of the update, and the share of it that rounding takes, over all layers."""
        before = update = lost = 0.0
        for tensors in self.sizes.values():
            for of_W, of_update, of_loss in tensors:
                before, update, lost = before + of_W, update + of_update, lost + of_loss
        return (update / before) ** 0.5, (lost / update) ** 0.5 if update else 0.0

    def _enter(self, block: nn.Module) -> None:
        for site in self.inside.get(block, ()):
            self._merge(site)

    def _leave(self, block: nn.Module) -> None:
        if block in self.inside:
            for parameter in block.parameters():
                parameter.data = parameter.data.to(self.dtype)

    def _merge(self, site: str) -> None:
        replaced = merge_site(self.model, site, self.waiting.pop(site), self.shared, torch.float32)
        for name, before, merged in replaced.changes():
            if name == "bias" and before is None:
                self.created_biases[site] = replaced.adapter.name
            W = torch.zeros_like(merged) if before is None else before.to(merged.device)
            self.sizes[site].append(
                (
                    float(W.double().square().sum()),
                    float((merged.double() - W.double()).square().sum()),
                    float((merged.to(self.dtype).double() - merged.double()).square().sum()),
                )
            )


def _make_room_for_biases(model: Any, created: Mapping[str, str]) -> None:
    """Declare the biases that methods created; a file's reader drops tensors that its configuration does not announce.

    A configuration announces them for all linears of the attentions or of the MLPs, so the others get zeros.
    """
    from transformers import AutoModelForCausalLM

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
                layer.bias = frozen(torch.zeros(layer.out_features, device=layer.weight.device), layer.weight.dtype)
    homeless = [site for site in created if announced.get_submodule(site).bias is None]
    if homeless:
        raise UserError(
            f"cannot write the merged model: {created[homeless[0]]} gives {homeless[0]} a bias, for which files of "
            f"{model.config.model_type} have no place. Evaluate it unmerged: `subspace evaluate RUN`"
        )


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (trouble := file_trouble(error)) is None:
            raise
        raise UserError(f"cannot write the merged model to {out}: {trouble}") from error

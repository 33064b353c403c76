"""Adapters that let the model see more than it reads: keys and values at an attention, vectors at the embedding.

Both are invisible from outside: logits, masks, positions, labels and the key-value cache's owner know nothing of the
virtual tokens, whether a text is read at once, in parts with a cache, padded, or as a tree with a 4-d mask.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.adapters.base import Adapter, C
from subspace.errors import UserError
from subspace.models.transformers_compat import attention_kernel, embedding_gain, layer_number


class AttentionAdapter(Adapter[C]):
    """A method that lets every query of an attention see further keys and values, from :meth:`prefix`.

    The keys join after the rotary embedding, so they carry none, and real tokens keep their positions. It works with
    any decoder of transformers that hands its keys to ``past_key_values.update`` and masks with a 4-d mask (``sdpa``
    and ``eager``), with gradient checkpointing and with a key-value cache.
    """

    site = "attention"
    mergeable = False
    identity_at_init = False

    @classmethod
    def check_module(cls, config: C, site: Any) -> str | None:
        wanted = ("head_dim", "num_key_value_groups")
        fits = all(hasattr(site, name) for name in wanted) and hasattr(site.config, "num_key_value_heads")
        return None if fits else "is no attention of LLaMA's kind, with grouped keys and values. Take prompt or lora"

    def __init__(self, base: nn.Module, config: C) -> None:
        super().__init__(base, config)
        kind = attention_kernel(self.base.config)
        if kind.startswith(("flash", "flex")):
            raise UserError(
                f"method {self.name} was asked for with `attention: {kind}`, which cannot show a prefix to every "
                "query. Set `model.attention: sdpa`"
            )
        self.num_heads: int = self.base.config.num_attention_heads
        self.num_kv_heads: int = self.base.config.num_key_value_heads
        self.head_dim: int = self.base.head_dim

    def prefix(self) -> tuple[Tensor, Tensor]:
        """Return the keys and the values that precede the real ones, each ``(kv_heads, n, head_dim)``."""
        raise NotImplementedError

    def offset(self) -> Tensor | None:
        """Return what each query head, ``(heads,)``, adds to its logits on the prefix, or None."""
        return None

    def forward(self, hidden_states: Tensor, **context: Any) -> Any:
        """Run the frozen attention, whose mask and key-value cache are in ``context``, with the prefix in front."""
        cache = _PrefixedKeys(context.get("past_key_values"), *self.prefix())
        mask = context.get("attention_mask")
        if mask is None:
            mask = _causal_mask(hidden_states, context.get("past_key_values"), layer_number(self.base))
        # A boolean mask marks what is seen; a float mask is added to the logits.
        offset = self.offset()
        if offset is None:
            mask = F.pad(mask, (cache.num_tokens, 0), value=True if mask.dtype == torch.bool else 0.0)
        else:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=hidden_states.dtype).masked_fill(~mask, float("-inf"))
            shape = (len(mask), len(offset), mask.shape[-2])
            columns = offset.to(mask.dtype)[None, :, None, None].expand(*shape, cache.num_tokens)
            mask = torch.cat([columns, mask.expand(*shape, -1)], dim=-1)
        return self.base(hidden_states, **{**context, "past_key_values": cache, "attention_mask": mask})


class _PrefixedKeys:
    """Stands where an attention expects a key-value cache, and answers with the prefix in front of what that holds."""

    def __init__(self, cache: Any, keys: Tensor, values: Tensor) -> None:
        self.cache, self.keys, self.values = cache, keys, values
        self.num_tokens = keys.shape[-2]

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, layer, *args, **kwargs)
        rows = keys.shape[0]
        return (
            torch.cat([self.keys.to(keys.dtype).expand(rows, -1, -1, -1), keys], dim=-2),
            torch.cat([self.values.to(values.dtype).expand(rows, -1, -1, -1), values], dim=-2),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _causal_mask(hidden_states: Tensor, cache: Any, layer: int) -> Tensor:
    """Return the boolean mask, ``(1, 1, queries, keys)``, that transformers leaves out where a kernel implies it."""
    queries = hidden_states.shape[1]
    past = cache.get_seq_length(layer) if cache is not None else 0
    ones = torch.ones(queries, past + queries, dtype=torch.bool, device=hidden_states.device)
    return ones.tril(diagonal=past)[None, None]


class PromptAdapter(Adapter):
    """A method that puts n trained vectors in front of the embedded text, from :meth:`vectors`.

    It holds the decoder that owns the embedding by two hooks: what goes in is widened by n places, and what comes out
    loses them again. The vectors stand at the positions 0 to n - 1; the text follows. In a row that is padded on the
    left they come after the padding, next to the text: attention with a sliding window counts places, whatever is in
    them, so that padding between the two would take the vectors out of the text's sight.
    """

    site = "embedding"
    mergeable = False
    identity_at_init = False

    @classmethod
    def check_model(cls, model: Any) -> str | None:
        whole = getattr(model, "base_model", model)
        if hasattr(whole, "language_model"):
            return "it embeds text together with images or sound, before its decoder. Take prefix or lora"
        if any(hasattr(module, "embed_tokens_per_layer") for module in model.modules()):
            return "every layer has an embedding of its own, which a vector without a token lacks. Take prefix or lora"
        return None

    def __init__(self, base: nn.Module, config: Any) -> None:
        super().__init__(base, config)
        self.in_features: int = self.base.num_embeddings
        self.out_features: int = self.base.embedding_dim
        #: What the embedding multiplies its rows by (Gemma does).
        self.gain = embedding_gain(self.base)
        self.at_the_front = False  # whether the decoder is reading a text's beginning
        self.padding: Tensor | None = None  # places of padding on the left of each row, (rows,), where a mask tells
        self.hooks: list[Any] = []

    @property
    def weight(self) -> Tensor:
        """The frozen embedding's weight, of which some models read dtype and device."""
        weight: Tensor = self.base.weight
        return weight

    def vectors(self) -> Tensor:
        """Return the vectors that precede the text's, ``(n, width)``, as they enter the first layer."""
        raise NotImplementedError

    def attach(self, model: nn.Module) -> None:
        decoder = next(module for module in model.modules() if any(child is self for child in module.children()))
        self.hooks = [
            decoder.register_forward_pre_hook(self._widen, with_kwargs=True),
            decoder.register_forward_hook(self._narrow),
        ]

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def forward(self, ids: Tensor) -> Tensor:
        """``(rows, tokens) -> (rows, tokens, width)``, with n more tokens where the decoder reads a beginning."""
        out: Tensor = self.base(ids)
        if not self.at_the_front:
            return out
        return _insert(self.vectors().to(out.dtype).expand(len(out), -1, -1), out, self.padding)

    def _widen(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = {**dict(zip(("input_ids", "attention_mask", "position_ids"), args, strict=False)), **kwargs}
        if given.get("input_ids") is None:
            raise UserError(f"method {self.name} puts vectors before a text's tokens: give the model `input_ids`")
        n: int = self.config.n
        cache, mask, positions = (given.get(key) for key in ("past_key_values", "attention_mask", "position_ids"))
        self.at_the_front = cache is None or not cache.get_seq_length()
        self.padding = None
        if mask is not None and mask.ndim == 2:
            self.padding = (mask.cumsum(1) == 0).sum(1)
            given["attention_mask"] = _insert(torch.ones_like(mask[:, :1]).expand(-1, n), mask, self.padding)
        elif mask is not None:
            given["attention_mask"] = _with_visible_columns(mask, n, n if self.at_the_front else 0)
        if positions is not None:
            positions = positions + n
            if self.at_the_front:
                first = torch.arange(n, device=positions.device).expand(*positions.shape[:-1], n)
                positions = _insert(first, positions, self.padding)
            given["position_ids"] = positions
        return (), given

    def _narrow(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.at_the_front:
            output.last_hidden_state = _take_out(output.last_hidden_state, self.config.n, self.padding)
            self.at_the_front = False
        return output


def num_virtual_tokens(model: nn.Module) -> int:
    """Return how many places of the decoder's input the model's adapters add to each text."""
    return sum(module.config.n for module in model.modules() if isinstance(module, PromptAdapter))


def _insert(new: Tensor, row: Tensor, padding: Tensor | None) -> Tensor:
    """Return each row, ``(rows, tokens, ...)``, with ``new (rows, n, ...)`` after its padding on the left."""
    joined = torch.cat([new, row], dim=1)
    if padding is None:
        return joined
    n, place = new.shape[1], torch.arange(joined.shape[1], device=row.device)
    padding = padding.to(row.device)[:, None]
    before, among = place < padding, (place >= padding) & (place < padding + n)
    return _take(joined, torch.where(before, place + n, torch.where(among, place - padding, place)))


def _take_out(row: Tensor, n: int, padding: Tensor | None) -> Tensor:
    """Return each row without the n places after its padding on the left, which :func:`_insert` added."""
    if padding is None:
        return row[:, n:]
    place = torch.arange(row.shape[1] - n, device=row.device)
    return _take(row, torch.where(place < padding.to(row.device)[:, None], place, place + n))


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """Return of each row of a tensor, ``(rows, tokens, ...)``, the places that ``index (rows, places)`` names."""
    tensor = tensor.expand(len(index), *tensor.shape[1:])  # positions may be one row for all
    index = index.view(*index.shape, *(1,) * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:])
    return tensor.gather(1, index)


def _with_visible_columns(mask: Tensor, columns: int, rows: int) -> Tensor:
    """Return a 4-d attention mask with columns on the left that all may see, and above it rows that see one another."""
    # A boolean mask marks what is seen; a float mask is added to the logits.
    boolean = mask.dtype == torch.bool
    mask = F.pad(mask, (columns, 0), value=True if boolean else 0.0)
    above = torch.ones(rows, mask.shape[-1], dtype=torch.bool, device=mask.device).tril()
    if not boolean:
        hidden = torch.finfo(mask.dtype).min
        above = torch.zeros_like(above, dtype=mask.dtype).masked_fill(~above, hidden)
    return torch.cat([above.expand(*mask.shape[:2], -1, -1), mask], dim=-2)


def linear(n_in: int, n_out: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the weight, ``(n_out, n_in)``, and the bias of a small network's layer as torch's linear layers start."""
    bound = 1 / math.sqrt(n_in)
    weight, bias = (torch.empty(*shape).uniform_(-bound, bound) for shape in ((n_out, n_in), (n_out,)))
    return nn.Parameter(weight), nn.Parameter(bias)

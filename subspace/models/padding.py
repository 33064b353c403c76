"""Whether a model needs to be told where its batch is padded.

Rows are padded on the right. A token of a causal model sees only what is on its left, so padding changes nothing that
the loss looks at, and without a mask attention can take a kernel that knows causality and reads half the scores.
That is not so of a model that looks to the right, or that makes something else of its mask. Which kind a model is, no
setting of it says; so it is tried.
"""

from __future__ import annotations

from typing import Any

import torch

#: Tokens of the padded row, and of both rows: most of what a token to the right could see is padding.
TOKENS, LENGTH = 8, 32
#: Largest relative difference of all logits together that rounding explains, in float32 and with fewer bits.
ROUNDING, ROUNDING_16_BIT = 1e-4, 5e-2


@torch.no_grad()
def needs_padding_mask(model: Any) -> bool:
    """Return True if logits of real tokens differ by more than rounding when padding on their right is not masked.

    Two short rows go through the model, or the engine, twice. Nothing random is drawn. Collective under ZeRO-3.
    """
    inner = getattr(model, "module", model)
    training, device = inner.training, model.device  # a parameter's may be another one, where weights are offloaded
    # Varied tokens, the same on every rank. Padding looks like text, so that whoever sees it is influenced by it.
    ids = (torch.arange(2 * LENGTH, device=device).view(2, LENGTH) * 7 + 3) % inner.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    mask[0, TOKENS:] = 0
    model.eval()
    # Layers that are to be compiled would be compiled for these shapes.
    with torch.compiler.set_stance("force_eager"):
        masked, unmasked = (
            model(input_ids=ids, attention_mask=given, use_cache=False).logits[0, :TOKENS].double()
            for given in (mask, None)
        )
    model.train(training)
    rounding = ROUNDING if inner.dtype.itemsize >= 4 else ROUNDING_16_BIT
    difference = torch.linalg.vector_norm(masked - unmasked) / torch.linalg.vector_norm(masked)
    return not float(difference) <= rounding  # NaN needs it, too

"""Low-rank branches of several adapters beside one layer: values and gradients are those of each on its own rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from subspace.kernels.low_rank_groups import lora_down_each, lora_up_add_each

#: The second of four rows is nobody's.
STRETCHES = [(0, 1), (2, 4)]
RANKS, SCALES = [3, 5], [0.5, 2.0]


@pytest.mark.parametrize("first_layer", [False, True])
def test_each_is_what_it_is_alone(*, first_layer: bool) -> None:
    torch.manual_seed(0)
    W = torch.randn(6, 8, dtype=torch.float64)
    x = torch.randn(4, 7, 8, dtype=torch.float64, requires_grad=not first_layer)
    A = [torch.randn(r, 8, dtype=torch.float64, requires_grad=True) for r in RANKS]
    B = [torch.randn(6, r, dtype=torch.float64, requires_grad=True) for r in RANKS]

    def grouped() -> torch.Tensor:
        through, hidden = lora_down_each(x * 1.0, STRETCHES, A)
        return lora_up_add_each(F.linear(through, W), STRETCHES, [torch.tanh(h) for h in hidden], B, SCALES)

    def plainly() -> torch.Tensor:
        rows = list(F.linear(x, W))
        for (begin, end), a, b, scale in zip(STRETCHES, A, B, SCALES, strict=True):
            for row in range(begin, end):
                rows[row] = rows[row] + scale * torch.tanh(x[row] @ a.T) @ b.T
        return torch.stack(rows)

    wanted = [*A, *B, *([] if first_layer else [x])]
    weight = torch.randn(4, 7, 6, dtype=torch.float64)
    assert torch.allclose(grouped(), plainly())
    found = torch.autograd.grad((weight * grouped()).sum(), wanted)
    for gradient, expected in zip(found, torch.autograd.grad((weight * plainly()).sum(), wanted), strict=True):
        assert torch.allclose(gradient, expected)


def test_a_view_is_not_written_to() -> None:
    y = torch.ones(4, 6)
    lora_up_add_each(y[:], [(0, 4)], [torch.ones(4, 2)], [torch.ones(6, 2)], [1.0])
    assert torch.equal(y, torch.ones(4, 6))

"""What the project uses of liger-kernel's insides is still there. Runs where liger-kernel is installed."""

from __future__ import annotations

import pytest

from subspace.models.liger_compat import apply_liger
from tests.helpers.tiny_models import tiny_llama

pytest.importorskip("liger_kernel", reason="liger-kernel needs a GPU and is not among the requirements")


def test_liger_patches_one_model_and_not_its_class() -> None:
    model = tiny_llama()
    apply_liger(model)
    assert "Liger" in model.model.layers[0].mlp.forward.__qualname__, "_apply_liger_kernel_to_instance changed"
    other = tiny_llama()
    assert "Liger" not in other.model.layers[0].mlp.forward.__qualname__

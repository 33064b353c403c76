"""All uses of liger-kernel's private names; runs on a GPU enable it by ``train.liger``.

| internal name | checked with | what breaks without it | why it is used |
| --- | --- | --- | --- |
| `monkey_patch._apply_liger_kernel_to_instance` | 0.8.5, by reading | `train.liger` | the public functions patch \
transformers' classes for the whole process, this one a single model |
| `monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN` | same | the message for a model without kernels | the list of models |

The canary in `tests/models/test_liger_compat.py` runs where liger-kernel is installed.
"""

from __future__ import annotations

from typing import Any

from subspace.errors import UserError


def apply_liger(model: Any) -> None:
    """Put Liger's kernels for norms, rotary embedding and MLP into a model without adapters. The loss is not replaced.

    Raises:
        UserError: Liger has no kernels for this architecture.
    """
    from liger_kernel.transformers import monkey_patch

    known, model_type = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN, model.config.model_type
    if model_type not in known:
        raise UserError(f"train.liger has no kernels for models of type {model_type}. Set train.liger=false")
    monkey_patch._apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)

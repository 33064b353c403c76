"""Fine-tuning as operations on the subspaces of frozen weights.

From Python::

    adapters = subspace.inject(model, "dora", {"r": 8}, targets=["q_proj", "v_proj"])
    ...                                         # train parameters with requires_grad
    subspace.save_adapter(model, "adapter")
    subspace.load_adapter(fresh_model, "adapter")
    subspace.merge(model)

or a whole run, as the command ``subspace`` does it::

    config = subspace.load_config("launch/recipes/quickstart.yaml", ["train.steps=10"])
    results = subspace.evaluate(subspace.train(config))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subspace.adapters.inject import inject as inject
    from subspace.adapters.merging import merge as merge
    from subspace.adapters.merging import unmerge as unmerge
    from subspace.adapters.parameter_count import match_budget as match_budget
    from subspace.adapters.registry import list_methods as list_methods
    from subspace.adapters.registry import load_method_file as load_method_file
    from subspace.adapters.serialization import load_adapter as load_adapter
    from subspace.adapters.serialization import save_adapter as save_adapter
    from subspace.api import evaluate as evaluate
    from subspace.api import load_config as load_config
    from subspace.api import train as train
    from subspace.config import RunConfig as RunConfig
    from subspace.errors import UserError as UserError
    from subspace.integrations.peft.reading import load_peft as load_peft
    from subspace.integrations.peft.writing import export_peft as export_peft
    from subspace.integrations.schedules import follow_schedules as follow_schedules

__version__ = "0.1.0"

_PUBLIC = {
    "RunConfig": "subspace.config",
    "load_config": "subspace.api",
    "train": "subspace.api",
    "evaluate": "subspace.api",
    "inject": "subspace.adapters.inject",
    "merge": "subspace.adapters.merging",
    "unmerge": "subspace.adapters.merging",
    "save_adapter": "subspace.adapters.serialization",
    "load_adapter": "subspace.adapters.serialization",
    "export_peft": "subspace.integrations.peft.writing",
    "load_peft": "subspace.integrations.peft.reading",
    "list_methods": "subspace.adapters.registry",
    "load_method_file": "subspace.adapters.registry",
    "match_budget": "subspace.adapters.parameter_count",
    "follow_schedules": "subspace.integrations.schedules",
    "UserError": "subspace.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import a public name on first access (PEP 562), so that importing the package stays fast."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'subspace' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})

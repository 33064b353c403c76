"""Fine-tuning as operations on the subspaces of frozen weights.

From Python::

    adapters = subspace.inject(model, "dora", {"r": 8}, targets=["q_proj", "v_proj"])
    ...                                         # train what has requires_grad
    subspace.save_adapter(model, "adapter")
    subspace.load_adapter(fresh_model, "adapter")
    subspace.merge(model)

Everything else is the command ``subspace``.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subspace.adapters.inject import inject as inject
    from subspace.adapters.merging import merge as merge
    from subspace.adapters.merging import unmerge as unmerge
    from subspace.adapters.parameter_count import match_budget as match_budget
    from subspace.adapters.registry import methods as methods
    from subspace.adapters.serialization import load_adapter as load_adapter
    from subspace.adapters.serialization import save_adapter as save_adapter
    from subspace.errors import UserError as UserError

PUBLIC = {
    "inject": "subspace.adapters.inject",
    "merge": "subspace.adapters.merging",
    "unmerge": "subspace.adapters.merging",
    "save_adapter": "subspace.adapters.serialization",
    "load_adapter": "subspace.adapters.serialization",
    "methods": "subspace.adapters.registry",
    "match_budget": "subspace.adapters.parameter_count",
    "UserError": "subspace.errors",
}


class _Package(types.ModuleType):
    """Looks a public name up when it is asked for, so that importing the package costs nothing.

    Some functions share their name with a module. Importing that module would put it in the function's place; here the
    function is always what ``subspace.NAME`` is, and the module is what ``from subspace.NAME import`` reads.
    """

    def __getattribute__(self, name: str) -> Any:
        if name in PUBLIC:
            return getattr(importlib.import_module(PUBLIC[name]), name)
        return super().__getattribute__(name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *PUBLIC})


sys.modules[__name__].__class__ = _Package

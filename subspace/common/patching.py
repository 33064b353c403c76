"""Temporary replacement of attributes; all of this project's monkey patching goes through here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)


@contextmanager
def patched(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replace ``owner.name`` inside the block and restore it afterwards.

    An attribute that ``owner`` has only through its class is deleted again at the end, not written into the instance.
    Not thread-safe: two threads that patch the same attribute would restore each other's replacement.

    Raises:
        AttributeError: ``owner`` has no such attribute, so that a rename upstream is an error and not a silent no-op.
    """
    getattr(owner, name)
    own = vars(owner)
    existed, before = name in own, own.get(name)
    log.debug("replacing %s of %s", name, getattr(owner, "__name__", type(owner).__name__))
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if existed:
            setattr(owner, name, before)
        else:
            delattr(owner, name)

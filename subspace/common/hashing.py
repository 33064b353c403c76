"""Hashes of texts and values, used as cache keys and to identify rows and settings."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def hash_texts(*texts: str) -> int:
    """Return the 64-bit BLAKE2b hash of these texts as a non-negative integer."""
    digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a JSON-serialisable value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

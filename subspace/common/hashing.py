"""Hashes of texts and values, which name cached files and tell rows and settings apart."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def hash_texts(*texts: str) -> int:
    """Return 64 bits of the BLAKE2b hash of these texts, as a number of at least 0."""
    digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a value that JSON can hold; the order of a mapping's keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

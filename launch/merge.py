"""Merge: the same as `subspace merge`."""

from __future__ import annotations

import sys
from pathlib import Path

# Python puts this folder first on its path, where evaluate.py would hide a package of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from subspace.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))

"""The process of one item.

python -m tests.gpu ITEM --out DIR --device cuda [--tiny]
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from tests.gpu.cases import Check
from tests.gpu.items import find_item


def main() -> None:
    """Run one item."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("item")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    item = find_item(options.item)
    function = getattr(importlib.import_module(item.module), item.function)
    function(Check(item, options.out.resolve(), options.device, options.tiny))


if __name__ == "__main__":
    main()

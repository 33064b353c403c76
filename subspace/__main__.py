"""Entry point of ``python -m subspace``, the same as the command ``subspace``."""

import sys

from subspace.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

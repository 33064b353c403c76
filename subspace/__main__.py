"""``python -m subspace`` is the command ``subspace``."""

import sys

from subspace.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m dcar_fast.cli``: the same as ``dcar-fast``."""

import sys

from dcar_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())

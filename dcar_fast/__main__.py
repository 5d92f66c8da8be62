"""``python -m dcar_fast``: the command line, so that ``torchrun -m dcar_fast`` can start it."""

import sys

from dcar_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())

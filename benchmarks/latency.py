"""Time from a prompt to the pixels of one batch, per stage: ``python benchmarks/latency.py --bs 1``.

Every row is checked against the float32 reference before it is timed. The last line is the result as JSON.
"""

import sys

from _harness import main

if __name__ == "__main__":
    sys.exit(main("latency", 1, "Time from a prompt to the pixels of one batch, per stage."))

"""Images per second in large batches, per stage: ``python benchmarks/throughput.py --bs 16``.

Every row is checked against the float32 reference before it is timed. The last line is the result as JSON.
"""

import sys

from _harness import main

if __name__ == "__main__":
    sys.exit(main("throughput", 16, "Images per second in large batches, per stage."))

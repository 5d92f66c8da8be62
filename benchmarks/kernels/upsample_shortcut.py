"""upsample_shortcut against the model's lines: two pixel shuffles, a repetition and an addition, eager and compiled.

    python benchmarks/kernels/upsample_shortcut.py [--batch 1 --inputs 1024 --channels 512 --side 32] [--dtype float32]
                                                   [--layout channels_last] [--rounds 20] [--device cpu]

First every implementation must agree with float64; then they are timed in turns. Ends with one JSON line.
"""

from __future__ import annotations

from _decoder import image, measure, options, parse  # makes dcar_fast importable, so it is first

from dcar_fast.ops import upsample_shortcut
from dcar_fast.reference.upsample_shortcut import upsample_shortcut as reference


def main() -> None:
    parser = options(__doc__, channels=512, side=32)
    parser.add_argument("--inputs", type=int, default=1024, help="channels of the shortcut (%(default)s)")
    arguments = parse(parser)
    if 4 * arguments.channels % arguments.inputs:
        parser.error(f"--inputs must divide {4 * arguments.channels}, four times --channels, got {arguments.inputs}")
    images = [image(arguments, 4 * arguments.channels), image(arguments, arguments.inputs)]
    measure("upsample_shortcut", upsample_shortcut, reference, reference, images, (), arguments)


if __name__ == "__main__":
    main()

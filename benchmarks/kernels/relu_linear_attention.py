"""relu_linear_attention against the model's lines, eager and compiled.

    python benchmarks/kernels/relu_linear_attention.py [--batch 1 --channels 512 --side 64] [--dtype float32]
                                                       [--layout channels_last] [--rounds 20] [--device cpu]

First every implementation must agree with float64; then they are timed in turns. Ends with one JSON line. No library
has this attention: SDPA normalises with a softmax.
"""

from __future__ import annotations

from _decoder import image, measure, options, parse  # makes dcar_fast importable, so it is first

from dcar_fast.ops import relu_linear_attention
from dcar_fast.reference.relu_linear_attention import relu_linear_attention as reference


def main() -> None:
    parser = options(__doc__, channels=512, side=64)
    arguments = parse(parser)
    if arguments.channels % 32:
        parser.error(f"--channels must be a multiple of 32, got {arguments.channels}")
    images = [image(arguments, 3 * arguments.channels)]
    measure("relu_linear_attention", relu_linear_attention, reference, reference, images, (), arguments)


if __name__ == "__main__":
    main()

"""depthwise_gate against the model's lines: activation, convolution, gate, eager and compiled.

    python benchmarks/kernels/depthwise_gate.py [--batch 1 --channels 2048 --side 64] [--activation silu]
                                                [--dtype float32] [--layout channels_last] [--rounds 20] [--device cpu]

First every implementation must agree with float64; then they are timed in turns. Ends with one JSON line.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from _decoder import TYPES, image, measure, options, parse  # makes dcar_fast importable, so it is first
from torch import Tensor

from dcar_fast.ops import depthwise_gate
from dcar_fast.reference.activation import activate
from dcar_fast.reference.depthwise_gate import depthwise_gate as reference


def eager(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    y = F.conv2d(activate(x, activation), weight, bias, padding=1, groups=x.shape[1])
    value, gate = y.chunk(2, dim=1)
    return value * activate(gate, activation)


def main() -> None:
    parser = options(__doc__, channels=2048, side=64)
    parser.add_argument("--activation", default="silu", choices=("silu", "relu"), help="(%(default)s)")
    arguments = parse(parser)
    doubled, device, dtype = 2 * arguments.channels, arguments.device, TYPES[arguments.dtype]
    rest = [torch.randn(shape, device=device).to(dtype) for shape in ((doubled, 1, 3, 3), (doubled,))]
    call, plain, exact = (
        functools.partial(op, activation=arguments.activation) for op in (depthwise_gate, eager, reference)
    )
    measure("depthwise_gate", call, plain, exact, [image(arguments, doubled)], rest, arguments)


if __name__ == "__main__":
    main()

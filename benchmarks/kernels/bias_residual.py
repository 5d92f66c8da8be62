"""bias_residual, what follows a convolution on a GPU, against PyTorch's passes: eager and compiled.

    python benchmarks/kernels/bias_residual.py [--batch 1 --channels 256 --side 256] [--activation none] [--no-residual]
                                               [--dtype float32] [--layout channels_last] [--rounds 20] [--device cpu]

First every implementation must agree with float64; then they are timed in turns. Ends with one JSON line.
"""

from __future__ import annotations

import torch
from _decoder import TYPES, image, measure, options, parse  # makes dcar_fast importable, so it is first
from torch import Tensor

from dcar_fast.ops import bias_residual
from dcar_fast.reference.activation import ACTIVATIONS, activate
from dcar_fast.reference.bias_residual import bias_residual as reference


def main() -> None:
    parser = options(__doc__, channels=256, side=256)
    parser.add_argument("--activation", default="none", choices=ACTIVATIONS, help="(%(default)s)")
    parser.add_argument("--no-residual", action="store_true", help="as behind a block's first convolution")
    arguments = parse(parser)
    kind = arguments.activation

    def named(op):
        """The op as a function of what the benchmark passes: images first."""
        if arguments.no_residual:
            return lambda x, bias, **options: op(x, bias, activation=kind, **options)
        return lambda x, residual, bias, **options: op(x, bias, residual=residual, activation=kind, **options)

    def eager(x: Tensor, bias: Tensor, residual: Tensor | None = None, activation: str = "none") -> Tensor:
        """One pass each for bias, activation and residual, as PyTorch's convolution and the model have them."""
        out = activate(x + bias[:, None, None], activation)
        return out if residual is None else out + residual

    images = [image(arguments, arguments.channels) for _ in range(1 if arguments.no_residual else 2)]
    bias = torch.randn(arguments.channels, device=arguments.device).to(TYPES[arguments.dtype])
    measure("bias_residual", named(bias_residual), named(eager), named(reference), images, (bias,), arguments)


if __name__ == "__main__":
    main()

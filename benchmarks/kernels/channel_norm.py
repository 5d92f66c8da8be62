"""channel_norm with residual and activation against PyTorch's layer_norm: eager and compiled.

    python benchmarks/kernels/channel_norm.py [--batch 1 --channels 512 --side 64] [--activation none] [--no-residual]
                                              [--dtype float32] [--layout channels_last] [--rounds 20] [--device cpu]

First every implementation must agree with float64; then they are timed in turns. Ends with one JSON line.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _decoder import TYPES, image, measure, options, parse  # makes dcar_fast importable, so it is first
from torch import Tensor

from dcar_fast.ops import channel_norm
from dcar_fast.reference.activation import ACTIVATIONS, activate
from dcar_fast.reference.channel_norm import channel_norm as reference


def main() -> None:
    parser = options(__doc__, channels=512, side=64)
    parser.add_argument("--activation", default="none", choices=ACTIVATIONS, help="(%(default)s)")
    parser.add_argument("--no-residual", action="store_true", help="as at the decoder's output")
    arguments = parse(parser)
    kind, channels = arguments.activation, arguments.channels

    def named(op):
        """The op as a function of what the benchmark passes: images first."""
        if arguments.no_residual:
            return lambda x, weight, bias, **options: op(x, weight, bias, activation=kind, **options)
        return lambda x, residual, weight, bias, **options: op(
            x, weight, bias, residual=residual, activation=kind, **options
        )

    def eager(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, activation: str = "none"
    ) -> Tensor:
        out = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-5).permute(0, 3, 1, 2)
        out = activate(out, activation)
        return out if residual is None else residual + out

    images = [image(arguments, channels) for _ in range(1 if arguments.no_residual else 2)]
    rest = torch.randn(2, channels, device=arguments.device).to(TYPES[arguments.dtype]).unbind()
    measure("channel_norm", named(channel_norm), named(eager), named(reference), images, rest, arguments)


if __name__ == "__main__":
    main()

"""sample_tokens against PyTorch: every usable backend, the reference, and the head followed by noise from torch.rand,
eager and compiled, torch.multinomial, or FlashInfer where it is installed.

    python benchmarks/kernels/sample_tokens.py [--rows 256 --width 1152 --codes 16384] [--dtype float32] [--rounds 9]
        [--device cpu]

First the backends must draw the best token for the same counters (up to float64 scores that differ by less than
rounding); then all are timed in turns. Ends with one JSON line. PyTorch's formulations multiply in the weight's type,
both branches at once, and draw with its own generators: emulating Philox would slow them down.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _sampling import (  # makes dcar_fast importable, so it is first
    SETTINGS,
    by_flashinfer,
    by_gumbel,
    by_multinomial,
    check_parity,
    counter_noise,
    guided_logits,
    measure,
    parse,
    usable_backends,
)

from dcar_fast.ops import sample_tokens


def main() -> None:
    arguments = parse(__doc__.partition("\n")[0], rows=256, width=1152, codes=16384)
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    rows, width, codes = arguments.rows, arguments.width, arguments.codes
    cond, uncond = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    weight = (torch.randn(codes, width, device=device) / width**0.5).to(dtype)
    bias = torch.randn(codes, device=device).to(dtype)
    noise = counter_noise(rows, device)

    def head() -> torch.Tensor:
        return guided_logits(*F.linear(torch.cat([cond, uncond]), weight, bias).chunk(2))

    candidates = {
        name: lambda name=name: sample_tokens(cond, uncond, weight, bias, noise=noise, backend=name, **SETTINGS)
        for name in usable_backends("sample_tokens", device)
    }
    counted = list(candidates)
    candidates["torch.rand + Gumbel + argmax"] = lambda: by_gumbel(head())
    candidates["torch.multinomial"] = lambda: by_multinomial(head())
    if device != "cpu" and (flashinfer := by_flashinfer()):
        candidates["flashinfer"] = lambda: flashinfer(head())
    if arguments.no_compile:
        print("not measured: torch.compile: --no-compile")
    else:
        compiled = torch.compile(lambda: by_gumbel(head()), dynamic=False)
        candidates["torch.compile(torch.rand + Gumbel + argmax)"] = compiled

    for name in counted:
        check_parity(name, candidates[name](), exact_logits(name, cond, uncond, weight, bias), noise)
    flop = 2 * rows * width * codes  # the guided states alone
    measure("sample_tokens", candidates, arguments, ("width", "codes"), tflop_per_s=(flop, 1e9))


def exact_logits(name: str, cond: torch.Tensor, uncond: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor):
    """Float64 logits of the guided hidden states, which the Triton kernel rounds to the weight's type."""
    hidden = cond.float() + SETTINGS["guidance"] * (cond.float() - uncond.float())
    if name == "triton":
        hidden = hidden.to(weight.dtype)
    return (hidden.double() @ weight.double().T + bias.double()) / SETTINGS["softmax_temperature"]


if __name__ == "__main__":
    main()

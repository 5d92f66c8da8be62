"""sample_from_logits against PyTorch: every usable backend, the reference, noise from torch.rand eager and compiled,
torch.multinomial, and FlashInfer where it is installed.

    python benchmarks/kernels/sample_from_logits.py [--rows 512 --codes 16384] [--dtype float32] [--rounds 9]
        [--device cpu]

Guided logits, annealing, Gumbel noise, argmax and the confidence. First the backends must draw the same tokens from the
same counters (up to float64 scores that differ by less than rounding); then all are timed in turns. Ends with one JSON
line. PyTorch's formulations draw with its own generators: emulating Philox would slow them down.
"""

from __future__ import annotations

import torch
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

from dcar_fast.ops import sample_from_logits


def main() -> None:
    arguments = parse(__doc__.partition("\n")[0], rows=512, codes=16384)
    device, shape = arguments.device, (arguments.rows, arguments.codes)
    cond, uncond = (torch.randn(*shape, device=device).to(getattr(torch, arguments.dtype)) for _ in range(2))
    noise = counter_noise(arguments.rows, device)

    candidates = {
        name: lambda name=name: sample_from_logits(cond, uncond, noise=noise, backend=name, **SETTINGS)
        for name in usable_backends("sample_from_logits", device)
    }
    counted = set(candidates)
    candidates["torch.rand + Gumbel + argmax"] = lambda: by_gumbel(guided_logits(cond, uncond))
    candidates["torch.multinomial"] = lambda: by_multinomial(guided_logits(cond, uncond))
    if device != "cpu" and (flashinfer := by_flashinfer()):
        candidates["flashinfer"] = lambda: flashinfer(guided_logits(cond, uncond))
    if arguments.no_compile:
        print("not measured: torch.compile: --no-compile")
    else:
        compiled = torch.compile(lambda cond, uncond: by_gumbel(guided_logits(cond, uncond)), dynamic=False)
        candidates["torch.compile(torch.rand + Gumbel + argmax)"] = lambda: compiled(cond, uncond)

    wide = (cond.double() + SETTINGS["guidance"] * (cond.double() - uncond.double())) / SETTINGS["softmax_temperature"]
    for name, run in candidates.items():
        check_parity(name, run(), wide, noise if name in counted else None)
    moved = 2 * cond.nbytes  # both logits are read once
    measure("sample_from_logits", candidates, arguments, ("codes",), gb_per_s=(moved, 1e6))


if __name__ == "__main__":
    main()

"""What the benchmarks of attention share: SDPA's and flash-attn's candidates, parity, training steps, rates."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dcar_fast.ops import report

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B, N, H, d), k and v (B, T, H, d) -> (B, N, H, d)
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def sdpa(mask: Tensor | None, backend: SDPBackend | None) -> Attend:
    """F.scaled_dot_product_attention with a boolean mask or none; ``backend`` None leaves the choice to PyTorch."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
        return out.transpose(1, 2)

    def limited(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attend(q, k, v)

    return attend if backend is None else limited


def formula(mask: Tensor | None) -> Attend:
    """Attention step by step in the type of the inputs."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(dim=-1) @ v.transpose(1, 2)).transpose(1, 2)

    return attend


def libraries(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Attend]:
    """SDPA as PyTorch chooses and with each backend that takes these inputs; the others are named with the reason."""
    found = {"torch sdpa": sdpa(mask, None)}
    for name, backend in SDPA.items():
        try:
            sdpa(mask, backend)(q, k, v)
        except RuntimeError as error:
            print(f"not measured: torch sdpa {name}: {str(error).splitlines()[0]}")
        else:
            found[f"torch sdpa {name}"] = sdpa(mask, backend)
    return found


def flash_attn(q: Tensor) -> Callable[..., Tensor] | None:
    """The flash-attn package's function for fixed lengths, None with the reason where it cannot run."""
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        print(f"not measured: flash-attn: {error}")
        return None
    if q.device.type != "cuda" or q.dtype == torch.float32:
        print(f"not measured: flash-attn: takes 16-bit types on a GPU, these are {q.dtype} on {q.device.type}")
        return None
    return flash_attn_func


def compiled(wanted: bool, **functions: Callable[[], Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Calls by "torch.compile(name)"; the compiler has shapes that it fails on, which are named."""
    if not wanted:
        print("not measured: torch.compile: --no-compile")
        return {}
    found = {f"torch.compile({name})": torch.compile(function) for name, function in functions.items()}
    for name, call in list(found.items()):
        try:
            call()
        except torch._dynamo.exc.BackendCompilerFailed as error:
            print(f"not measured: {name}: {' '.join(str(error).split())[:200]}")
            del found[name]
    return found


def backends(op: str, device: str) -> list[str]:
    """The backends of ``op`` that can run here; for the others the reason is printed."""
    found = []
    for name, (usable, reason) in report(device)[op].items():
        if usable:
            found.append(name)
        else:
            print(f"not measured: {name}: {reason}")
    return found


def check_parity(candidates: Mapping[str, Callable[[], Tensor]], plain: Tensor, truth: Tensor) -> None:
    """SystemExit unless each is at most twice as far from ``truth``, in float64, as ``plain``, which is the formula in
    PyTorch in the type of the inputs, plus the rounding of ``truth`` to that type."""
    rounding = (truth.to(plain.dtype).double() - truth).abs().max().item()
    allowed = 2 * (plain.double() - truth).abs().max().item() + rounding
    for name, call in candidates.items():
        error = (call().double() - truth).abs().max().item()
        print(f"parity {name}: off by {error:.1e}, allowed {allowed:.1e}")
        if not error <= allowed:
            sys.exit(f"error: {name} is wrong, nothing was timed")


def training(candidates: Mapping[str, Callable[[], Tensor]], inputs: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Each candidate followed by its backward, with respect to ``inputs``, which require gradients."""

    def step(call: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        out = call()
        return torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)

    return {name: (lambda call=call: step(call)) for name, call in candidates.items()}

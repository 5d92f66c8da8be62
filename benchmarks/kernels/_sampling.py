"""What the benchmarks of the two sampling ops share: PyTorch's formulations, the parity gate, arguments, the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from _compare import interleave, print_results, summary  # makes dcar_fast importable, so it is first
from torch import Tensor

from dcar_fast.noise import TokenNoise
from dcar_fast.ops import report
from dcar_fast.ops._dispatch import BACKENDS

Sampled = tuple[Tensor, Tensor]
SETTINGS = {"guidance": 3.5, "softmax_temperature": 1.0, "tau": 1.0}
LOST = (
    1e-3  # a score may be this far below the best: float32 rounding of scores around 30, in float16 and bfloat16 heads
)


def parse(description: str, rows: int, **sizes: int) -> argparse.Namespace:
    """--rows, the sizes named, --dtype, --rounds, --threads, --device and --no-compile."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in {"rows": rows, **sizes}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads, for all alike (torch's default)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes its time first")
    arguments = parser.parse_args()
    for name in ("rows", *sizes, "rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return arguments


def counter_noise(rows: int, device: str) -> TokenNoise:
    """Images of 256 tokens each, one seed for each image."""
    position = torch.arange(rows, device=device)
    return TokenNoise(position // 256, position % 256, 1)


def guided_logits(cond: Tensor, uncond: Tensor) -> Tensor:
    cond, uncond = cond.float(), uncond.float()
    return (cond + SETTINGS["guidance"] * (cond - uncond)) / SETTINGS["softmax_temperature"]


def by_gumbel(logits: Tensor) -> Sampled:
    """What samplers do in plain PyTorch: noise from torch.rand, argmax."""
    noise = -torch.log(-torch.log(torch.rand_like(logits)))
    ids = (logits + SETTINGS["tau"] * noise).argmax(dim=-1)
    return ids, logits.gather(1, ids[:, None])[:, 0]


def by_multinomial(logits: Tensor) -> Sampled:
    """The same distribution without Gumbel noise."""
    ids = torch.multinomial((logits / SETTINGS["tau"]).softmax(-1), 1)[:, 0]
    return ids, logits.gather(1, ids[:, None])[:, 0]


def by_flashinfer() -> Callable[[Tensor], Sampled] | None:
    """FlashInfer's sampling from probabilities, where it is installed."""
    try:
        from flashinfer.sampling import sampling_from_probs
    except ImportError as error:
        print(f"not measured: flashinfer: {error}")
        return None

    def sample(logits: Tensor) -> Sampled:
        ids = sampling_from_probs((logits / SETTINGS["tau"]).softmax(-1)).long()
        return ids, logits.gather(1, ids[:, None])[:, 0]

    return sample


def usable_backends(op: str, device: str) -> list[str]:
    """The backends that can run here; the reasons for the others are printed."""
    judged = report(device)[op]
    for name, (usable, reason) in judged.items():
        if not usable:
            print(f"not measured: {name}: {reason}")
    return [name for name, (usable, _) in judged.items() if usable]


def check_parity(name: str, sampled: Sampled, logits: Tensor, noise: TokenNoise | None) -> None:
    """SystemExit unless ids are the best up to rounding (with ``noise``; a formulation that draws its own is free to
    choose) and confidences are their logits. ``logits`` (R, V): what this implementation samples from, float64."""
    ids, confidence = sampled
    lost = 0.0
    if noise is not None:
        for rows in torch.arange(len(ids), device=ids.device).split(64):
            u = TokenNoise(noise.seeds[rows], noise.tokens[rows], noise.step).uniform(logits.shape[1]).double()
            scores = logits[rows] - SETTINGS["tau"] * (-u.log()).log()
            lost = max(lost, (scores.max(1).values - scores.gather(1, ids[rows, None])[:, 0]).max().item())
    error = (confidence.double() - logits.gather(1, ids[:, None])[:, 0]).abs().max().item()
    print(f"parity {name}: best score missed by {lost:.1e}, confidence off by {error:.1e}")
    if lost > LOST or error > LOST:
        sys.exit(f"error: {name} is wrong, nothing was timed")


def measure(
    op: str, candidates: dict[str, Callable[[], Sampled]], arguments: argparse.Namespace, sizes: tuple[str, ...], **work
) -> None:
    """Times the candidates in turns and prints. ``work``: bytes or FLOPs of one call, as gb_per_s or tflop_per_s."""
    results = summary(interleave(candidates, arguments.rounds, arguments.device))
    torch_best = min((name for name in results if name.startswith("torch")), key=lambda n: results[n]["median_ms"])
    eager = results["torch.rand + Gumbel + argmax"]["median_ms"]
    more = {
        "fastest_torch": torch_best,
        "speedup": {n: results[torch_best]["median_ms"] / r["median_ms"] for n, r in results.items() if n in BACKENDS},
        "speedup_over_torch_rand": {n: eager / r["median_ms"] for n, r in results.items() if n in BACKENDS},
    }
    for unit, (amount, scale) in work.items():
        more[unit] = {name: amount / result["median_ms"] / scale for name, result in results.items()}
    shape = {name: getattr(arguments, name) for name in ("rows", *sizes, "dtype", "rounds")}
    print_results(op, arguments.device, {**shape, **SETTINGS}, results, **more)

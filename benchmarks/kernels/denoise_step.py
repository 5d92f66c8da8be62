"""denoise_step against PyTorch: every usable backend; the modules, eager in float32 and in --dtype, and compiled.

    python benchmarks/kernels/denoise_step.py [--rows 512 --width 1024 --depth 6 --channels 32] [--steps 1]
                                              [--dtype float32|bfloat16|float16] [--rounds 10] [--device cpu]

One call is --steps of 32 steps with guidance, from the hidden states of the condition on: the network sees
--rows rows, half of them conditional, and the noise is the same tensor for all. With --device cuda the Triton steps
are also timed as one CUDA graph. First the results are compared with float64; then all are timed in turns. Ends with
one JSON line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from _compare import interleave, print_results, summary  # makes dcar_fast importable, so it is first
from torch import Tensor, nn

from dcar_fast.models.diffusion_head import DiffusionHead
from dcar_fast.ops import denoise_step, embed_condition, embed_timesteps, modulations, pack_head, report
from dcar_fast.ops import step_coefficients as coefficients_of
from dcar_fast.ops._dispatch import BACKENDS
from dcar_fast.reference.denoise_step import guide, posterior_step
from dcar_fast.reference.diffusion import diffusion_schedule

SCHEDULE = diffusion_schedule(32)
CONDITION = 1152  # width of the released generator
GUIDANCE, FORMULA = 4.5, "c+s(c-u)"
Sample = Callable[[], Tensor]


def head_of(arguments: argparse.Namespace) -> DiffusionHead:
    """Random weights: modulations and output are zero at creation, which would hide every mistake before them."""
    head = DiffusionHead(arguments.channels, CONDITION, arguments.width, arguments.depth)
    for name, parameter in head.named_parameters():
        if "adaLN_modulation" in name or "final_layer" in name:
            nn.init.normal_(parameter, std=0.02)
    return head.to(arguments.device).eval().requires_grad_(False)


def steps_of(noise: Tensor) -> range:
    """As many steps as there is noise for, from the middle on or earlier: the first ones, where x_0 is all clamped, do
    not show what the network does."""
    first = max(SCHEDULE.num_steps // 2, len(noise) - 1)
    return range(first, first - len(noise), -1)


def eager(head: nn.Module, x: Tensor, condition: Tensor, noise: Tensor) -> Tensor:
    """The steps as ``models.diffusion_head.sample_rows`` takes them, in the head's precision."""
    rows = len(condition)
    for k, draw in zip(steps_of(noise), noise, strict=True):
        timesteps = torch.full((rows,), SCHEDULE.timesteps[k], device=x.device)
        epsilon, variance = head(x.repeat(2, 1), timesteps, condition).to(x.dtype).chunk(2, dim=-1)
        epsilon = guide(epsilon[: rows // 2], epsilon[rows // 2 :], GUIDANCE, FORMULA)
        x = posterior_step(x, epsilon, variance[: rows // 2], draw, SCHEDULE, k)
    return x


def by_op(head: nn.Module, x: Tensor, hidden: Tensor, noise: Tensor, dtype: torch.dtype, backend: str) -> Sample:
    """The op with what a sampler makes once: packed weights, coefficients, embedded timesteps."""
    weights, steps = pack_head(head, dtype), coefficients_of(SCHEDULE, x.device)
    times = embed_timesteps(weights, SCHEDULE.timesteps)
    options = {"guidance": GUIDANCE, "temperature": 1.0, "formula": FORMULA, "clip": True, "backend": backend}

    def sample() -> Tensor:
        condition, out = embed_condition(weights, hidden), x
        for k, draw in zip(steps_of(noise), noise, strict=True):
            out = denoise_step(out, modulations(weights, condition, times[k]), weights, steps[k], draw, **options)
        return out

    return sample


def as_graph(sample: Sample) -> Sample:
    """``sample`` captured in a CUDA graph; the result is overwritten by the next call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        sample()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sample()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def implementations(
    arguments: argparse.Namespace, head: DiffusionHead, x: Tensor, hidden: Tensor, noise: Tensor
) -> dict[str, Sample]:
    """Name -> what makes a sample; for what cannot run here the reason is printed."""
    dtype, found = getattr(torch, arguments.dtype), {}
    for name, (usable, reason) in report(arguments.device)["denoise_step"].items():
        if usable:
            found[name] = by_op(head, x, hidden, noise, dtype, name)
        else:
            print(f"not measured: {name}: {reason}")
    if "triton" in found:
        found["triton, one CUDA graph"] = as_graph(found["triton"])
    for kind in {torch.float32, dtype}:
        low, condition = copy_of(head, arguments, kind), hidden.to(kind)
        name = str(kind).removeprefix("torch.")
        found[f"torch eager, {name}"] = lambda low=low, condition=condition: eager(low, x, condition, noise)
        if arguments.no_compile:
            print(f"not measured: torch.compile, {name}: --no-compile")
            continue
        fast = torch.compile(low, dynamic=False)
        found[f"torch.compile, {name}"] = lambda fast=fast, condition=condition: eager(fast, x, condition, noise)
    return found


def copy_of(head: DiffusionHead, arguments: argparse.Namespace, dtype: torch.dtype) -> DiffusionHead:
    low = DiffusionHead(arguments.channels, CONDITION, arguments.width, arguments.depth).to(arguments.device)
    low.load_state_dict(head.state_dict())
    return low.to(dtype).eval().requires_grad_(False)


def check_parity(
    candidates: dict[str, Sample], wide: Callable[[], Tensor], baselines: dict[torch.dtype, str], dtype: torch.dtype
) -> None:
    """SystemExit unless each is as close to float64 as twice the eager modules of its precision are."""
    truth = wide()
    errors = {name: (sample().double() - truth).abs().max().item() for name, sample in candidates.items()}
    for name, error in errors.items():
        kind = torch.float32 if name.endswith("float32") else dtype
        allowed = 2 * errors[baselines[kind]] + torch.finfo(torch.float32).eps * truth.abs().max().item()
        print(f"parity {name}: off by {error:.2e}, allowed {allowed:.2e}")
        if not error <= allowed:
            sys.exit(f"error: {name} is wrong, nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=512, help="of the network, an even number (%(default)s)")
    parser.add_argument("--width", type=int, default=1024, help="(%(default)s)")
    parser.add_argument("--depth", type=int, default=6, help="(%(default)s)")
    parser.add_argument("--channels", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="1 to 32 (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(float32; on a GPU bfloat16)")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads, for all alike (torch's default)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes its time first")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    arguments = parser.parse_args()
    for name in ("rows", "width", "depth", "channels", "steps", "rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if arguments.rows % 2 or arguments.steps > SCHEDULE.num_steps:
        parser.error(f"--rows must be even and --steps at most 32, got {arguments.rows} and {arguments.steps}")
    arguments.dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    torch.manual_seed(0)
    half, dtype = arguments.rows // 2, getattr(torch, arguments.dtype)
    head = head_of(arguments)
    x = torch.randn(half, arguments.channels, device=arguments.device)
    hidden = torch.randn(arguments.rows, CONDITION, device=arguments.device)
    noise = torch.randn(arguments.steps, half, arguments.channels, device=arguments.device)
    candidates = implementations(arguments, head, x, hidden, noise)
    baselines = {kind: f"torch eager, {str(kind).removeprefix('torch.')}" for kind in (torch.float32, dtype)}
    wide = copy_of(head, arguments, torch.float64)
    check_parity(candidates, lambda: eager(wide, x.double(), hidden.double(), noise.double()), baselines, dtype)
    results = summary(interleave(candidates, arguments.rounds, arguments.device))

    torch_best = min((name for name in results if name.startswith("torch")), key=lambda n: results[n]["median_ms"])
    weights = pack_head(head)
    layers = (weights.modulation_weight, weights.hidden_weight, weights.block_weight, weights.output_weight)
    # the input projection sees one half; embedding the condition, once for all steps, is left out
    flop = arguments.steps * arguments.rows * (2 * sum(w.numel() for w in layers) + weights.input_weight.numel())
    more = {
        "fastest_torch": torch_best,
        "speedup": {n: results[torch_best]["median_ms"] / r["median_ms"] for n, r in results.items() if n in BACKENDS},
        "tflop_per_s": {name: flop / result["median_ms"] / 1e9 for name, result in results.items()},
    }
    names = ("rows", "width", "depth", "channels", "steps", "dtype", "rounds")
    shape = {name: getattr(arguments, name) for name in names}
    print_results("denoise_step", arguments.device, shape, results, **more)


if __name__ == "__main__":
    main()

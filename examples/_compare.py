"""What the examples share: a codebase that may not be there, and one call of a head, as it is and patched."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import nn

from dcar_fast.integrations import patch_diffloss


def repository(description: str) -> argparse.ArgumentParser:
    """A parser with --repo, the checkout of the other codebase."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repo", required=True, help="checkout of the other codebase")
    return parser


def reach(repo: str, needed: str) -> None:
    """Makes the checkout importable; says so and exits where it is not there."""
    if not (Path(repo) / needed).exists():
        sys.exit(f"{repo} holds no {needed}: give --repo the checkout of the other codebase")
    sys.path.insert(0, repo)


def missing(error: ImportError) -> None:
    """Says what the other codebase needs."""
    sys.exit(f"the other codebase cannot be imported here: {error}")


def compare(head: nn.Module, condition: int, rows: int = 64, cfg: float = 2.0) -> None:
    """Samples with and without the patch, from the same seed, and prints times and difference.

    Without a GPU the original, which moves its noise to one, is run with these moves switched off.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    for parameter in head.parameters():  # fresh heads return zeros
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    # small outputs: at t = 999 the unclipped schedule multiplies them by 2e4, random ones would overflow
    head.net.final_layer.linear.weight.data *= 1e-3
    head.net.final_layer.linear.bias.data *= 1e-3
    head = head.eval().to(device)
    z = torch.randn(rows, condition, generator=generator).to(device)

    def sample() -> tuple[torch.Tensor, float]:
        torch.manual_seed(1)
        start = time.perf_counter()
        found = head.sample(z, cfg=cfg)
        if device == "cuda":
            torch.cuda.synchronize()
        return found, time.perf_counter() - start

    moves = torch.Tensor.cuda
    if device == "cpu":
        torch.Tensor.cuda = lambda tensor, *given, **named: tensor
    sample()
    before, original = sample()
    torch.Tensor.cuda = moves
    with patch_diffloss(head) as patch:
        print(patch.explain())
        sample()
        after, patched = sample()
    difference = ((after - before).abs().max() / before.abs().max()).item()
    print(f"original {original * 1e3:.0f} ms, patched {patched * 1e3:.0f} ms, largest difference {difference:.1e}")

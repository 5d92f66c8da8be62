"""Seams: what tiles that overlap too little do to the image, and what exact ones cost.

    python benchmarks/decoder_tiling.py                     # the full-size decoder with random weights
    python benchmarks/decoder_tiling.py --weights FOLDER    # with the weights of a pipeline

Prints a table by overlap: largest and root mean square error against the whole image, PSNR for images in [-1, 1], time.
With random weights the decoder's errors are of the right order only: a trained one reacts to other things.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor

from dcar_fast.config import preset
from dcar_fast.engine.decoder import FastDecoder
from dcar_fast.models.tokenizer import DCHT


def load(weights: str | None, name: str) -> DCHT:
    if weights is not None:
        from dcar_fast.pipeline import DCARPipeline

        return DCARPipeline.from_pretrained(weights).tokenizer
    torch.manual_seed(0)
    return DCHT(preset(name).tokenizer).eval().requires_grad_(False)


def decode(decoder: FastDecoder, ids: Tensor, residual: Tensor) -> tuple[Tensor, float]:
    start = time.perf_counter()
    images = decoder.decode_tokens(ids, residual).float()
    if images.is_cuda:
        torch.cuda.synchronize()
    return images, time.perf_counter() - start


def row(label: str, got: Tensor, whole: Tensor, seconds: float) -> str:
    error = (got - whole).double()
    mean = error.square().mean().item()
    psnr = "inf" if mean == 0 else f"{10 * math.log10(4 / mean):.1f}"
    return f"| {label} | {error.abs().max():.2e} | {math.sqrt(mean):.2e} | {psnr} | {seconds:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="dc-ar-512")
    parser.add_argument("--weights", help="folder of a saved pipeline")
    parser.add_argument("--side", type=int, default=16, help="latents a side")
    parser.add_argument("--tile", type=int, default=4, help="latents a side")
    parser.add_argument("--overlaps", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", help="write whole, worst and difference here, side by side (PNG)")
    args = parser.parse_args()
    tokenizer, dtype = load(args.weights, args.preset).to(args.device), getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(0)
    size = (1, args.side, args.side)
    ids = torch.randint(tokenizer.config.codebook_size, size, generator=generator).to(args.device)
    shape = (1, args.side**2, tokenizer.config.latent_channels)
    residual = 0.05 * torch.randn(shape, generator=generator).to(args.device)
    decode(FastDecoder(tokenizer, dtype), ids[:, :1, :1], residual[:, :1])  # packs
    whole, seconds = decode(FastDecoder(tokenizer, dtype), ids, residual)
    print(f"{args.side} x {args.side} latents, tiles of {args.tile}, {args.dtype}, range of the image {_range(whole)}")
    print("| overlap | max error | rms error | PSNR dB | seconds |\n|---|---|---|---|---|")
    print(row("whole image", whole, whole, seconds))
    worst = None
    for overlap in [*args.overlaps, None]:
        got, seconds = decode(FastDecoder(tokenizer, dtype, tile=args.tile, overlap=overlap), ids, residual)
        worst = got if worst is None else worst
        print(row("exact" if overlap is None else str(overlap), got, whole, seconds), flush=True)
    if args.save:
        _save(args.save, whole, worst)


def _range(image: Tensor) -> str:
    return f"{image.min():.2f}..{image.max():.2f}"


def _save(path: str, whole: Tensor, other: Tensor) -> None:
    """Whole, other, and their difference ten times as strong; stretched to what the image spans."""
    from PIL import Image

    low, high = whole.min(), whole.max()
    strips = [(whole - low) / (high - low), (other - low) / (high - low), 0.5 + 10 * (other - whole) / (high - low)]
    pixels = (torch.cat(strips, dim=3)[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy()
    Image.fromarray(pixels).save(path)


if __name__ == "__main__":
    main()

"""vq_lookup against PyTorch and libraries: every usable backend; cdist + argmin, and matmul + max in blocks, plain and
compiled; faiss's exact inner-product index and vector-quantize-pytorch's cosine quantiser where they are installed.

    python benchmarks/kernels/vq_lookup.py [--rows 4096 --codes 16384 --channels 32] [--rounds 15]
        [--train] [--no-compile] [--threads N] [--device cpu]

First every implementation must find the same codes (up to float64 cosines that differ by less than float32 rounding);
then they are timed in turns. All of them normalise rows and codes within the timed call. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _compare import interleave, print_results, summary  # makes dcar_fast importable, so it is first
from torch import Tensor

from dcar_fast.ops import _native, report, vq_lookup
from dcar_fast.ops._dispatch import BACKENDS

Lookup = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
BLOCKS = ((256, 16384), (512, 2048), (1024, 1024), (4096, 512))  # rows x codes whose scores exist at a time
CDIST_ROWS = 512


def finish(z: Tensor, codes: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chosen = codes[ids]
    return ids, chosen, z - chosen


def by_cdist(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z, codes = F.normalize(z, dim=1), F.normalize(codebook, dim=1)
    return finish(z, codes, torch.cat([torch.cdist(rows, codes).argmin(1) for rows in z.split(CDIST_ROWS)]))


def best_of(rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    found = (rows @ codes.T).max(1)
    return found.values, found.indices


def by_matmul(rows_per_block: int, codes_per_block: int, best_of: Callable = best_of) -> Lookup:
    """Scores of a block at a time, their maximum kept with a strict comparison over the blocks of codes."""

    def lookup(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, codes = F.normalize(z, dim=1), F.normalize(codebook, dim=1)
        found = []
        for rows in z.split(rows_per_block):
            best, ids = best_of(rows, codes[:codes_per_block])
            for start in range(codes_per_block, len(codes), codes_per_block):
                score, index = best_of(rows, codes[start : start + codes_per_block])
                better = score > best
                best, ids = torch.where(better, score, best), torch.where(better, index + start, ids)
            found.append(ids)
        return finish(z, codes, torch.cat(found))

    return lookup


def by_faiss(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    z, codes = F.normalize(z, dim=1), F.normalize(codebook, dim=1)
    index = faiss.IndexFlatIP(codes.shape[1])
    index.add(codes.numpy())
    return finish(z, codes, torch.from_numpy(index.search(z.numpy(), 1)[1][:, 0]))


def by_vector_quantize_pytorch(codebook: Tensor) -> Lookup:
    from vector_quantize_pytorch import VectorQuantize

    num_codes, channels = codebook.shape
    quantizer = VectorQuantize(dim=channels, codebook_size=num_codes, use_cosine_sim=True)
    quantizer = quantizer.eval().to(codebook.device)

    def lookup(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = F.normalize(codebook, dim=1)
        quantizer._codebook.embed.copy_(codes[None])
        return finish(F.normalize(z, dim=1), codes, quantizer(z[None])[1][0])

    return lookup


def implementations(device: str, codebook: Tensor, compiled: bool) -> dict[str, Lookup]:
    """Name -> function of (z, codebook); for what cannot run here the reason is printed."""
    found: dict[str, Lookup] = {}
    for name, (usable, reason) in report(device)["vq_lookup"].items():
        if usable:
            found[name] = lambda z, codebook, name=name: vq_lookup(z, codebook, backend=name)
        else:
            print(f"not measured: {name}: {reason}")
    found["torch cdist + argmin"] = by_cdist
    for rows, codes in BLOCKS:
        found[f"torch matmul + max, {rows} x {codes}"] = by_matmul(rows, codes)
        if compiled:
            name = f"torch.compile(matmul + max), {rows} x {codes}"
            found[name] = by_matmul(rows, codes, torch.compile(best_of, dynamic=False))
    if not compiled:
        print("not measured: torch.compile: --no-compile")
    for package, why_not, make in (
        ("faiss", None if device == "cpu" else "measured on the CPU only", lambda: by_faiss),
        ("vector_quantize_pytorch", None, lambda: by_vector_quantize_pytorch(codebook)),
    ):
        if why_not is None and importlib.util.find_spec(package) is None:
            why_not = "not installed"
        if why_not is None:
            found[package] = make()
        else:
            print(f"not measured: {package}: {why_not}")
    return found


def check_parity(candidates: dict[str, Lookup], z: Tensor, codebook: Tensor) -> None:
    """SystemExit unless each finds codes whose float64 cosine is the largest up to rounding, and their residuals."""
    wide_z, wide_codes = F.normalize(z.double(), dim=1), F.normalize(codebook.double(), dim=1)
    best = torch.cat([(rows @ wide_codes.T).max(1).values for rows in wide_z.split(512)])
    for name, lookup in candidates.items():
        ids, codes, residual = lookup(z, codebook)
        chosen = wide_codes[ids]
        lost = (best - (wide_z * chosen).sum(1)).max().item()
        error = max((codes - chosen).abs().max().item(), (residual - (wide_z - chosen)).abs().max().item())
        print(f"parity {name}: best cosine missed by {lost:.1e}, values off by {error:.1e}")
        if lost > 1e-6 or error > 1e-6:
            sys.exit(f"error: {name} is wrong, nothing was timed")


def training(name: str, lookup: Lookup, gradient: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The look-up and z's straight-through gradient for ``gradient`` at the codes: by the op itself, or as people write
    it around a look-up that has none."""

    def step(z: Tensor, codebook: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        if name in BACKENDS:
            codes = lookup(z, codebook)[1]
        else:
            with torch.no_grad():
                found = lookup(z, codebook)[1]
            normalised = F.normalize(z, dim=1)
            codes = normalised + (found - normalised).detach()
        return torch.autograd.grad(codes, z, gradient)[0]

    return step


def check_gradients(
    steps: dict[str, Callable[[Tensor, Tensor], Tensor]], z: Tensor, codebook: Tensor, gradient: Tensor
) -> None:
    """SystemExit unless each is the gradient of normalising, in float64."""
    wide = z.double().requires_grad_()
    truth = torch.autograd.grad(F.normalize(wide, dim=1), wide, gradient.double())[0]
    for name, step in steps.items():
        error = ((step(z, codebook) - truth).abs().max() / truth.abs().max()).item()
        print(f"parity {name}: gradient off by {error:.1e} of the largest")
        if not error <= 1e-5:
            sys.exit(f"error: the gradient of {name} is wrong, nothing was timed")


def extra_memory(z: Tensor, codebook: Tensor) -> float | None:
    """MiB by which the native backend raises the process's peak memory beyond its outputs; None without it."""
    if not _native.cpu_usable(z.device).ok:
        return None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    outputs = vq_lookup(z, codebook, backend="native")
    kept = sum(output.numel() * output.element_size() for output in outputs)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10 - kept / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4096, help="(%(default)s)")
    parser.add_argument("--codes", type=int, default=16384, help="(%(default)s)")
    parser.add_argument("--channels", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads, for all alike (torch's default)")
    parser.add_argument("--train", action="store_true", help="time the look-up and its straight-through gradient")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes its time first")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    arguments = parser.parse_args()
    for name in ("rows", "codes", "channels", "rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    torch.manual_seed(0)
    z = torch.randn(arguments.rows, arguments.channels, device=arguments.device)
    codebook = torch.randn(arguments.codes, arguments.channels, device=arguments.device)
    memory = extra_memory(z, codebook)
    candidates = implementations(arguments.device, codebook, not arguments.no_compile)
    check_parity(candidates, z, codebook)
    if arguments.train:
        gradient = torch.randn_like(z)
        candidates = {name: training(name, lookup, gradient) for name, lookup in candidates.items()}
        check_gradients(candidates, z, codebook, gradient)
    calls = {name: (lambda lookup=lookup: lookup(z, codebook)) for name, lookup in candidates.items()}
    results = summary(interleave(calls, arguments.rounds, arguments.device))

    torch_best = min((name for name in results if name.startswith("torch")), key=lambda n: results[n]["median_ms"])
    flop = 2 * arguments.rows * arguments.codes * arguments.channels
    # rows, codes, ids, codes and residuals once each; what the algorithm reads again is its own affair
    size = sum(x.nbytes for x in (z, codebook, *vq_lookup(z, codebook)))
    more = {
        "fastest_torch": torch_best,
        "speedup": {n: results[torch_best]["median_ms"] / r["median_ms"] for n, r in results.items() if n in BACKENDS},
        "gflop_per_s": {name: flop / result["median_ms"] / 1e6 for name, result in results.items()},
        "gb_per_s": {name: size / result["median_ms"] / 1e6 for name, result in results.items()},
        "dtype": "float32",
        "native_extra_mib": memory,
        "cpu_isa": _native.module().vq_lookup_isas()[0] if memory is not None else None,
    }
    shape = {name: getattr(arguments, name) for name in ("rows", "codes", "channels", "rounds", "train")}
    print_results("vq_lookup", arguments.device, shape, results, **more)


if __name__ == "__main__":
    main()

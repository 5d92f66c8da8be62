"""PSNR, SSIM and FID with torchmetrics, and what a tokenizer's reconstructions are worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dcar_fast.images import tensor_to_pixels
from dcar_fast.models.tokenizer import DCHT

PATHS = ("hybrid", "discrete")
MOST_PSNR = 100.0  # dB, for a picture that comes back to the last bit: infinity has no mean
FEW = 2048  # pictures: with fewer than features the covariance is singular, and FID far too high


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 twice -> (B,) float32: peak signal-to-noise ratio of each picture in dB, inf if equal."""
    _check_pair(images, references)
    peak_signal_noise_ratio = _functional().peak_signal_noise_ratio
    pair = (images.double() / 255, references.double() / 255)
    return peak_signal_noise_ratio(*pair, data_range=1.0, reduction="none", dim=(1, 2, 3)).float()


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 twice -> (B,) float32: structural similarity of each picture (Wang et al., 2004;
    Gaussian window, sigma 1.5)."""
    _check_pair(images, references)
    structural_similarity = _functional().structural_similarity_index_measure
    pair = (images.double() / 255, references.double() / 255)
    return structural_similarity(*pair, data_range=1.0, reduction="none").reshape(len(images)).float()


class Fid:
    """Fréchet distance of two sets of pictures in a network's features (M. Heusel et al., 2017), by torchmetrics.

    network: (B, 3, H, W) uint8 -> (B, ``num_features``), such as :func:`dcar_fast.evaluation.inception.load_inception`
    gives. Features of real pictures are computed once for all sets that are compared with them.
    """

    def __init__(self, network: nn.Module, sets: Iterable[str] = ("generated",)) -> None:
        _functional()  # says what to install if it is not there
        from torchmetrics.image.fid import FrechetInceptionDistance

        if not isinstance(getattr(network, "num_features", None), int):
            raise ValueError(f"network must have an integer num_features, {type(network).__name__} has none")
        self.network, self._metrics = network, {}
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        for name in sets:
            taken = nn.Identity()  # the metric is given features, not pictures
            taken.num_features = network.num_features
            self._metrics[name] = FrechetInceptionDistance(feature=taken).to(device)
        self._device, self.counts = device, {"real": 0, **dict.fromkeys(self._metrics, 0)}

    @torch.no_grad()
    def add(self, images: Tensor, to: str) -> None:
        """images (B, 3, H, W) uint8, any size; to: "real" or one of the sets."""
        features = self.network(images.to(self._device))
        for metric in self._metrics.values() if to == "real" else (self._metrics[to],):
            metric.update(features, real=to == "real")
        self.counts[to] += len(images)

    def compute(self) -> dict[str, float]:
        """FID by set; ``ValueError`` for fewer than two pictures in one of them."""
        for name, count in self.counts.items():
            if count < 2:
                raise ValueError(f"FID needs at least 2 {name} pictures, got {count}")
        # rounding can make a vanishing distance negative
        return {name: max(0.0, float(metric.compute())) for name, metric in self._metrics.items()}


def fid(real: Iterable[Tensor], generated: Iterable[Tensor], network: nn.Module) -> dict[str, Any]:
    """{"fid", "real_pictures", "generated_pictures"} of batches (B, 3, H, W) uint8."""
    meter = Fid(network)
    for name, batches in (("real", real), ("generated", generated)):
        for images in batches:
            meter.add(images, name)
    found = meter.compute()["generated"]
    return {"fid": found, "real_pictures": meter.counts["real"], "generated_pictures": meter.counts["generated"]}


@torch.no_grad()
def evaluate_reconstruction(
    tokenizer: DCHT,
    batches: Iterable[Tensor],
    network: nn.Module | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """How well pictures survive the tokenizer: batches (B, 3, H, W) uint8 with sides it can take.

    Returns "pictures", and by path ("hybrid", "discrete") the means over pictures of "psnr" (dB, at most
    100 for each) and "ssim", and "rfid"
    where a ``network`` is given, all of the reconstructions as 8-bit pictures; "codebook": "usage" (share of the codes
    chosen at least once) and "perplexity" (exp of the entropy of the choices). The tokenizer works in eval mode and is
    left as it was; progress: is called with the size of every batch that is done. ``ValueError`` for no pictures.
    """
    device = tokenizer.quantizer.embedding.weight.device
    sums = {path: {"psnr": 0.0, "ssim": 0.0} for path in PATHS}
    codes = torch.zeros(tokenizer.config.codebook_size, dtype=torch.int64, device=device)
    meter, pictures = Fid(network, PATHS) if network is not None else None, 0
    training = {module: module.training for module in tokenizer.modules()}
    tokenizer.eval()
    try:
        for images in batches:
            images = images.to(device)
            tokens = tokenizer.encode(images.float() / 127.5 - 1)
            codes += tokens.ids.flatten().bincount(minlength=len(codes))
            if meter:
                meter.add(images, "real")
            for path, latents in zip(PATHS, (tokens.features, tokens.quantized), strict=True):
                result = tensor_to_pixels(tokenizer.decode(latents)).permute(0, 3, 1, 2).contiguous()
                sums[path]["psnr"] += float(psnr(result, images).double().clamp(max=MOST_PSNR).sum())
                sums[path]["ssim"] += float(ssim(result, images).double().sum())
                if meter:
                    meter.add(result, path)
            pictures += len(images)
            progress(len(images))
    finally:
        for module, mode in training.items():
            module.training = mode
    if not pictures:
        raise ValueError("batches: there must be at least one picture")
    found: dict[str, Any] = {"pictures": pictures}
    distances = meter.compute() if meter else {}
    for path in PATHS:
        found[path] = {name: total / pictures for name, total in sums[path].items()}
        if path in distances:
            found[path]["rfid"] = distances[path]
    shares = codes.double() / codes.sum()
    entropy = -float(torch.xlogy(shares, shares).sum())
    found["codebook"] = {"usage": int((codes > 0).sum()) / len(codes), "perplexity": math.exp(entropy)}
    return found


def _functional():
    try:
        import torchmetrics.functional.image as functional
    except ImportError as error:
        raise ValueError(f"evaluation needs torchmetrics: pip install -e '.[train]' ({error})") from error
    return functional


def _check_pair(images: Tensor, references: Tensor) -> None:
    for name, tensor in (("images", images), ("references", references)):
        if tensor.dtype != torch.uint8 or tensor.dim() != 4 or tensor.shape[1] != 3:
            raise ValueError(f"{name} must be (B, 3, H, W) uint8, got {tensor.dtype} {tuple(tensor.shape)}")
    if images.shape != references.shape:
        raise ValueError(f"images {tuple(images.shape)} and references {tuple(references.shape)} must be equally large")

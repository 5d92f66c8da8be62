"""The PatchGAN discriminator, its hinge losses and the adaptive weight of the adversarial loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_fast.training.sync_batch_norm import distributed, sum_over_processes

MAX_ADAPTIVE_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """pix2pix' PatchGAN (Isola et al. 2017): one logit per overlapping patch of 70 pixels (with 3 layers).

    ``layers`` 4x4 convolutions of stride 2, then two of stride 1; leaky ReLU 0.2; widths double from ``width`` up to 8
    times as many. GroupNorm takes the place of BatchNorm: an image's logits then depend on nothing but the image, so
    real and generated pictures do not leak into each other's statistics, and any split of the global batch over
    processes and micro-batches gives the same losses.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        for name, value in (("width", width), ("layers", layers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.layers = layers
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            blocks.append(nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False))
            blocks += [nn.GroupNorm(_groups(widths[i]), widths[i]), nn.LeakyReLU(0.2)]
        blocks.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.blocks = nn.Sequential(*blocks)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) float in [-1, 1] -> logits (B, 1, H', W') float32, positive: looks real."""
        least = smallest_side(self.layers)
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < least:
            raise ValueError(
                f"images must be (B, 3, H, W) with sides of at least {least} pixels for {self.layers} layers, "
                f"got {tuple(images.shape)}"
            )
        return self.blocks(images).float()


def smallest_side(layers: int) -> int:
    """The smallest side in pixels that leaves a logit: strides halve it, the last two convolutions take 1 each."""
    return 3 * 2**layers


def _groups(channels: int) -> int:
    """At most 32 groups, and as many as divide the channels."""
    return next(groups for groups in range(min(32, channels), 0, -1) if channels % groups == 0)


def _initialise(module: nn.Module) -> None:
    """pix2pix: N(0, 0.02) weights, zero biases, norms N(1, 0.02)."""
    if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
        nn.init.normal_(module.weight, 0.0 if isinstance(module, nn.Conv2d) else 1.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def hinge_loss(real: Tensor, generated: Tensor) -> Tensor:
    """The discriminator's loss: (mean max(0, 1 - real) + mean max(0, 1 + generated)) / 2, from logits."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + generated).mean())


def adversarial_loss(generated: Tensor) -> Tensor:
    """The generator's hinge loss: -mean of the logits."""
    return -generated.mean()


def adaptive_weight(images: Tensor, last_weight: Tensor, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """|gradient of the reconstruction loss| / (|gradient of the adversarial loss| + 1e-4) at the decoder's last layer,
    at most 1e4 (Esser et al. 2021, VQGAN, equation 7); a scalar without gradient, the same on all processes.

    images (B, 3, H, W) with their graph back to ``last_weight``; reconstruction and adversarial: the two losses'
    gradients with respect to the images. Under several processes the ratio is that of the averaged gradients, which
    are the global batch's.
    """
    norms = []
    for gradient in (reconstruction, adversarial):
        (at_weight,) = torch.autograd.grad(images, last_weight, gradient.to(images.dtype), retain_graph=True)
        at_weight = sum_over_processes(at_weight.float().contiguous())
        norms.append(at_weight.norm() / (torch.distributed.get_world_size() if distributed() else 1))
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=MAX_ADAPTIVE_WEIGHT)

"""The patch discriminator, its losses and the adaptive weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dcar_fast.training.discriminator import PatchDiscriminator, adaptive_weight, adversarial_loss, hinge_loss


def images(batch: int = 2, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_layout_and_receptive_field_are_pix2pix():
    model = PatchDiscriminator(4)
    assert [(m.in_channels, m.out_channels, m.stride[0]) for m in model.blocks if isinstance(m, nn.Conv2d)] == [
        (3, 4, 2), (4, 8, 2), (8, 16, 2), (16, 32, 1), (32, 1, 1)
    ]  # fmt: skip
    plain = nn.Sequential(*[m for m in model.blocks if not isinstance(m, nn.GroupNorm)])  # norms see the whole image
    x = images(1, 256, 256).requires_grad_()
    logits = plain(x)
    assert logits.shape == (1, 1, 30, 30)
    logits[0, 0, 15, 15].backward()
    rows = x.grad.abs().sum(dim=(0, 1, 3)).nonzero()[:, 0]
    assert rows[-1] - rows[0] + 1 == 70


def test_an_image_is_judged_alone():
    model = PatchDiscriminator(8, 2)
    x = images(3)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


def test_smallest_image_gives_one_row_of_logits():
    model = PatchDiscriminator(4, 2)
    assert model(images(1, 12, 13)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"at least 12 pixels for 2 layers, got \(1, 3, 11, 12\)"):
        model(images(1, 11, 12))
    with pytest.raises(ValueError, match=r"\(1, 1, 32, 32\)"):
        model(images(1)[:, :1])


@pytest.mark.parametrize("options", [{"width": 0}, {"layers": 0}, {"width": True}, {"width": 1.0}])
def test_bad_sizes_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be a positive integer"):
        PatchDiscriminator(**options)


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert adversarial_loss(fake).item() == pytest.approx(2 / 3)


def test_adaptive_weight_is_the_ratio_of_full_gradients():
    """The ratio through the losses' gradients at the pictures is the one through the whole graph."""
    torch.manual_seed(0)
    layer, judge, target = nn.Conv2d(3, 3, 3, padding=1), PatchDiscriminator(4, 2), images()
    made = layer(images() * 0.5)
    losses = [F.mse_loss(made, target), adversarial_loss(judge(made))]
    norms = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in losses]
    leaf = made.detach().requires_grad_()
    at_images = [torch.autograd.grad(f(leaf), leaf)[0] for f in (lambda x: F.mse_loss(x, target), lambda x: adversarial_loss(judge(x)))]  # fmt: skip  # noqa: E501
    got = adaptive_weight(made, layer.weight, *at_images)
    torch.testing.assert_close(got, norms[0] / (norms[1] + 1e-4))
    assert not got.requires_grad and layer.weight.grad is None


def test_adaptive_weight_is_at_most_ten_thousand():
    weight = torch.ones(1, requires_grad=True)
    made = weight * torch.ones(4)
    assert adaptive_weight(made, weight, torch.full((4,), 100.0), torch.zeros(4)).item() == 1e4
    assert adaptive_weight(made, weight, torch.full((4,), 0.01), torch.zeros(4)).item() == pytest.approx(400)

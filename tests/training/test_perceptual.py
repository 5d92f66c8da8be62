"""LPIPS against torchmetrics' (the authors' code), on random backbones written to a file."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from dcar_fast.training.perceptual import BACKBONES, LPIPS, load_perceptual


def backbone(name: str) -> nn.Sequential:
    """torchvision's ``features`` of VGG-16 or AlexNet with random weights."""
    layers, window = BACKBONES[name]
    modules: list[nn.Module] = []
    channels = 3
    for layer in layers:
        if layer == "pool":
            modules.append(nn.MaxPool2d(window, 2))
        elif layer != "out":
            modules += [nn.Conv2d(channels, *layer), nn.ReLU()]
            channels = layer[0]
    modules.append(nn.MaxPool2d(window, 2))
    return nn.Sequential(*modules)


def written(name: str, path, drop: str = "", prefix: str = "features."):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        features = backbone(name)
        for module in features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.normal_(module.bias, std=0.1)
    state = {prefix + key: value for key, value in features.state_dict().items() if key != drop}
    torch.save({**state, "classifier.0.weight": torch.zeros(2)}, path)
    return features


def images(size: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def reference(name: str, features: nn.Sequential, monkeypatch) -> nn.Module:
    """torchmetrics' LPIPS on the same backbone: what it would ask torchvision for is replaced by ours."""
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips", reason="the train extra is not installed")
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained=False: features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return theirs._LPIPS(net=name, pretrained=True, use_dropout=True).eval()


@pytest.mark.parametrize("name", ["vgg", "alex"])
def test_equals_torchmetrics(name, tmp_path, monkeypatch):
    """Which differs in how it keeps away from a division by zero: sqrt(squares + 1e-8)."""
    features = written(name, tmp_path / "weights.pth")
    expected = reference(name, features, monkeypatch)
    mine = LPIPS(tmp_path / "weights.pth")
    a, b = images(), images(seed=1)
    theirs_in, ours_in = (a.clone().requires_grad_() for _ in range(2))
    theirs, ours = expected(theirs_in, b).mean(), mine(ours_in, b)
    theirs.backward()
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-4, atol=1e-8)
    assert ours.item() > 1e-3 and ours_in.grad.abs().max() > 0


def test_equal_images_have_distance_and_gradient_zero(tmp_path):
    written("alex", tmp_path / "weights.pth")
    mine = LPIPS(tmp_path / "weights.pth")
    same = images().requires_grad_()
    distance = mine(same, same.detach())
    distance.backward()
    assert distance.item() == 0 and (same.grad == 0).all()


def test_black_features_give_finite_gradients(tmp_path):
    """Where the ReLU leaves nothing at a pixel, a square root has no gradient."""
    features = written("alex", tmp_path / "weights.pth")
    state = {f"features.{k}": torch.full_like(v, -1.0) for k, v in features.state_dict().items()}
    torch.save(state, tmp_path / "dead.pth")
    image = images().abs().requires_grad_()
    LPIPS(tmp_path / "dead.pth")(image, images(seed=1)).backward()
    assert image.grad.isfinite().all()


def test_nothing_in_it_is_trained(tmp_path):
    written("alex", tmp_path / "weights.pth", prefix="")
    assert not any(p.requires_grad for p in LPIPS(tmp_path / "weights.pth").parameters())


def test_off_without_weight_or_file(tmp_path):
    assert load_perceptual("", 1.0) is None and load_perceptual(tmp_path / "missing.pth", 0.0) is None
    with pytest.raises(ValueError, match="lpips_weights.*missing.pth does not exist"):
        load_perceptual(tmp_path / "missing.pth", 1.0)


def test_foreign_files_are_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(7, 3, 3, 3)}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match=r"neither VGG-16 nor AlexNet.*\(7, 3, 3, 3\)"):
        LPIPS(tmp_path / "foreign.pth")
    written("alex", tmp_path / "half.pth", drop="3.bias")
    with pytest.raises(ValueError, match=r"features.3.bias is None instead of \(192,\)"):
        LPIPS(tmp_path / "half.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(ValueError, match="no readable PyTorch checkpoint"):
        LPIPS(tmp_path / "torn.pth")


@pytest.mark.parametrize(("name", "least"), [("vgg", 16), ("alex", 31)])
def test_small_and_unequal_images_are_refused(name, least, tmp_path):
    features = written(name, tmp_path / "weights.pth")
    mine = LPIPS(tmp_path / "weights.pth")
    assert mine(images(least), images(least, seed=1)) > 0
    with pytest.raises(ValueError, match=f"sides >= {least}"):
        mine(images(least - 1), images(least - 1))
    with pytest.raises(RuntimeError):  # that is where nothing would be left
        features[:-1](images(least - 1))
    with pytest.raises(ValueError, match="one size"):
        mine(images(40), images(48))

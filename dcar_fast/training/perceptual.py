"""LPIPS, the perceptual distance of Zhang et al. 2018, from local weights.

The arithmetic and the calibrated channel weights (version 0.1) are the authors' (github.com/richzhang/
PerceptualSimilarity); the weights are read from torchmetrics, which carries the authors' files. Its module is not used:
it takes the backbones from torchvision, which is no dependency here, for two plain stacks of convolutions. Their
weights come from a file that torchvision publishes: vgg16-397923af.pth or alexnet-owt-7be5be79.pth.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (channels, kernel, stride, padding) of a convolution with its ReLU, "pool", and "out" where features are taken
_VGG = [(64, 3, 1, 1), (64, 3, 1, 1), "out", "pool", (128, 3, 1, 1), (128, 3, 1, 1), "out", "pool"]
_VGG += [*[(256, 3, 1, 1)] * 3, "out", "pool", *[(512, 3, 1, 1)] * 3, "out", "pool", *[(512, 3, 1, 1)] * 3, "out"]
_ALEX = [(64, 11, 4, 2), "out", "pool", (192, 5, 1, 2), "out", "pool", (384, 3, 1, 1), "out"]
_ALEX += [(256, 3, 1, 1), "out", (256, 3, 1, 1), "out"]
BACKBONES = {"vgg": (_VGG, 2), "alex": (_ALEX, 3)}
"""Name -> layers and the pooling window (stride 2)."""
SMALLEST = {"vgg": 16, "alex": 31}
"""The smallest side in pixels by backbone."""


class LPIPS(nn.Module):
    """Mean over the images of the LPIPS distance; parameters are frozen, gradients reach the images.

    weights: a torchvision checkpoint of VGG-16 or AlexNet (state dict, ``features.N.weight`` ...), which of the two is
    told by its shapes; read with ``weights_only=True``. ``ValueError`` for a file that is none, and without the
    ``torchmetrics`` package, whose folder holds the calibrated channel weights.
    """

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        state = _read(Path(weights))
        self.backbone = _recognise(state, weights)
        layers, self.window = BACKBONES[self.backbone]
        convolutions, channels, outputs = [], 3, []
        for layer in layers:
            if layer == "out":
                outputs.append(channels)
            elif layer != "pool":
                convolutions.append(nn.Conv2d(channels, *layer))
                channels = layer[0]
        self.convolutions = nn.ModuleList(convolutions)
        names = sorted((name for name in state if name.endswith(".weight")), key=lambda name: int(name.split(".")[0]))
        for name, convolution in zip(names, self.convolutions, strict=True):
            _fill(convolution.weight, state, name, weights)
            _fill(convolution.bias, state, name.replace(".weight", ".bias"), weights)
        calibration = _calibration(self.backbone)
        for i, size in enumerate(outputs):
            values = calibration[f"lin{i}.model.1.weight"]  # (1, C, 1, 1)
            self.register_buffer(f"channels{i}", values.view(1, size, 1, 1).float())
        # ImageNet's mean and deviation, for images in [-1, 1]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Both (B, 3, H, W) float in [-1, 1] -> distance, a scalar float32."""
        if images.shape != references.shape or images.dim() != 4 or min(images.shape[2:]) < SMALLEST[self.backbone]:
            raise ValueError(
                f"LPIPS compares images (B, 3, H, W) of one size, sides >= {SMALLEST[self.backbone]} pixels for "
                f"{self.backbone}, got {tuple(images.shape)} and {tuple(references.shape)}"
            )
        total = torch.zeros((), device=images.device)
        with torch.no_grad():
            expected = self._features(references)
        for i, (mine, theirs) in enumerate(zip(self._features(images), expected, strict=True)):
            weight = getattr(self, f"channels{i}")
            total = total + ((_unit(mine) - _unit(theirs)).square() * weight).sum(dim=1).mean()
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        """Activations (B, C_i, h_i, w_i) at the layers marked "out"."""
        x, features, convolutions = (images - self.shift) / self.scale, [], iter(self.convolutions)
        for layer in BACKBONES[self.backbone][0]:
            if layer == "out":
                features.append(x)
            elif layer == "pool":
                x = F.max_pool2d(x, self.window, stride=2)
            else:
                x = F.relu(next(convolutions)(x))
        return features


def load_perceptual(weights: str | Path, weight: float) -> LPIPS | None:
    """The perceptual loss for a run, or None if ``weight`` is 0 or no weights are given."""
    return LPIPS(weights) if weight and str(weights) else None


def _unit(features: Tensor) -> Tensor:
    """Unit length over the channels, as the authors do it: / (norm + 1e-10)."""
    features = features.float()
    # a square root has no gradient at 0, where a whole pixel's features are cut off by their ReLU
    squares = features.square().sum(dim=1, keepdim=True)
    norm = torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)
    return features / (norm + 1e-10)


def _read(path: Path) -> dict[str, Tensor]:
    """The convolutions' tensors by torchvision's names without ``features.``."""
    if not path.is_file():
        raise ValueError(f"lpips_weights: {path} does not exist; it is torchvision's vgg16-397923af.pth or AlexNet's")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the unpickler raise
        raise ValueError(f"lpips_weights: {path} is no readable PyTorch checkpoint: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"lpips_weights: {path} holds {type(state).__name__}, not a dict of tensors")
    state = {str(name).removeprefix("features."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in state.items() if name.split(".")[0].isdigit()}


def _recognise(state: dict[str, Tensor], path: str | Path) -> str:
    first = state.get("0.weight")
    for backbone, (layers, _) in BACKBONES.items():
        channels, kernel = layers[0][:2]
        weights = [name for name in state if name.endswith(".weight")]
        if first is not None and tuple(first.shape) == (channels, 3, kernel, kernel):
            if len(weights) == sum(isinstance(layer, tuple) for layer in layers):
                return backbone
    found = None if first is None else tuple(first.shape)
    raise ValueError(f"lpips_weights: {path} is neither VGG-16 nor AlexNet (features.0.weight: {found})")


def _fill(parameter: nn.Parameter, state: dict[str, Tensor], name: str, path: str | Path) -> None:
    tensor = state.get(name)
    if tensor is None or tensor.shape != parameter.shape:
        found = None if tensor is None else tuple(tensor.shape)
        raise ValueError(f"lpips_weights: {path}: features.{name} is {found} instead of {tuple(parameter.shape)}")
    parameter.data.copy_(tensor)


def _calibration(backbone: str) -> dict[str, Tensor]:
    spec = find_spec("torchmetrics")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the perceptual loss needs the package torchmetrics: pip install -e '.[train]'")
    path = Path(spec.submodule_search_locations[0]) / "functional" / "image" / "lpips_models" / f"{backbone}.pth"
    return torch.load(path, map_location="cpu", weights_only=True)

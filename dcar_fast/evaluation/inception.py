"""The Inception-v3 network of FID, from a local file of its weights.

It is the network of the 2015 TensorFlow release (1008 classes) that M. Heusel et al. (2017) defined FID with, not
torchvision's: its average pools leave the padding out, and its last block takes a maximum. The names of the tensors are
those of ``pt_inception-2015-12-05-6726825d.pth``, the file that pytorch-fid and torch-fidelity publish.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_fast.checkpoints import load_state, read_safetensors

SIDE = 299  # pixels of the network's input
Resize = Literal["antialias", "tensorflow"]


class Convolution(nn.Module):
    """Convolution without bias, BatchNorm, ReLU; padded so that the size stays, unless ``valid`` or of stride 2."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, valid: bool = False):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (0, 0) if valid or stride == 2 else (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


Layer = tuple[str, int, "int | tuple[int, int]"]  # name, output channels, kernel


class Block(nn.Module):
    """Chains of convolutions side by side, and a pool; what they give is concatenated.

    fork: the last two layers of a chain both take what comes before them. pool "average" and "max" keep the size and
    are followed by a 1x1 convolution; "stride" halves it, as do the chains' last layers.
    """

    def __init__(
        self, inputs: int, chains: list[list[Layer]], forks: list[list[Layer]], pool: str, pool_channels: int = 0
    ) -> None:
        super().__init__()
        self.pool, self.chains, self.forks = pool, [], []
        for layers, names, forked in [(c, self.chains, False) for c in chains] + [(c, self.forks, True) for c in forks]:
            names.append([name for name, _, _ in layers])
            channels = inputs
            for i, (name, outputs, kernel) in enumerate(layers):
                last = i == len(layers) - 1
                self.add_module(name, Convolution(channels, outputs, kernel, 2 if last and pool == "stride" else 1))
                channels = channels if forked and i == len(layers) - 2 else outputs
        if pool != "stride":
            self.branch_pool = Convolution(inputs, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = [self._run(names, x) for names in self.chains]
        for *names, left, right in self.forks:
            before = self._run(names, x)
            found += [getattr(self, left)(before), getattr(self, right)(before)]
        return torch.cat([*found, self._pooled(x)], dim=1)

    def _run(self, names: list[str], x: Tensor) -> Tensor:
        for name in names:
            x = getattr(self, name)(x)
        return x

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "stride":
            return F.max_pool2d(x, 3, 2)
        if self.pool == "max":
            return self.branch_pool(F.max_pool2d(x, 3, 1, 1))
        return self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


class Inception(nn.Module):
    """(B, 3, H, W) uint8 RGB -> (B, 2048) float32, what FID's Gaussians are fitted to.

    resize: to 299 x 299 pixels, "antialias" as torchmetrics does by default, "tensorflow" as the original did (bilinear
    without anti-aliasing, output pixel i at i inputs/299). Figures of different resizing cannot be compared.
    """

    num_features = 2048

    def __init__(self, resize: Resize = "antialias") -> None:
        super().__init__()
        if resize not in ("antialias", "tensorflow"):
            raise ValueError(f"resize must be 'antialias' or 'tensorflow', got {resize!r}")
        self.resize = resize
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, valid=True)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_5(192, 32), _block_5(256, 64), _block_5(288, 64)
        double: list[Layer] = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
        self.Mixed_6a = Block(288, [[("branch3x3", 384, 3)], double], [], "stride")
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_block_6, (128, 160, 160, 192))
        names = ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4")
        kernels = (1, (1, 7), (7, 1), 3)
        chain: list[Layer] = [(name, 192, kernel) for name, kernel in zip(names, kernels, strict=True)]
        self.Mixed_7a = Block(768, [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)], chain], [], "stride")
        self.Mixed_7b, self.Mixed_7c = _block_7(1280, "average"), _block_7(2048, "max")
        self.eval()

    def train(self, mode: bool = True) -> Inception:
        """It stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W) uint8, got {images.dtype} {tuple(images.shape)}")
        x = images.to(self.Conv2d_1a_3x3.conv.weight.dtype)
        if self.resize == "antialias":
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        else:
            x = _resize_tensorflow(x)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3)).float()


def load_inception(path: str | Path, resize: Resize = "antialias") -> Inception:
    """The network with the weights of a local .pth or .safetensors file, on the CPU.

    ``ValueError`` for a file that is missing, damaged, or not of this network (torchvision's, with 1000 classes, is
    named).
    """
    path, network = Path(path), Inception(resize)
    if path.suffix == ".safetensors":
        state = read_safetensors(path)
    elif not path.is_file():
        raise ValueError(f"inception: {path} does not exist")
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged or foreign file makes the unpickler raise
            raise ValueError(f"inception: {path} is no readable PyTorch checkpoint: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"inception: {path} is not a dict of tensors by name")
    if "fc.weight" in state and len(state["fc.weight"]) == 1000:
        raise ValueError(
            f"inception: {path} is torchvision's network; FID needs the one of TensorFlow 2015 with 1008 classes "
            "(pt_inception-2015-12-05-6726825d.pth)"
        )
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):  # not in every copy of the file, and of no use
            state.setdefault(name, tensor)
    load_state(network, state, f"inception: {path}")
    return network


def _block_5(inputs: int, pool_channels: int) -> Block:
    chains: list[list[Layer]] = [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
    ]
    return Block(inputs, chains, [], "average", pool_channels)


def _block_6(width: int) -> Block:
    row, column = (1, 7), (7, 1)
    double = [("1", width, 1), ("2", width, column), ("3", width, row), ("4", width, column), ("5", 192, row)]
    chains: list[list[Layer]] = [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)],
        [(f"branch7x7dbl_{name}", outputs, kernel) for name, outputs, kernel in double],
    ]
    return Block(768, chains, [], "average", 192)


def _block_7(inputs: int, pool: str) -> Block:
    row, column = (1, 3), (3, 1)
    forks: list[list[Layer]] = [
        [("branch3x3_1", 384, 1), ("branch3x3_2a", 384, row), ("branch3x3_2b", 384, column)],
        [
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            ("branch3x3dbl_3a", 384, row),
            ("branch3x3dbl_3b", 384, column),
        ],
    ]
    return Block(inputs, [[("branch1x1", 320, 1)]], forks, pool, 192)


def _resize_tensorflow(x: Tensor) -> Tensor:
    """TensorFlow 1's bilinear: output pixel i is at i * inputs / outputs, without half-pixel shifts."""
    for axis in (2, 3):
        count = x.shape[axis]
        place = torch.arange(SIDE, device=x.device, dtype=torch.float64) * count / SIDE
        low = place.long()
        high = (low + 1).clamp(max=count - 1)
        shape = [1, 1, 1, 1]
        shape[axis] = SIDE
        share = (place - low).to(x.dtype).view(shape)
        x = x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share
    return x

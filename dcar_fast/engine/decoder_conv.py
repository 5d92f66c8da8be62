"""Convolutions laid out once for the device that runs them, with what follows them.

Three ways: Winograd's (``decoder_winograd.py``) for wide 3x3 convolutions on a CPU in float32; oneDNN's packed weights
with fused activation and residual for everything else on a CPU; PyTorch's convolution, on CUDA with cuDNN's fused ReLU
or with bias, activation and residual as one op behind it (``ops.bias_residual``).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dcar_fast import ops
from dcar_fast.engine.decoder_winograd import transformed, winograd
from dcar_fast.ops._dispatch import choose
from dcar_fast.reference.activation import activate

WINOGRAD_CHANNELS = 256  # in and out: with fewer the transforms outweigh the products
SIDE = 64  # of the images that oneDNN lays weights out for; others work as well

_ONEDNN_ACTS = {"none": "none", "relu": "relu", "silu": "swish"}

logger = logging.getLogger(__name__)


def plain(op: str, x: Tensor, backend: str | None) -> bool:
    """Whether nothing but the reference can run the op here: then PyTorch's own formulation in the type of x, as the
    model has it, is the faster one."""
    return backend in (None, "auto") and choose(op, x.device, backend).name == "reference"


class Conv:
    """act(conv(x) + bias), or conv(x) + bias + residual; channels last; "same" padding, stride 1.

    A BatchNorm behind the convolution is folded into its weight and bias, in float32 or better, before rounding.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, norm: nn.BatchNorm2d | None = None) -> None:
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        if norm is not None:
            weight, bias = _folded(weight, bias, norm)
        self.bias = None if bias is None else bias.to(dtype)
        self.padding, self.groups = list(conv.padding), conv.groups
        if _takes_winograd(weight, dtype, conv):
            self.weight, self._run = transformed(weight.to(dtype)), self._winograd
        elif conv.groups == 1 and _onednn_packs(weight, dtype):  # depthwise gains nothing, and ops read the weight
            size = [1, conv.in_channels, SIDE, SIDE]
            pack = torch.ops.mkldnn._reorder_convolution_weight
            self.weight, self._run = (
                pack(weight.to(dtype), self.padding, [1, 1], [1, 1], self.groups, size),
                self._packed,
            )
        else:
            self.weight, self._run = weight.to(dtype=dtype, memory_format=torch.channels_last), self._plain
        self._cudnn_relu = hasattr(torch, "cudnn_convolution_relu")

    def __call__(self, x: Tensor, backend: str | None, act: str = "none", residual: Tensor | None = None) -> Tensor:
        return self._run(x, backend, act, residual)

    def _winograd(self, x: Tensor, backend: str | None, act: str, residual: Tensor | None) -> Tensor:
        y = winograd(x, self.weight, self.bias, act == "relu", residual)
        return F.silu(y, inplace=True) if act == "silu" else y

    def _packed(self, x: Tensor, backend: str | None, act: str, residual: Tensor | None) -> Tensor:
        run = torch.ops.mkldnn._convolution_pointwise
        where = (self.weight, self.bias, self.padding, [1, 1], [1, 1], self.groups)
        if residual is None:
            return run(x, *where, _ONEDNN_ACTS[act], [], "")
        return run.binary(x, residual, *where, "add", 1.0, None, [], None)

    def _plain(self, x: Tensor, backend: str | None, act: str, residual: Tensor | None) -> Tensor:
        if act == "relu" and self._cudnn_relu and x.is_cuda and torch.backends.cudnn.is_acceptable(x):
            y = self._fused_relu(x)
            if y is not None:
                return y
        # PyTorch adds the bias of a cuDNN convolution in a pass of its own; with what else follows it is one
        follows = self.bias is not None and (act != "none" or residual is not None)
        fused = follows and not plain("bias_residual", x, backend)
        y = F.conv2d(x, self.weight, None if fused else self.bias, padding=self.padding, groups=self.groups)
        if fused:
            return ops.bias_residual(y, self.bias, residual=residual, activation=act, backend=backend)
        if residual is not None:
            return y.add_(residual)
        return y.relu_() if act == "relu" else activate(y, act)

    def _fused_relu(self, x: Tensor) -> Tensor | None:
        """None where cuDNN has no such kernel for these shapes; it is not asked again."""
        try:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, [1, 1], self.padding, [1, 1], self.groups)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._cudnn_relu = False
            logger.info("convolution and ReLU run one after the other: cuDNN fuses no such convolution (%s)", error)
            return None


def _folded(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight (O, I, kh, kw) and bias (O,) of norm(conv(x)) as one convolution."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt() * norm.weight.detach().to(wide)
    shift = norm.bias.detach().to(wide) - norm.running_mean.to(wide) * scale
    if bias is not None:
        shift = shift + bias.to(wide) * scale
    return weight.to(wide) * scale[:, None, None, None], shift


def _takes_winograd(weight: Tensor, dtype: torch.dtype, conv: nn.Conv2d) -> bool:
    return (
        _real_cpu(weight)
        and dtype == torch.float32
        and conv.kernel_size == (3, 3)
        and conv.groups == 1
        and min(conv.in_channels, conv.out_channels) >= WINOGRAD_CHANNELS
    )


def _real_cpu(weight: Tensor) -> bool:
    """Fake tensors, on which FLOPs are counted, take PyTorch's own convolutions."""
    return weight.device.type == "cpu" and not isinstance(weight, FakeTensor)


def _onednn_packs(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether this CPU and this PyTorch have packed convolutions in this type."""
    names = ("_reorder_convolution_weight", "_convolution_pointwise", "_is_mkldnn_bf16_supported")
    if not _real_cpu(weight) or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


_benchmarking = 0
_before = False
_lock = threading.Lock()


@contextmanager
def fastest_cudnn(device: torch.device) -> Iterator[None]:
    """Lets cuDNN try its kernels, which PyTorch then remembers, and puts the setting back when the last thread leaves.

    Not while a graph is captured, where nothing can be tried; what was found before is used there too.
    """
    global _benchmarking, _before
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        yield
        return
    with _lock:
        if _benchmarking == 0:
            _before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        _benchmarking += 1
    try:
        yield
    finally:
        with _lock:
            _benchmarking -= 1
            if _benchmarking == 0:
                torch.backends.cudnn.benchmark = _before

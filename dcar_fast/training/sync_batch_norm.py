"""BatchNorm whose statistics are those of the global batch, on any device that torch.distributed serves.

torch.nn.SyncBatchNorm runs on accelerators only; this one also runs under gloo on a CPU, where split runs are tested.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, same state dict, that in training normalises with the statistics of all processes' rows.

    The processes' rows count alike, however many each has (but at least one); all must call it together. In eval mode,
    or with one process, it is nn.BatchNorm2d itself and communicates nothing. Under gradient accumulation the
    statistics are those of one micro-batch over the processes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) float -> the same shape and dtype; statistics in float32."""
        if not self.training or not distributed():
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, variance, count = _Normalise.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._update(mean, variance, count)
        return y

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Running statistics as nn.BatchNorm2d keeps them: the variance unbiased, momentum None a plain average."""
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.item()
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


def convert_batch_norm(module: nn.Module) -> nn.Module:
    """Replaces every nn.BatchNorm2d inside ``module`` in place, its parameters and buffers taken over; returns it."""
    for name, child in list(module.named_children()):
        if type(child) is nn.BatchNorm2d:
            setattr(module, name, _converted(child))
        else:
            convert_batch_norm(child)
    return module


def distributed() -> bool:
    """Whether there are several processes to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _converted(norm: nn.BatchNorm2d) -> SyncBatchNorm2d:
    with torch.device("meta"):
        new = SyncBatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for tensors, others in ((new._parameters, norm._parameters), (new._buffers, norm._buffers)):
        tensors.update(others)
    return new.train(norm.training)


class _Normalise(torch.autograd.Function):
    """Normalisation over (all processes' B, H, W), and its gradient, which is summed over the processes likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        channels, wide = x.shape[1], x.float()
        # every process measures from a centre of its own, so that a mean far from zero costs no digits
        centre = wide.mean(dim=(0, 2, 3))  # (C,)
        centred = wide - _column(centre)
        offset, squares = centred.mean(dim=(0, 2, 3)), centred.square().sum(dim=(0, 2, 3))
        local = torch.cat([centre, offset, squares, centre.new_full((1,), x.numel() // channels)]).double()
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, local)
        centres, offsets, sums, counts = torch.stack(gathered).split([channels, channels, channels, 1], dim=1)
        count, means = counts.sum(), centres + offsets
        mean = (means * counts).sum(dim=0) / count
        # squares about the common mean: Chan, Golub & LeVeque 1983
        variance = (sums + counts * ((means - mean).square() - offsets.square())).sum(dim=0) / count
        shift, inverse = (mean - centre).float(), (variance + eps).rsqrt().float()
        scale = inverse if weight is None else inverse * weight.float()
        y = (centred - _column(shift)) * _column(scale)
        y = y if bias is None else y + _column(bias.float())
        ctx.save_for_backward(x, weight, centre, shift, inverse, count)
        ctx.affine = weight is not None, bias is not None
        ctx.mark_non_differentiable(mean, variance, count)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_statistics: None):
        x, weight, centre, shift, inverse, count = ctx.saved_tensors
        grad = grad.float()
        unit = (x.float() - _column(centre) - _column(shift)) * _column(inverse)  # (B, C, H, W)
        grad_bias, grad_weight = grad.sum(dim=(0, 2, 3)), (grad * unit).sum(dim=(0, 2, 3))
        sums = torch.cat([grad_bias, grad_weight])
        dist.all_reduce(sums)
        along_ones, along_unit = (sums / count).to(sums.dtype).chunk(2)
        scale = inverse if weight is None else inverse * weight.float()
        grad_x = (grad - _column(along_ones) - unit * _column(along_unit)) * _column(scale)
        has_weight, has_bias = ctx.affine
        return (
            grad_x.to(x.dtype),
            grad_weight.to(weight.dtype) if has_weight else None,
            grad_bias if has_bias else None,
            None,
        )


def _column(values: Tensor) -> Tensor:
    return values[None, :, None, None]


def sum_over_processes(values: Tensor) -> Tensor:
    """``values`` added up over the processes, in place, without gradient; unchanged with one."""
    if distributed():
        dist.all_reduce(values)
    return values


def rows_of_all_processes(rows: Tensor) -> Tensor:
    """(w R, ...): the processes' equally many ``rows`` (R, ...) in rank order, without gradient."""
    if not distributed():
        return rows.detach()
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.detach().contiguous())
    return torch.cat(gathered)

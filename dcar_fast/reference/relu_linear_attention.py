"""ReLU linear attention of the autoencoder's EfficientViT stages."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_DIM = 32
EPS = 1e-15


def relu_linear_attention(qkv: Tensor) -> Tensor:
    """ReLU attention of Cai et al. (EfficientViT, 2023): (B, 3C, H, W) -> (B, C, H, W), heads of 32 channels.

    Head j takes channels [96j, 96j + 96) as q, k, v. With q, k after ReLU and a row of ones under v:
    out = (v k^T) q, divided by its last row + 1e-15. For H*W <= 32 the quadratic form is used: weights k^T q divided by
    their sum over keys + 1e-15. float16 is computed in float32; in bfloat16 only the division is in float32.
    float64 stays float64.
    """
    batch, channels, height, width = qkv.shape
    heads, dtype = channels // (3 * HEAD_DIM), qkv.dtype
    with nullcontext() if qkv.is_meta else torch.autocast(qkv.device.type, enabled=False):  # meta has no autocast
        if dtype == torch.float16:
            qkv = qkv.float()
        q, k, v = qkv.reshape(batch, heads, 3, HEAD_DIM, height * width).unbind(2)  # each (B, heads, 32, HW)
        q, k = q.relu(), k.relu()
        if height * width > HEAD_DIM:
            out = (F.pad(v, (0, 0, 0, 1), value=1.0) @ k.transpose(-1, -2)) @ q  # (B, heads, 33, HW)
            if dtype == torch.bfloat16:
                out = out.float()
            out = out[:, :, :-1] / (out[:, :, -1:] + EPS)
        else:
            weights = k.transpose(-1, -2) @ q  # (B, heads, keys, queries)
            if dtype == torch.bfloat16:
                weights = weights.float()
            weights = weights / (weights.sum(dim=2, keepdim=True) + EPS)
            out = v @ weights.to(v.dtype)
    return out.to(dtype).reshape(batch, heads * HEAD_DIM, height, width)

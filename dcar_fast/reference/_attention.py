"""What the attention ops share: softmax attention of one head size, and its gradient by recomputation."""

from __future__ import annotations

from torch import Tensor


def weights(q: Tensor, k: Tensor, ignored: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) over the keys for q (B, N, H, d) and k (B, T, H, d): (B, H, N, T).

    ``ignored`` (B, T) bool: keys without weight. A row without any other key has no weights at all, zeros.
    """
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
    if ignored is None:
        return scores.softmax(dim=-1)
    found = scores.masked_fill(ignored[:, None, None], float("-inf")).softmax(dim=-1)
    return found.masked_fill(ignored.all(dim=1)[:, None, None, None], 0.0)  # a softmax over nothing is NaN


def attention(q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: (B, N, H, d). Ignored keys may hold anything, NaN too."""
    if ignored is not None:
        v = v.masked_fill(ignored[:, :, None, None], 0.0)
    return (weights(q, k, ignored) @ v.transpose(1, 2)).transpose(1, 2)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of the output, all (B, N or T, H, d). Zero at ignored keys.

    The weights P are computed again: with dP = grad v^T, dS = P (dP - sum(P dP)) / sqrt(d) is the gradient of the
    unscaled scores. P, dP and two steps towards dS, each (B, H, N, T), exist at the same time.
    """
    if ignored is not None:
        k, v = (x.masked_fill(ignored[:, :, None, None], 0.0) for x in (k, v))
    share = weights(q, k, ignored)  # (B, H, N, T)
    grad = grad.transpose(1, 2)
    grad_share = grad @ v.permute(0, 2, 3, 1)
    grad_scores = share * (grad_share - (share * grad_share).sum(dim=-1, keepdim=True)) * q.shape[-1] ** -0.5
    grad_q, grad_k, grad_v = (
        grad_scores @ k.transpose(1, 2),
        grad_scores.mT @ q.transpose(1, 2),
        share.mT @ grad,
    )
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2)

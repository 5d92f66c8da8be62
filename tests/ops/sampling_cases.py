"""Shared by the tests of the sampling ops: settings, draws, and the formula by hand."""

from __future__ import annotations

import math

import torch

SETTINGS = {"guidance": 3.5, "softmax_temperature": 0.8, "tau": 0.7}


def draws(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def normals(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(cond, uncond, u, guidance, softmax_temperature, tau):
    """One row at a time in Python floats."""
    ids, confidences = [], []
    for row in range(len(cond)):
        best, best_id, best_logit = -math.inf, 0, -math.inf
        for v in range(cond.shape[1]):
            c = cond[row, v].item()
            logit = c if uncond is None else c + guidance * (c - uncond[row, v].item())
            logit = -math.inf if math.isnan(logit) else logit / softmax_temperature
            gumbel = -math.log(max(-math.log(max(u[row, v].item(), 1e-20)), 1e-20))
            if logit + tau * gumbel > best:
                best, best_id, best_logit = logit + tau * gumbel, v, logit
        ids.append(best_id)
        confidences.append(best_logit)
    return torch.tensor(ids), torch.tensor(confidences)

"""What becomes of the codes in training: usage, perplexity, dead codes, and replacing codes by encoder outputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dcar_fast.models.tokenizer import DCHT

WINDOW = 100
"""Steps over which usage and perplexity are reported."""


class CodebookUsage:
    """How often each of V codes was chosen: the step of its last use, and an average of its frequency.

    A code is used if one of the last ``WINDOW`` steps chose it, else dead. The perplexity, exp of the entropy (natural
    logarithm) of the frequencies, weighs a step by (1 - 1/WINDOW) per step since. Equal on all processes if the counts
    are.
    """

    def __init__(self, codes: int) -> None:
        self.last_used = torch.zeros(codes, dtype=torch.int64)  # the number of steps done with it
        self.frequency = torch.zeros(codes, dtype=torch.float64)

    def to(self, device: torch.device) -> CodebookUsage:
        self.last_used, self.frequency = self.last_used.to(device), self.frequency.to(device)
        return self

    def update(self, counts: Tensor, step: int) -> dict[str, Tensor]:
        """Takes the choices (V,) int64 of all processes in step ``step`` (from 0); gives "codebook_usage" (share of the
        codes), "codebook_perplexity" and "dead_codes" (their number), scalars float32."""
        done = step + 1
        self.last_used = torch.where(counts > 0, done, self.last_used)
        self.frequency = self.frequency * (1 - 1 / WINDOW) + counts / counts.sum().clamp(min=1) / WINDOW
        used = self.last_used > max(0, done - WINDOW)  # 0: never
        return {
            "codebook_usage": used.float().mean(),
            "codebook_perplexity": perplexity(self.frequency),
            "dead_codes": (~used).sum().float(),
        }

    def unused(self, done: int, steps: int) -> Tensor:
        """Ids (K,) int64, ascending, of the codes that none of the last ``steps`` of ``done`` steps chose."""
        return (self.last_used <= done - steps).nonzero()[:, 0]

    def mark(self, ids: Tensor, done: int) -> None:
        """Codes that were replaced count as used now."""
        self.last_used[ids] = done

    def state_dict(self) -> dict[str, Tensor]:
        return {"codebook_last_used": self.last_used, "codebook_frequency": self.frequency}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        device = self.last_used.device
        self.last_used = state["codebook_last_used"].to(device)
        self.frequency = state["codebook_frequency"].to(device)


def perplexity(frequency: Tensor) -> Tensor:
    """exp(entropy) of non-negative weights (V,), scalar float32: V if all are equal, 1 if one is used, 0 if none."""
    total = frequency.sum()
    share = frequency.double() / total.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(total > 0, torch.exp(-torch.xlogy(share, share).sum()), 0.0).float()


@torch.no_grad()
def replace_codes(
    weight: torch.nn.Parameter,
    ids: Tensor,
    features: Tensor,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    length: float | Tensor = 1.0,
) -> Tensor:
    """Puts random rows of ``features`` in the places of codes, and forgets those codes' optimiser moments.

    weight (V, C) the codebook, ids (K,) int64, features (M, C) normalised encoder outputs, of which min(K, M) distinct
    ones are taken; a code keeps ``length``: its step in angle is the learning rate divided by it. Same result on all
    processes for the same arguments. Returns the ids that were replaced.
    """
    chosen = torch.randperm(len(features), generator=generator)[: len(ids)].to(features.device)
    ids = ids[: len(chosen)]
    weight[ids] = (features[chosen].float() * length).to(weight.dtype)
    for name, moment in optimizer.state.get(weight, {}).items():
        if name.startswith("exp_avg"):
            moment[ids] = 0
    return ids


@torch.no_grad()
def merge_codes(weight: Tensor, cosine: float) -> int:
    """Makes one code of codes (V, C) that point nearly the same way, in place; returns how many directions are left.

    The two with the largest cosine become their mean (each counts for as many codes as it stands for), again and again
    until no cosine reaches ``cosine``. Merged codes all hold that mean, so that the lowest id of them is chosen and the
    others are dead. Codes that are almost equal tell nothing apart: which of them is chosen is noise to a generator.
    """
    codes = torch.nn.functional.normalize(weight.double(), dim=1)
    stands_for = torch.ones(len(codes), dtype=torch.float64, device=codes.device)
    stand_in = torch.arange(len(codes), device=codes.device)  # of every code, itself or a lower one
    cosines = (codes @ codes.T).fill_diagonal_(-2)
    while len(codes) > 1:
        largest, place = cosines.flatten().max(dim=0)
        if largest < cosine:
            break
        kept, gone = sorted(divmod(int(place), len(codes)))
        mean = stands_for[kept] * codes[kept] + stands_for[gone] * codes[gone]
        codes[kept] = torch.nn.functional.normalize(mean, dim=0)
        stands_for[kept] += stands_for[gone]
        stand_in[stand_in == gone] = kept
        cosines[kept] = cosines[:, kept] = torch.where(cosines[kept] > -2, codes @ codes[kept], -2)
        cosines[gone] = cosines[:, gone] = -2
        cosines[kept, kept] = -2
    merged = stand_in != torch.arange(len(codes), device=codes.device)
    changed = merged | torch.isin(torch.arange(len(codes), device=codes.device), stand_in[merged])
    lengths = weight.double().norm(dim=1, keepdim=True)
    weight[changed] = (codes * lengths)[stand_in][changed].to(weight.dtype)  # equal bit by bit
    return int((~merged).sum())


@torch.no_grad()
def codebook_statistics(tokenizer: DCHT, batches: Iterable[Tensor]) -> dict[str, float | int]:
    """What a tokenizer makes of pictures: batches of (B, 3, H, W) float in [-1, 1], at least one.

    Returns "tokens" counted, "usage" (share of the codes chosen at least once), "perplexity", "dead_codes" and
    "residual_std", the standard deviation of all residuals' channels, about their mean: the generator's residual scale.
    The tokenizer runs in eval mode and is left as it was.
    """
    device = tokenizer.quantizer.embedding.weight.device
    counts = torch.zeros(tokenizer.config.codebook_size, dtype=torch.int64, device=device)
    total = torch.zeros(3, dtype=torch.float64, device=device)  # number, sum, sum of squares
    training = {module: module.training for module in tokenizer.modules()}
    tokenizer.eval()
    try:
        for images in batches:
            tokens = tokenizer.encode(images.to(device))
            counts += tokens.ids.flatten().bincount(minlength=len(counts))
            residual = tokens.residual.double()
            total += torch.stack([residual.new_tensor(residual.numel()), residual.sum(), residual.square().sum()])
    finally:
        for module, mode in training.items():
            module.training = mode
    number, first, second = total.tolist()
    if not number:
        raise ValueError("batches: there must be at least one picture")
    used = int((counts > 0).sum())
    return {
        "tokens": int(counts.sum()),
        "usage": used / len(counts),
        "perplexity": perplexity(counts.double()).item(),
        "dead_codes": len(counts) - used,
        "residual_std": max(second / number - (first / number) ** 2, 0.0) ** 0.5,
    }

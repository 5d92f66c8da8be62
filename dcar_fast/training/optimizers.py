"""The optimisers of the trainers, and which parameters they decay and orthogonalise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dcar_fast.training.settings import OptimizerSettings

MUON_MOMENTUM = 0.95


class MuonAdamW(torch.optim.Optimizer):
    """:class:`torch.optim.Muon` for some groups of parameters and :class:`torch.optim.AdamW` for the others, as one.

    Muon (Jordan et al., 2024) replaces the momentum of a matrix by the nearest matrix with orthogonal rows or columns
    and scales it to the root mean square that AdamW's updates have (0.2; Liu et al., "Muon is Scalable for LLM
    Training", 2025), so that both share a learning rate.

    groups: dicts with "params" and "method", "muon" or "adamw", optionally with "weight_decay" (decoupled). Muon's
    parameters must have two dimensions, else ``ValueError``. The state is stored and restored like that of any
    optimiser.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        groups = [dict(group) for group in groups]
        placeholder = torch.zeros(1, 1)  # optimisers are not made without parameters
        self._methods = {
            "muon": torch.optim.Muon([placeholder], lr=lr, momentum=MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw"),
            "adamw": torch.optim.AdamW([placeholder], lr=lr, betas=betas),
        }
        for group in groups:
            if group.get("method") not in self._methods:
                raise ValueError(f"method must be one of {tuple(self._methods)}, got {group.get('method')!r:.80}")
            for name, value in self._methods[group["method"]].defaults.items():
                group.setdefault(name, value)
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        for group in self.param_groups:
            shapes = [tuple(p.shape) for p in group["params"] if p.ndim != 2]
            if group["method"] == "muon" and shapes:
                raise ValueError(f"muon is for parameters of two dimensions, got shapes {shapes[:5]}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, method in self._methods.items():  # the two hold no state of their own
            method.param_groups = [group for group in self.param_groups if group["method"] == name]
            method.state = self.state
            method.step()
        return loss


def make_optimizer(
    module: nn.Module, settings: OptimizerSettings, *, muon: Iterable[nn.Parameter] = (), epsilon: float = 1e-8
) -> torch.optim.Optimizer:
    """What ``settings.method`` names, for the parameters of ``module`` that require gradients; weight decay as in
    :func:`decay_groups`. muon: the parameters that Muon is for, AdamW has the others; epsilon: AdamW's."""
    decayed, others = decay_groups(module)
    rate, betas = settings.learning_rate, tuple(settings.betas)
    if settings.method == "adamw":
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=epsilon)
    chosen = {id(p) for p in muon}
    parts = [p for p in decayed if id(p) in chosen], [p for p in decayed if id(p) not in chosen], others
    methods, decays = ("muon", "adamw", "adamw"), (settings.weight_decay, settings.weight_decay, 0.0)
    groups = [
        {"params": params, "method": method, "weight_decay": decay, **({"eps": epsilon} if method == "adamw" else {})}
        for params, method, decay in zip(parts, methods, decays, strict=True)
        if params
    ]
    return MuonAdamW(groups, rate, betas)


def decay_groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters: weights of layers that are no embeddings, which weight decay is for, and the others."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    decayed, others = [], []
    for parameter in module.parameters():
        if parameter.requires_grad:
            plain = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decayed if plain else others).append(parameter)
    return decayed, others

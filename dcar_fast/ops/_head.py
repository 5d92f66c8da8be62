"""A diffusion head packed for ``denoise_step``, and what its steps need that does not depend on x."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_fast.ops._checks import check_floating, check_tensor
from dcar_fast.reference.denoise_step import EPS, HeadWeights, coefficients
from dcar_fast.reference.diffusion import FREQUENCIES, Schedule, timestep_embedding


@torch.no_grad()
def pack_head(head: nn.Module, dtype: torch.dtype | None = None) -> HeadWeights:
    """The weights of a MAR-family head (``SimpleMLPAdaLN``, ours or another codebase's), copied to ``dtype``.

    The head is known by its modules: time_embed.mlp[0, 2], cond_embed, input_proj, res_blocks[i].{in_ln, mlp[0, 2],
    adaLN_modulation[1]} and final_layer.{norm_final, linear, adaLN_modulation[1]}. ``dtype`` None keeps input_proj's.
    A copy: pack again after the weights have changed. ValueError for a head that is built otherwise.
    """
    try:
        time, blocks, final = head.time_embed.mlp, list(head.res_blocks), head.final_layer
        modulations = [*(block.adaLN_modulation[1] for block in blocks), final.adaLN_modulation[1]]
        norms, hidden, last = [b.in_ln for b in blocks], [b.mlp[0] for b in blocks], [b.mlp[2] for b in blocks]
        epsilons = {norm.eps for norm in (*norms, final.norm_final)}
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"head is a {type(head).__name__}, allowed is a SimpleMLPAdaLN: {error}") from error
    if epsilons != {EPS} or not blocks:
        came = f"{len(blocks)} blocks with eps {epsilons}"
        raise ValueError(f"head has {came}, allowed is at least 1 block with eps {EPS}")
    if time[0].in_features != 2 * FREQUENCIES:
        raise ValueError(f"head embeds {time[0].in_features} timestep features, allowed are {2 * FREQUENCIES}")
    if final.linear.out_features != 2 * head.input_proj.in_features:
        came = f"{final.linear.out_features} outputs for {head.input_proj.in_features} channels"
        raise ValueError(f"head has {came}, allowed are two for each: epsilon and the variance value")
    if final.norm_final.weight is not None:
        raise ValueError("head has an affine final norm, allowed is one without weight")
    dtype = dtype or head.input_proj.weight.dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}, allowed are None and floating-point types")

    def packed(layers: Sequence[nn.Module], gather: Callable[..., Tensor]) -> Iterator[Tensor]:
        """The weights of the layers in one tensor, and their biases."""
        for name in ("weight", "bias"):
            values = [getattr(layer, name) for layer in layers]
            if any(value is None for value in values):
                raise ValueError(f"head has a layer without {name}, allowed is a SimpleMLPAdaLN, which has all")
            yield gather([value.detach() for value in values]).to(dtype)  # gathering copies

    return HeadWeights(
        *packed([time[0]], torch.cat),
        *packed([time[2]], torch.cat),
        *packed([head.cond_embed], torch.cat),
        *packed(modulations, torch.cat),
        *packed([head.input_proj], torch.cat),
        *packed(norms, torch.stack),
        *packed(hidden, torch.stack),
        *packed(last, torch.stack),
        *packed([final.linear], torch.cat),
    )


def step_coefficients(schedule: Schedule, device: torch.device | str) -> Tensor:
    """(K, 8) float32: row k is what ``denoise_step`` needs of step k, k = K-1 being the first one taken.

    The fields of ``reference.denoise_step.Coefficients``, computed in float64 and rounded once. Eight of them, so that
    every row starts at a multiple of 32 bytes and one compiled kernel serves all.
    """
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule is a {type(schedule).__name__}, allowed is a Schedule")
    rows = [coefficients(schedule, k) for k in range(schedule.num_steps)]
    return torch.tensor(rows, dtype=torch.float64).to(device, torch.float32)


def embed_timesteps(weights: HeadWeights, timesteps: Sequence[int] | Tensor) -> Tensor:
    """(K, W) from K original timesteps, in the weights' dtype: constants of a schedule, so once per sampler."""
    if not isinstance(timesteps, Tensor):
        timesteps = torch.tensor([int(t) for t in timesteps])
    check_tensor("timesteps", timesteps, ("K",))
    timesteps = timesteps.to(weights.time_in_weight.device)
    embedding = timestep_embedding(timesteps).to(weights.time_in_weight.dtype)
    hidden = F.silu(F.linear(embedding, weights.time_in_weight, weights.time_in_bias))
    return F.linear(hidden, weights.time_out_weight, weights.time_out_bias)


def embed_condition(weights: HeadWeights, condition: Tensor) -> Tensor:
    """(rows, W) from the condition (rows, Z): the same for all steps, so once per sample."""
    check_tensor("condition", condition, ("rows", weights.condition_weight.shape[1]))
    check_floating("condition", condition)
    return F.linear(condition.to(weights.condition_weight.dtype), weights.condition_weight, weights.condition_bias)


def modulations(weights: HeadWeights, condition: Tensor, time: Tensor) -> Tensor:
    """(rows, 3DW + 2W): shift, scale and gate of every block and the final shift and scale, for one step.

    ``condition`` (rows, W) from :func:`embed_condition`, ``time`` (W,) or (rows, W) from :func:`embed_timesteps`. All
    blocks in one matrix product: Linear(silu(time + condition)).
    """
    check_tensor("condition", condition, ("rows", weights.width))
    check_tensor("time", time, condition.shape if isinstance(time, Tensor) and time.dim() == 2 else (weights.width,))
    return F.linear(F.silu(time + condition), weights.modulation_weight, weights.modulation_bias)

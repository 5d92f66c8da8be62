"""A sampler's arguments, checked before any work; what both samplers share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dcar_fast.config import DCARConfig, SamplingConfig
from dcar_fast.models._checks import check_tensor
from dcar_fast.models.dcar import check_grid, check_text
from dcar_fast.noise import Noise, NoiseShape, make_noise
from dcar_fast.reference.diffusion import Schedule, diffusion_schedule
from dcar_fast.sampling.schedules import Step, head_guidance, plan
from dcar_fast.sampling.types import Known

Progress = Callable[[str, int, int], None]  # stage name, steps done, steps in all


@dataclass(frozen=True, eq=False)
class Request:
    """One call of a sampler: B images of N = h w tokens after text (B, T), on ``device``.

    guidance (of the head) 1 means that the conditional rows run alone, see ``schedules.head_guidance``.
    """

    model: DCARConfig
    sampling: SamplingConfig
    device: torch.device
    text_states: Tensor
    text_mask: Tensor
    noise: Noise
    known: Known | None
    grid: tuple[int, int]
    progress: Progress | None
    plan: list[Step]
    schedule: Schedule
    head_guidance: float

    @classmethod
    def check(
        cls,
        model: DCARConfig,
        sampling: SamplingConfig,
        device: torch.device,
        text_states: Tensor,
        text_mask: Tensor,
        noise: int | Sequence[int] | Noise,
        known: Known | None,
        grid: tuple[int, int] | None,
        progress: Progress | None,
    ) -> Request:
        """The arguments of :meth:`ReferenceSampler.__call__`; ``ValueError`` for what does not fit."""
        check_text(text_states, text_mask, None, model)
        batch = text_states.shape[0]
        if not batch:
            raise ValueError("text_states must hold at least one row, got an empty batch")
        if known is not None:
            if not isinstance(known, Known):
                raise ValueError(f"known must be a Known, got {type(known).__name__}")
            known.check(model, batch)
        tokens = model.num_tokens if grid is None else math.prod(check_grid(grid, None))
        if known is not None and grid is None:
            tokens = known.ids.shape[1]
        elif known is not None and known.ids.shape[1] != tokens:
            raise ValueError(f"known.ids must have {tokens} tokens for grid {grid}, got {known.ids.shape[1]}")
        schedule = diffusion_schedule(model.head_steps)
        draws = NoiseShape(
            batch=batch,
            num_tokens=tokens,
            codebook_size=model.codebook_size,
            latent_channels=model.latent_channels,
            steps=sampling.num_steps,
            denoising_steps=schedule.num_steps,
        )
        return cls(
            model=model,
            sampling=sampling,
            device=device,
            text_states=text_states,
            text_mask=text_mask,
            noise=make_noise(noise, draws, device),
            known=known,
            grid=check_grid(grid, tokens),
            progress=progress,
            plan=plan(sampling),
            schedule=schedule,
            head_guidance=head_guidance(sampling),
        )

    @property
    def batch(self) -> int:
        return len(self.text_states)

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def head_guided(self) -> bool:
        return self.head_guidance != 1.0

    def draw(self, name: str, value: Tensor, *shape: int) -> Tensor:
        """The drawn noise on the right device, its shape checked: recordings come from outside."""
        check_tensor(f"noise.{name}", value, (self.batch, self.num_tokens, *shape), floating=True)
        return value.to(self.device, torch.float32)

    def start(self) -> Tensor:
        """The ids (B, N) that sampling starts from."""
        if self.known is not None:
            return self.known.ids.to(self.device)
        return torch.full((self.batch, self.num_tokens), self.model.mask_id, device=self.device)

    def keep_known(self, residual: Tensor) -> Tensor:
        """The residuals (B, N, C), those that are to be kept put back."""
        if self.known is None or self.known.residual is None:
            return residual
        keep = self.known.keep if self.known.keep is not None else self.known.ids != self.model.mask_id
        return torch.where(keep.to(self.device)[..., None], self.known.residual.to(residual), residual)

    def report(self, stage: str, done: int, total: int) -> None:
        """Tells the caller, if they asked."""
        if self.progress is not None:
            self.progress(stage, done, total)

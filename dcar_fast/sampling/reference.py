"""The eager sampler: the specification that every faster sampler is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dcar_fast.config import SamplingConfig
from dcar_fast.models._checks import check_tensor
from dcar_fast.models.dcar import DCAR, Output, check_grid, check_text
from dcar_fast.models.diffusion_head import Dialect, sample_rows
from dcar_fast.noise import Noise, NoiseShape, make_noise
from dcar_fast.profiling import stage
from dcar_fast.reference.diffusion import diffusion_schedule
from dcar_fast.reference.remask import remask
from dcar_fast.reference.sample_from_logits import gumbel, sample_from_logits
from dcar_fast.sampling.schedules import Step, head_guidance, masked_counts, plan
from dcar_fast.sampling.types import Known, Sample, StepTrace

Progress = Callable[[str, int, int], None]  # stage name, steps done, steps in all


class ReferenceSampler:
    """DC-AR sampling: S unmasking steps, then one denoising run for all residuals.

    Each step samples every open token from guided, annealed logits plus Gumbel noise and masks the least confident ones
    again; the hidden states of the last forward (or of one more, ``final_forward``) condition the diffusion head. Plain
    PyTorch on the model's device and in its dtype; logits and noise in float32. Nothing on the way waits for the
    device, but the position table of a grid that is not the model's own is copied to it in every forward.
    """

    def __init__(self, model: DCAR, config: SamplingConfig | None = None) -> None:
        self.model = model
        self.config = SamplingConfig() if config is None else config
        if not isinstance(self.config, SamplingConfig):
            raise ValueError(f"config must be a SamplingConfig, got {type(config).__name__}")

    @torch.no_grad()
    def __call__(
        self,
        text_states: Tensor,
        text_mask: Tensor,
        noise: int | Sequence[int] | Noise,
        known: Known | None = None,
        grid: tuple[int, int] | None = None,
        trace: bool = False,
        progress: Progress | None = None,
    ) -> Sample:
        """text_states (B, T, Dt) float and text_mask (B, T) bool -> Sample.

        noise: a seed (image b uses seed + b), one seed per image, or a :class:`dcar_fast.noise.Noise`. known: decided
        tokens (inpainting). grid: (h, w) of the tokens, by default the square of the known ones or the model's own.
        trace: keep every step's input ids and raw logits. progress(stage, done, total) is called after every step.
        Raises ``ValueError`` before any work for what does not fit.
        """
        run = _Run(self.model, self.config, text_states, text_mask, noise, known, grid, progress)
        steps: list[StepTrace] = []
        for step in run.plan:
            with stage("unmask", step.index):
                ids_in, output = run.ids, run.step(step)
            if trace:
                steps.append(StepTrace(ids_in, output.logits))
        if self.config.final_forward:
            with stage("final_forward"):
                output = run.forward(guided=run.head_guided)
        with stage("head"):
            residual = run.denoise(output.hidden)
        return Sample(run.ids, residual, steps)


class _Run:
    """One call's state: the ids so far and what stays the same over the steps."""

    def __init__(self, model, config, text_states, text_mask, noise, known, grid, progress) -> None:
        c = model.config
        check_text(text_states, text_mask, None, c)
        self.batch = text_states.shape[0]
        if not self.batch:
            raise ValueError("text_states must hold at least one row, got an empty batch")
        if known is not None:
            if not isinstance(known, Known):
                raise ValueError(f"known must be a Known, got {type(known).__name__}")
            known.check(c, self.batch)
        tokens = c.num_tokens if grid is None else math.prod(check_grid(grid, None))
        if known is not None and grid is None:
            tokens = known.ids.shape[1]
        elif known is not None and known.ids.shape[1] != tokens:
            raise ValueError(f"known.ids must have {tokens} tokens for grid {grid}, got {known.ids.shape[1]}")
        self.grid = check_grid(grid, tokens)
        device = model.token_embedding.weight.device
        self.model, self.config, self.known, self.progress = model, config, known, progress
        self.text = text_states.to(device), text_mask.to(device)
        self.num_tokens, self.device = tokens, device
        self.schedule = diffusion_schedule(c.head_steps)
        draws = NoiseShape(
            batch=self.batch,
            num_tokens=tokens,
            codebook_size=c.codebook_size,
            latent_channels=c.latent_channels,
            steps=config.num_steps,
            denoising_steps=self.schedule.num_steps,
        )
        self.noise = make_noise(noise, draws, device)
        self.plan = plan(config)
        self.head_scale = head_guidance(config)
        self.head_guided = self.head_scale != 1.0
        if known is None:
            self.ids = torch.full((self.batch, tokens), c.mask_id, device=device)
        else:
            self.ids = known.ids.to(device)
        table = torch.from_numpy(masked_counts(config, tokens)).to(device)
        self.counts = table.index_select(1, (self.ids == c.mask_id).sum(dim=1))  # (S, B)

    def draw(self, name: str, value: Tensor, *shape: int) -> Tensor:
        """The drawn noise on the right device, its shape checked: recordings come from outside."""
        check_tensor(f"noise.{name}", value, (self.batch, self.num_tokens, *shape), floating=True)
        return value.to(self.device, torch.float32)

    def forward(self, guided: bool) -> Output:
        """The trunk on [cond; uncond] rows (guided) or on the conditional rows alone."""
        repeats = 2 if guided else 1
        unconditional = torch.arange(self.batch * repeats, device=self.device) >= self.batch
        states, mask = self.text
        ids, states, mask = self.ids.repeat(repeats, 1), states.repeat(repeats, 1, 1), mask.repeat(repeats, 1)
        return self.model(ids, states, mask, unconditional, self.grid)

    def step(self, step: Step) -> Output:
        """One unmasking step; replaces ``self.ids`` and returns what the trunk gave."""
        last = step.index == self.config.num_steps - 1
        feeds_head = last and self.head_guided and not self.config.final_forward
        output = self.forward(guided=step.guidance is not None or feeds_head)
        cond, uncond = output.logits[: self.batch], output.logits[self.batch :]
        mask_id, size = self.model.config.mask_id, self.model.config.codebook_size
        is_open = self.ids == mask_id  # (B, N)
        ids, confidence = sample_from_logits(
            cond.flatten(0, 1),
            None if step.guidance is None else uncond.flatten(0, 1),
            guidance=step.guidance or 0.0,
            softmax_temperature=step.softmax_temperature,
            tau=step.tau,
            noise=self.draw(f"token({step.index})", self.noise.token(step.index), size).flatten(0, 1),
        )
        ids = torch.where(is_open, ids.view_as(self.ids), self.ids)
        if not last:
            u = self.draw(f"confidence({step.index})", self.noise.confidence(step.index))
            confidence = confidence.view_as(u) + step.tau * gumbel(u)
            # below +inf even for infinite logits, so that known tokens always rank last
            confidence = confidence.clamp(max=torch.finfo(torch.float32).max).masked_fill(~is_open, float("inf"))
            ids = remask(ids, confidence, self.counts[step.index], mask_id)
        self.ids = ids
        if self.progress is not None:
            self.progress("unmask", step.index + 1, self.config.num_steps)
        return output

    def denoise(self, hidden: Tensor) -> Tensor:
        """Residuals (B, N, C) from the last forward's hidden states, [cond; uncond] rows if the head is guided."""
        c = self.model.config
        schedule = self.schedule
        condition = hidden if self.head_guided else hidden[: self.batch]

        def report(i: int) -> None:
            if self.progress is not None:
                self.progress("head", i + 1, schedule.num_steps)

        residual = sample_rows(
            self.model.head,
            condition.flatten(0, 1),
            schedule,
            self.draw("latent_init", self.noise.latent_init(), c.latent_channels).flatten(0, 1),
            lambda i: self.draw(f"latent({i})", self.noise.latent(i), c.latent_channels).flatten(0, 1),
            guidance=self.head_scale,
            dialect=Dialect(scale=c.head_scale),
            progress=report,
        ).view(self.batch, self.num_tokens, c.latent_channels)
        return self.keep_known(residual)

    def keep_known(self, residual: Tensor) -> Tensor:
        """The residuals (B, N, C), those that are to be kept put back."""
        if self.known is None or self.known.residual is None:
            return residual
        keep = self.known.keep if self.known.keep is not None else self.known.ids != self.model.config.mask_id
        return torch.where(keep.to(self.device)[..., None], self.known.residual.to(residual), residual)

"""The eager sampler: the specification that every faster sampler is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcar_fast.config import SamplingConfig
from dcar_fast.models.dcar import DCAR, Output
from dcar_fast.models.diffusion_head import Dialect, sample_rows
from dcar_fast.noise import Noise
from dcar_fast.profiling import stage
from dcar_fast.reference.remask import remask
from dcar_fast.reference.sample_from_logits import gumbel, sample_from_logits
from dcar_fast.sampling.request import Progress, Request
from dcar_fast.sampling.schedules import Step, masked_counts
from dcar_fast.sampling.types import Known, Sample, StepTrace


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
        device = self.model.token_embedding.weight.device
        request = Request.check(
            self.model.config, self.config, device, text_states, text_mask, noise, known, grid, progress
        )
        run = _Run(self.model, request)
        steps: list[StepTrace] = []
        for step in request.plan:
            with stage("unmask", step.index):
                ids_in, output = run.ids, run.step(step)
            if trace:
                steps.append(StepTrace(ids_in, output.logits))
        if self.config.final_forward:
            with stage("final_forward"):
                output = run.forward(guided=request.head_guided)
        with stage("head"):
            residual = run.denoise(output.hidden)
        return Sample(run.ids, residual, steps)


class _Run:
    """One call's state: the ids so far and what stays the same over the steps."""

    def __init__(self, model: DCAR, request: Request) -> None:
        self.model, self.request, self.batch = model, request, request.batch
        self.text = request.text_states.to(request.device), request.text_mask.to(request.device)
        self.ids = request.start()
        table = torch.from_numpy(masked_counts(request.sampling, request.num_tokens)).to(request.device)
        self.counts = table.index_select(1, (self.ids == model.config.mask_id).sum(dim=1))  # (S, B)

    def forward(self, guided: bool) -> Output:
        """The trunk on [cond; uncond] rows (guided) or on the conditional rows alone."""
        repeats = 2 if guided else 1
        unconditional = torch.arange(self.batch * repeats, device=self.ids.device) >= self.batch
        states, mask = self.text
        ids, states, mask = self.ids.repeat(repeats, 1), states.repeat(repeats, 1, 1), mask.repeat(repeats, 1)
        return self.model(ids, states, mask, unconditional, self.request.grid)

    def step(self, step: Step) -> Output:
        """One unmasking step; replaces ``self.ids`` and returns what the trunk gave."""
        request, noise = self.request, self.request.noise
        last = step.index == request.sampling.num_steps - 1
        feeds_head = last and request.head_guided and not request.sampling.final_forward
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
            noise=request.draw(f"token({step.index})", noise.token(step.index), size).flatten(0, 1),
        )
        ids = torch.where(is_open, ids.view_as(self.ids), self.ids)
        if not last:
            u = request.draw(f"confidence({step.index})", noise.confidence(step.index))
            confidence = confidence.view_as(u) + step.tau * gumbel(u)
            # below +inf even for infinite logits, so that known tokens always rank last
            confidence = confidence.clamp(max=torch.finfo(torch.float32).max).masked_fill(~is_open, float("inf"))
            ids = remask(ids, confidence, self.counts[step.index], mask_id)
        self.ids = ids
        request.report("unmask", step.index + 1, request.sampling.num_steps)
        return output

    def denoise(self, hidden: Tensor) -> Tensor:
        """Residuals (B, N, C) from the last forward's hidden states, [cond; uncond] rows if the head is guided."""
        c, request, noise = self.model.config, self.request, self.request.noise
        condition = hidden if request.head_guided else hidden[: self.batch]
        residual = sample_rows(
            self.model.head,
            condition.flatten(0, 1),
            request.schedule,
            request.draw("latent_init", noise.latent_init(), c.latent_channels).flatten(0, 1),
            lambda i: request.draw(f"latent({i})", noise.latent(i), c.latent_channels).flatten(0, 1),
            guidance=request.head_guidance,
            dialect=Dialect(scale=c.head_scale),
            progress=lambda i: request.report("head", i + 1, request.schedule.num_steps),
        ).view(self.batch, request.num_tokens, c.latent_channels)
        return request.keep_known(residual)

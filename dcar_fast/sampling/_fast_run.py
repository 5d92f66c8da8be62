"""One call of the fast sampler: what happens on the device, from text states to tokens and residuals.

Nothing here looks at a value on the device, so the whole of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcar_fast.engine.base import Engine, take
from dcar_fast.models.diffusion_head import Dialect
from dcar_fast.ops import place_tokens
from dcar_fast.profiling import stage
from dcar_fast.sampling._draws import Draws
from dcar_fast.sampling.request import Request
from dcar_fast.sampling.schedules import Step
from dcar_fast.sampling.types import Sample, StepTrace


class FastRun:
    """The ids so far and what stays the same over the steps.

    states (B, T, Dt), mask (B, T): the text on the device. counts (S, B) int64 on the device: how many tokens are
    masked again after each step; most_open (S): at most how many are open before it, over the images. first: hidden
    states (B, N, D) of the first step's unconditional rows where they are known, ``Engine.first_unconditional``.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        draws: Draws,
        states: Tensor,
        mask: Tensor,
        counts: Tensor,
        most_open: Sequence[int],
        first: Tensor | None,
        tracing: bool = False,
    ) -> None:
        self.engine, self.request, self.draws, self.batch = engine, request, draws, request.batch
        self.counts, self.most_open, self.first = counts, most_open, first
        self.tracing, self.trace = tracing, list[StepTrace]()
        self.texts = engine.read(states, mask)
        self.ids = request.start()  # (B, N)
        self.rows: Tensor | None = None  # (B, n): the open positions, then others up to n; None: all
        if most_open[0] < request.num_tokens:
            self.rows = (self.ids != request.model.mask_id).byte().argsort(dim=1, stable=True)[:, : most_open[0]]

    def __call__(self) -> Sample:
        request = self.request
        for step in request.plan:
            with stage("unmask", step.index):
                hidden = self.step(step)
        if request.sampling.final_forward:
            with stage("final_forward"):
                hidden = self.look(request.head_guided)
        with stage("head"):
            residual = self.denoise(hidden)
        return Sample(self.ids, residual, self.trace)

    def look(self, guided: bool, rows: Tensor | None = None, first: bool = False) -> Tensor:
        """Hidden states of [cond; uncond] or cond, (B or 2B, N or n, D)."""
        engine, grid = self.engine, self.request.grid
        alike = first and self.request.known is None
        if guided and first and self.first is not None:
            hidden = engine.hidden(self.ids, grid, self.texts, False, rows, alike)
            return torch.cat((hidden, self.first))
        return engine.hidden(self.ids, grid, self.texts, guided, rows, alike)

    def step(self, step: Step) -> Tensor:
        """One unmasking step: replaces ``ids`` and ``rows``, returns the hidden states."""
        request, batch = self.request, self.batch
        last = step.index == request.sampling.num_steps - 1
        feeds_head = last and not request.sampling.final_forward
        whole = feeds_head or self.tracing  # else only open positions are looked at
        guided = step.guidance is not None or (feeds_head and request.head_guided)
        hidden = self.look(guided, None if whole else self.rows, first=step.index == 0)
        if self.tracing:
            self.trace.append(StepTrace(self.ids, self.engine.logits(hidden)))
        wanted = hidden
        if whole and self.rows is not None:
            wanted = take(hidden, self.rows.repeat(len(hidden) // batch, 1))
        cond, uncond = wanted[:batch], wanted[batch:]
        sampled, confidence = self.engine.choose(
            cond.flatten(0, 1),
            None if step.guidance is None else uncond.flatten(0, 1),
            guidance=step.guidance or 0.0,
            softmax_temperature=step.softmax_temperature,
            tau=step.tau,
            noise=self.draws.token(step.index, self.rows),
        )
        next_open = 0 if last else self.most_open[step.index + 1]
        self.ids, rows = place_tokens(
            self.ids,
            self.rows,
            sampled.view(batch, -1),
            confidence.view(batch, -1),
            self.counts[step.index],
            request.model.mask_id,
            tau=step.tau,
            noise=None if last else self.draws.confidence(step.index),
            next_open=next_open,
        )
        self.rows = None if next_open == request.num_tokens else rows
        request.report("unmask", step.index + 1, request.sampling.num_steps)
        return hidden

    def denoise(self, hidden: Tensor) -> Tensor:
        """Residuals (B, N, C) float32 from hidden states (B or 2B, N, D)."""
        request, model = self.request, self.request.model
        condition = hidden if request.head_guided else hidden[: self.batch]
        residual = self.engine.denoise(
            condition.flatten(0, 1),
            self.draws.latent_init(),
            self.draws.latent,
            guidance=request.head_guidance,
            dialect=Dialect(scale=model.head_scale),
            progress=lambda i: request.report("head", i + 1, request.schedule.num_steps),
        )
        return request.keep_known(residual.view(self.batch, request.num_tokens, model.latent_channels))

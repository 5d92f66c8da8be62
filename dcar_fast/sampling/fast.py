"""The fast sampler: the same tokens and residuals as :class:`ReferenceSampler`, without what cannot matter."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from dcar_fast.config import SamplingConfig
from dcar_fast.engine.head import Head
from dcar_fast.engine.linear import Linear
from dcar_fast.engine.pack import packed
from dcar_fast.engine.trunk import Trunk, layer_norm, take
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.diffusion_head import Dialect
from dcar_fast.noise import CounterNoise, Noise, TokenNoise
from dcar_fast.ops import sample_from_logits
from dcar_fast.profiling import stage
from dcar_fast.reference.diffusion import diffusion_schedule
from dcar_fast.reference.remask import remask
from dcar_fast.reference.sample_from_logits import gumbel
from dcar_fast.sampling.reference import Progress, ReferenceSampler, _Run
from dcar_fast.sampling.schedules import Step, masked_counts
from dcar_fast.sampling.types import Known, Sample, StepTrace

FIRST_STEPS = 64  # first unconditional passes kept per model: one for every prompt length met lately
ROWS = 1024  # positions whose logits exist at a time on a CPU


class _Engine:
    """A generator packed in one precision."""

    def __init__(self, model: DCAR, dtype: torch.dtype) -> None:
        self.trunk = Trunk(model, dtype)
        self.head = Head(model.head, diffusion_schedule(model.config.head_steps), dtype)
        # in float32 on a CPU, where a product in bfloat16 would also round the logits
        self.to_logits = Linear.of(model.to_logits, torch.float32)
        self._first: OrderedDict[tuple, Tensor] = OrderedDict()

    def first_unconditional(self, grid: tuple[int, int], mask: Tensor, prompts: Sequence[Hashable]) -> Tensor:
        """Hidden states (B, N, D) of an unconditional pass over nothing but MASK: they depend on the mask (B, T) alone,
        that is, on the length of the prompt. prompts: B keys, equal where the masks are."""
        keys = [(grid, mask.shape[1], prompt) for prompt in prompts]
        missing = {key: row for row, key in enumerate(keys) if key not in self._first}
        if missing:
            picked = mask[list(missing.values())]
            ids = torch.full((len(picked), grid[0] * grid[1]), self.trunk.config.mask_id, device=mask.device)
            null = self.trunk.null(mask.shape[1])
            self._first.update(zip(missing, self.trunk(ids, grid, [null], picked, alike=True), strict=True))
        found = torch.stack([self._first[key] for key in keys])
        while len(self._first) > FIRST_STEPS:
            self._first.popitem(last=False)
        return found


class FastSampler:
    """DC-AR sampling with the weights packed once: the call and the results of :class:`ReferenceSampler`.

    Left out is what cannot change the result: see ``engine/trunk.py`` and ``engine/head.py``; and logits are computed
    for open positions alone, from the guided hidden state. In float32 the tokens are those of the reference up to ties
    within rounding; ``dtype`` (default: the model's) is the precision of trunk and head, the sampling arithmetic is
    float32. The packed weights follow the model: they are made anew when its parameters change.
    """

    def __init__(self, model: DCAR, config: SamplingConfig | None = None, dtype: torch.dtype | None = None) -> None:
        if not isinstance(model, DCAR):
            raise ValueError(f"model must be a DCAR, got {type(model).__name__}")
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
        self.model, self.dtype = model, dtype
        self.config = ReferenceSampler(model, config).config  # checked there

    def _engine(self) -> _Engine:
        dtype = self.dtype or self.model.token_embedding.weight.dtype
        return packed(self.model, dtype, lambda model: _Engine(model, dtype))

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
        lengths: Sequence[int] | None = None,
    ) -> Sample:
        """text_states (B, T, Dt) float and text_mask (B, T) bool -> Sample; see :class:`ReferenceSampler`.

        lengths: how many True each row of the mask starts with and has, where the caller knows; else the mask is read
        from the device, the one time that this waits for it.
        """
        run = _FastRun(self.model, self.config, text_states, text_mask, noise, known, grid, progress)
        if lengths is not None and len(lengths) != run.batch:
            raise ValueError(f"lengths must have {run.batch} entries, one for each row of text, got {len(lengths)}")
        prompts = lengths if lengths is not None else [row.numpy().tobytes() for row in text_mask.cpu()]
        run.start(self._engine(), prompts, trace)
        for step in run.plan:
            with stage("unmask", step.index):
                run.step(step)
        if self.config.final_forward:
            with stage("final_forward"):
                run.hidden = run.look(guided=run.head_guided)
        with stage("head"):
            residual = run.denoise(run.hidden)
        return Sample(run.ids, residual, run.trace)


class _FastRun(_Run):
    """One call's state; inputs, plan and noise are those of the reference."""

    def start(self, engine: _Engine, prompts: Sequence[Hashable], trace: bool) -> None:
        self.engine, self.prompts = engine, prompts
        self.tracing, self.trace = trace, []
        states, self.mask = self.text
        self.conditional = engine.trunk.read(states)
        mask_id = self.model.config.mask_id
        if self.known is None:
            open_tokens = [self.num_tokens] * self.batch
        else:
            open_tokens = (self.known.ids == mask_id).sum(dim=1).tolist()
        counts = masked_counts(self.config, self.num_tokens)[:, open_tokens].max(axis=1, initial=0)
        self.most_open = [max(open_tokens), *counts.tolist()]  # at the start of each step, over the images
        self.seeds = None
        if isinstance(self.noise, CounterNoise):
            self.seeds = torch.tensor(self.noise.seeds, device=self.device)

    def look(self, guided: bool, rows: Tensor | None = None, first: bool = False) -> Tensor:
        """Hidden states of [cond; uncond] or cond, (B or 2B, N or n, D)."""
        trunk = self.engine.trunk
        fresh = first and self.known is None
        if guided and fresh:
            hidden = trunk(self.ids, self.grid, [self.conditional], self.mask, rows, alike=True)
            unconditional = self.engine.first_unconditional(self.grid, self.mask, self.prompts)
            return torch.cat((hidden, unconditional))
        texts = [self.conditional, trunk.null(self.mask.shape[1])] if guided else [self.conditional]
        return trunk(self.ids, self.grid, texts, self.mask, rows, alike=fresh)

    def step(self, step: Step) -> None:
        """One unmasking step; replaces ``self.ids``."""
        last = step.index == self.config.num_steps - 1
        feeds_head = last and not self.config.final_forward
        is_open = self.ids == self.model.config.mask_id  # (B, N)
        most = self.most_open[step.index]
        rows = None if most == self.num_tokens else (~is_open).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        whole = feeds_head or self.tracing
        guided = step.guidance is not None or (feeds_head and self.head_guided)
        hidden = self.look(guided, None if whole else rows, first=step.index == 0)
        if feeds_head:
            self.hidden = hidden
        if self.tracing:
            self.trace.append(StepTrace(self.ids, self.engine.to_logits(layer_norm(hidden.float()))))
        branches = len(hidden) // self.batch
        wanted = hidden if rows is None or not whole else take(hidden, rows.repeat(branches, 1))
        state = layer_norm(wanted.float())  # (B or 2B, n, D)
        cond = state[: self.batch]
        if step.guidance is not None:
            cond = cond + step.guidance * (cond - state[self.batch :])
        ids, confidence = self.sample(cond, rows, step)
        self.ids = self.place(ids, confidence, rows, is_open, step, last)
        if self.progress is not None:
            self.progress("unmask", step.index + 1, self.config.num_steps)

    def sample(self, state: Tensor, rows: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """Guided, normed hidden states (B, n, D) at positions ``rows`` -> ids and confidence (B, n)."""
        batch, count, _ = state.shape
        if not count:  # every token was known
            return self.ids[:, :0], state[..., 0]
        positions = torch.arange(count, device=self.device).expand(batch, -1) if rows is None else rows
        if self.seeds is None:
            uniforms = self.draw(f"token({step.index})", self.noise.token(step.index), self.model.config.codebook_size)
            uniforms = (uniforms if rows is None else take(uniforms, rows)).flatten(0, 1)
        else:
            seeds, tokens = self.seeds[:, None].expand(-1, count).flatten(), positions.flatten()
        found = []
        for start in range(0, batch * count, ROWS):
            block = slice(start, start + ROWS)
            found.append(
                sample_from_logits(
                    self.engine.to_logits(state.flatten(0, 1)[block]),
                    None,
                    guidance=0.0,
                    softmax_temperature=step.softmax_temperature,
                    tau=step.tau,
                    noise=uniforms[block]
                    if self.seeds is None
                    else TokenNoise(seeds[block], tokens[block], step.index),
                )
            )
        ids, confidence = (torch.cat(parts).view(batch, count) for parts in zip(*found, strict=True))
        return ids, confidence

    def place(self, ids: Tensor, confidence: Tensor, rows, is_open: Tensor, step: Step, last: bool) -> Tensor:
        """The new ids (B, N): sampled ones where open, and the least confident of them masked again."""
        if rows is not None:
            ids = self.ids.scatter(1, rows, ids)
            confidence = confidence.new_zeros(self.ids.shape).scatter(1, rows, confidence)
        ids = torch.where(is_open, ids, self.ids)
        if last:
            return ids
        u = self.draw(f"confidence({step.index})", self.noise.confidence(step.index))
        confidence = confidence + step.tau * gumbel(u)
        # below +inf even for infinite logits, so that known tokens always rank last
        confidence = confidence.clamp(max=torch.finfo(torch.float32).max).masked_fill(~is_open, float("inf"))
        return remask(ids, confidence, self.counts[step.index], self.model.config.mask_id)

    def denoise(self, hidden: Tensor) -> Tensor:
        """Residuals (B, N, C) from hidden states (B or 2B, N, D)."""
        c = self.model.config
        condition = hidden if self.head_guided else hidden[: self.batch]

        def report(i: int) -> None:
            if self.progress is not None:
                self.progress("head", i + 1, self.schedule.num_steps)

        residual = self.engine.head(
            condition.flatten(0, 1),
            self.draw("latent_init", self.noise.latent_init(), c.latent_channels).flatten(0, 1),
            lambda i: self.draw(f"latent({i})", self.noise.latent(i), c.latent_channels).flatten(0, 1),
            guidance=self.head_scale,
            dialect=Dialect(scale=c.head_scale),
            progress=report,
        ).view(self.batch, self.num_tokens, c.latent_channels)
        return self.keep_known(residual)

"""What a row's process answers to the parity gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _probes import images_on, logits_on, psnr, residual_on, scores, text_of, token_noise
from _work import RowSpec, Workload
from torch import Tensor

from dcar_fast import DCARPipeline, ReferenceSampler, SamplingConfig
from dcar_fast.sampling.schedules import plan

PARITY_STEPS = 2
PARITY_RUN = 20250707  # index of its prompts and seeds
HEAD_TIMESTEP = 500


class ParityProbe:
    """A row's pipeline, held against what the reference recorded in a file."""

    def __init__(self, pipeline: DCARPipeline, spec: RowSpec, work: Workload, grid: tuple[int, int]) -> None:
        self.pipeline, self.spec, self.work, self.grid = pipeline, spec, work, grid
        self.sampling = SamplingConfig(num_steps=min(PARITY_STEPS, work.steps))
        self.seeds = work.seeds(PARITY_RUN)

    @torch.no_grad()
    def record_reference(self, folder: str) -> None:
        """Runs the first steps as the reference and saves inputs and results of every stage for :meth:`parity`; and a
        whole run where that takes seconds."""
        text = self._text()
        run = ReferenceSampler(self.pipeline.generator, self.sampling)
        sample = run(text.states, text.mask, self.seeds, grid=self.grid, trace=True)
        reference = {
            "states": text.states,
            "ids_in": [step.ids_in for step in sample.trace],
            "ids": sample.ids,
            "residual": sample.residual,
        }
        del sample
        reference["hidden"] = self._hidden(reference)
        if self.work.is_small:
            reference["whole_ids"], reference["whole_pixels"] = self._whole()
        reference = _to_cpu(reference)
        reference["results"] = self._results(reference) | {"head": self._head(reference)}
        torch.save(reference, Path(folder) / "reference.pt")

    @torch.no_grad()
    def parity(self, folder: str) -> dict[str, Any]:
        """Every stage on the reference's inputs: {"errors": {stage: error}, "scales": {stage: max |reference|}, ...},
        an error is max |difference|; for residuals it is the root mean square, and "residual_scale" theirs, because
        the first denoising steps blow single roundings up. "step_agreement": the share of ids that agree when both
        sample from the reference's ids of each step, "unexplained_ids": how many of the others are no near ties.

        Then the first steps run freely: the share of equal ids ("agreement") and the residuals' error where all ids
        agree, else None ("residual"). And, where the reference did, the whole run: "whole_agreement" and
        "psnr" of its pixels, else None.
        """
        reference = torch.load(Path(folder) / "reference.pt", weights_only=True)
        # the trunk after the head: compiling the head is quicker, so that a compiler that is missing is soon missed
        results = {} if self.spec.kind == "fast" else {"head": self._head(reference)}
        results |= self._results(reference)
        errors, scales = {}, {}
        for stage, got in results.items():
            expected = reference["results"][stage].double()
            rule = _rms if stage == "residual" else _largest
            errors[stage], scales[stage] = rule(got.double() - expected), rule(expected)
        equal, unexplained = self._compare_ids(reference["results"]["logits"], results["logits"])
        sample = self.pipeline.generate(self._text(), self.seeds, self.sampling, self.grid)
        same = sample.ids.cpu() == reference["ids"]
        residual = _rms(sample.residual.cpu() - reference["residual"]) if bool(same.all()) else None
        report = {"errors": errors, "scales": scales, "step_agreement": equal, "unexplained_ids": unexplained}
        report |= {"agreement": same.double().mean().item(), "residual": residual}
        report |= {"whole_agreement": None, "psnr": None}
        if "whole_ids" in reference:
            ids, pixels = self._whole()
            report["whole_agreement"] = (ids.cpu() == reference["whole_ids"]).double().mean().item()
            report["psnr"] = psnr(pixels.cpu(), reference["whole_pixels"])
        return report

    def _results(self, reference: dict[str, Any]) -> dict[str, Tensor]:
        """Text states; logits (S, 2 P, N, V) of the picked images, [cond; uncond], on the reference's ids of every
        step; residuals; the picked images of the reference's tokens. Float32 on the CPU. Shapes are those of the timed
        runs: compiled once."""
        pipeline, grid, states = self.pipeline, self.grid, reference["states"]
        rows = [*self._picked, *(self.work.batch + i for i in self._picked)]
        logits = [logits_on(pipeline, states, ids, self.seeds, grid, rows).cpu() for ids in reference["ids_in"]]
        return {
            "text": self._text().states.float().cpu(),
            "logits": torch.stack(logits),
            "residual": residual_on(pipeline, states, reference["ids_in"][-1], self.seeds, grid),
            "image": images_on(pipeline, reference["ids"], reference["residual"], grid)[self._picked],
        }

    def _hidden(self, reference: dict[str, Any]) -> Tensor:
        """The last forward's hidden states (2 B, N, D) of the reference."""
        text, batch, device = text_of(reference["states"], self.pipeline.device), self.work.batch, self.pipeline.device
        both = (t.repeat(2, *(1,) * (t.dim() - 1)) for t in (reference["ids_in"][-1], text.states, text.mask))
        return self.pipeline.generator(*both, torch.arange(2 * batch, device=device) >= batch, self.grid).hidden

    def _head(self, reference: dict[str, Any]) -> Tensor:
        """One call of the head's network on the reference's hidden states, float32 on the CPU."""
        device, c = self.pipeline.device, self.pipeline.generator.config
        condition = reference["hidden"].to(device).flatten(0, 1)
        fed = torch.randn(len(condition) // 2, c.latent_channels, generator=torch.Generator().manual_seed(PARITY_RUN))
        timesteps = torch.full((len(condition),), HEAD_TIMESTEP, device=device)
        # to the CPU at once: with CUDA graphs the next compiled call takes the memory back
        return self.pipeline.generator.head(fed.to(device).repeat(2, 1), timesteps, condition).float().cpu()

    def _whole(self) -> tuple[Tensor, Tensor]:
        """Ids (B, N) and pixels (B, H, W, 3) of a run of all steps, as it is timed but for the noise."""
        sample = self.pipeline.generate(self._text(), self.seeds, SamplingConfig(num_steps=self.work.steps), self.grid)
        return sample.ids, self.pipeline.decode(sample, self.grid)

    def _compare_ids(self, expected: Tensor, got: Tensor) -> tuple[float, int]:
        """Sampled ids of both logits (S, 2 P, N, V) under the same noise: the share of equal ones, and how many differ
        although the reference's scores of the two ids are further apart than 1e-4 of its largest logit explains."""
        equal, total, unexplained = 0, 0, 0
        seeds = [self.seeds[i] for i in self._picked]
        for step, (a, b) in zip(plan(self.sampling), zip(expected, got, strict=True), strict=True):
            noise = token_noise(seeds, *a.shape[1:], step.index)
            both = [scores(x, step, noise) for x in (a, b)]
            ids = [s.argmax(dim=-1, keepdim=True) for s in both]
            gap = (both[0].gather(-1, ids[0]) - both[0].gather(-1, ids[1]))[..., 0]
            allowed = 2 * (1 + 2 * (step.guidance or 0.0)) / step.softmax_temperature * 1e-4 * a.abs().max()
            differs = (ids[0] != ids[1])[..., 0]
            equal += int((~differs).sum())
            total += differs.numel()
            unexplained += int((differs & (gap > allowed)).sum())
        return equal / total, unexplained

    def _text(self):
        return self.pipeline.encode_text(self.work.prompts(PARITY_RUN))

    @property
    def _picked(self) -> list[int]:
        """Images whose logits and pixels are compared: the first and the last."""
        return sorted({0, self.work.batch - 1})


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {k: _to_cpu(v) for k, v in value.items()}
    return [_to_cpu(v) for v in value]

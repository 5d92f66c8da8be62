"""One row of a benchmark, alone in its own process: builds the pipeline, answers parity probes, runs and is timed.

A process per row keeps peak memory, compiled code and allocator state apart; the parent calls the rows in turn.
"""

from __future__ import annotations

import gc
import random
import resource
import string
import sys
import time
import traceback
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcar_fast import DCARPipeline, ReferenceSampler, SamplingConfig
from dcar_fast.noise import Noise, TorchNoise
from dcar_fast.profiling import record_stages
from dcar_fast.reference.sample_from_logits import gumbel
from dcar_fast.sampling.schedules import plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARITY_STEPS = 2
PARITY_SEED = 20250707
HEAD_PROBE_TIMESTEP = 500


@dataclass(frozen=True)
class RowSpec:
    """What a row runs: ``kind`` "eager" or "compile", the dtype's name and torch.compile's mode ("" for eager)."""

    kind: str
    dtype: str
    mode: str = ""
    suffix: str = ""  # ":mode" where the mode is not the device's default

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.dtype}{self.suffix}"


@dataclass(frozen=True)
class Workload:
    """What every row computes: ``batch`` images of (height, width) pixels from prompts of ``prompt_tokens`` tokens."""

    preset: str
    batch: int
    height: int
    width: int
    steps: int
    prompt_tokens: int
    device: str

    def prompts(self, run: int) -> list[str]:
        """Other letters in every run; bytes and an end mark make ``prompt_tokens`` tokens."""
        draw, letters = random.Random(run), string.ascii_lowercase + " "
        return ["".join(draw.choices(letters, k=self.prompt_tokens - 1)) for _ in range(self.batch)]


class FixedNoise(Noise):
    """The same draws in every process and on every device: torch's CPU generator, seeded per draw."""

    def __init__(self, batch: int, tokens: int, codebook_size: int, channels: int) -> None:
        self._shape, self._codebook, self._channels = (batch, tokens), codebook_size, channels

    def token(self, step: int) -> Tensor:
        return torch.rand(*self._shape, self._codebook, generator=self._generator(0, step))

    def confidence(self, step: int) -> Tensor:
        return torch.rand(*self._shape, generator=self._generator(1, step))

    def latent_init(self) -> Tensor:
        return torch.randn(*self._shape, self._channels, generator=self._generator(2, 0))

    def latent(self, i: int) -> Tensor:
        return torch.randn(*self._shape, self._channels, generator=self._generator(3, i))

    @staticmethod
    def _generator(kind: int, index: int) -> torch.Generator:
        return torch.Generator().manual_seed(PARITY_SEED + 1000 * kind + index)


class Session:
    """A row's pipeline and what the parent asks of it. Times are seconds, memory is bytes."""

    def __init__(self, spec: RowSpec, work: Workload) -> None:
        self.spec, self.work = spec, work
        self.device = torch.device(work.device)
        self.sampling = SamplingConfig(num_steps=work.steps)

    # ---- building

    def build(self) -> str:
        """Makes the pipeline with the same weights in every row; returns the device's name."""
        pipeline = DCARPipeline.from_preset(self.work.preset, seed=0, device="cpu")
        fill_zeros(pipeline)
        self.pipeline = pipeline.to(self.device, DTYPES[self.spec.dtype])
        self.grid = pipeline.grid(self.work.height, self.work.width)
        if self.spec.kind == "compile":
            compile_pipeline(self.pipeline, self.spec.mode, self.grid)
        gc.collect()
        return device_name(self.device)

    # ---- parity

    @torch.no_grad()
    def record_reference(self, folder: str) -> None:
        """Runs the first steps as the reference and saves inputs and results of every stage for :meth:`parity`."""
        text = self._text()
        run = ReferenceSampler(self.pipeline.generator, self._parity_sampling)
        sample = run(text.states, text.mask, self._noise, grid=self.grid, trace=True)
        reference = {
            "states": text.states,
            "ids_in": [step.ids_in for step in sample.trace],
            "ids": sample.ids,
            "residual": sample.residual,
        }
        del sample
        logits, reference["hidden"] = self._run_trunk(reference)
        reference["results"] = self._run_others(reference) | {"logits": logits}
        torch.save(_to_cpu(reference), Path(folder) / "reference.pt")

    @torch.no_grad()
    def parity(self, folder: str) -> dict[str, Any]:
        """Every stage on the reference's inputs: {"errors": {stage: max |difference|}, "scales": {stage: max
        |reference|}, ...}; then the first steps run freely: the share of equal ids ("agreement") and the residuals'
        largest difference where all ids agree, else None ("residual")."""
        reference = torch.load(Path(folder) / "reference.pt", weights_only=True)
        # the trunk last: compiling the head is quicker, so that a compiler that is missing is soon missed
        results = self._run_others(reference) | {"logits": self._run_trunk(reference)[0]}
        errors, scales = {}, {}
        for stage, expected in reference["results"].items():
            errors[stage] = (results[stage].double() - expected.double()).abs().max().item()
            scales[stage] = expected.double().abs().max().item()
        equal, unexplained = self._compare_ids(reference["results"]["logits"], results["logits"])
        text = self._text()
        sample = self.pipeline.generate(text, self._noise, self._parity_sampling, self.grid)
        same = sample.ids.cpu() == reference["ids"]
        residual = (sample.residual.cpu() - reference["residual"]).abs().max().item() if bool(same.all()) else None
        return {
            "errors": errors,
            "scales": scales,
            "step_agreement": equal,
            "unexplained_ids": unexplained,
            "agreement": same.double().mean().item(),
            "residual": residual,
        }

    def _run_trunk(self, reference: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """On the reference's ids of every step: logits (S, 2 P, N, V) of the picked images, [cond; uncond], and the
        last step's hidden states (2 B, N, D); float32 on the CPU. Shapes are the timed runs': compiled once."""
        batch, device = self.work.batch, self.device
        rows = [*self._picked, *(batch + i for i in self._picked)]
        states = reference["states"].to(device).repeat(2, 1, 1)
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=device)
        unconditional = torch.arange(2 * batch, device=device) >= batch
        logits = []
        for ids in reference["ids_in"]:
            ids = ids.to(device).repeat(2, 1)
            output = self.pipeline.generator(ids, states, mask, unconditional, self.grid)
            logits.append(output.logits[rows].float().cpu())
        return torch.stack(logits), output.hidden.float().cpu()

    def _run_others(self, reference: dict[str, Any]) -> dict[str, Tensor]:
        """Text states, one call of the head's network and the picked images, from the reference's hidden states, ids
        and residuals; float32 on the CPU."""
        device = self.device
        fed = self._noise.latent_init().to(device).flatten(0, 1).repeat(2, 1)  # (2 B N, C)
        timesteps = torch.full((len(fed),), HEAD_PROBE_TIMESTEP, device=device)
        condition = reference["hidden"].to(device).flatten(0, 1)
        # to the CPU at once: with CUDA graphs the next compiled call takes the memory back
        head = self.pipeline.generator.head(fed, timesteps, condition).float().cpu()
        ids, residual = reference["ids"].to(device).unflatten(1, self.grid), reference["residual"].to(device)
        images = self.pipeline.tokenizer.decode_tokens(ids, residual)[self._picked]
        return {"text": self._text().states.float().cpu(), "head": head, "image": images.float().cpu()}

    def _compare_ids(self, expected: Tensor, got: Tensor) -> tuple[float, int]:
        """Sampled ids of both logits (S, 2 P, N, V) under the same noise: the share of equal ones, and how many differ
        although the reference's scores of the two ids are further apart than 1e-4 of its largest logit explains."""
        equal, total, unexplained = 0, 0, 0
        for step, (a, b) in zip(plan(self._parity_sampling), zip(expected, got, strict=True), strict=True):
            noise = step.tau * gumbel(self._noise.token(step.index)[self._picked])
            guidance = step.guidance or 0.0
            scores = []
            for x in (a, b):
                cond, uncond = x.chunk(2)
                scores.append((cond + guidance * (cond - uncond)) / step.softmax_temperature + noise)
            ids = [s.argmax(dim=-1, keepdim=True) for s in scores]
            gap = (scores[0].gather(-1, ids[0]) - scores[0].gather(-1, ids[1]))[..., 0]
            allowed = 2 * (1 + 2 * guidance) / step.softmax_temperature * 1e-4 * a.abs().max()
            differs = (ids[0] != ids[1])[..., 0]
            equal += int((~differs).sum())
            total += differs.numel()
            unexplained += int((differs & (gap > allowed)).sum())
        return equal / total, unexplained

    def _text(self):
        return self.pipeline.encode_text(self.work.prompts(PARITY_SEED))

    @property
    def _picked(self) -> list[int]:
        """Images whose logits and pixels are compared: the first and the last."""
        return sorted({0, self.work.batch - 1})

    @cached_property
    def _parity_sampling(self) -> SamplingConfig:
        return SamplingConfig(num_steps=min(PARITY_STEPS, self.work.steps))

    @cached_property
    def _noise(self) -> FixedNoise:
        c = self.pipeline.generator.config
        return FixedNoise(self.work.batch, self.grid[0] * self.grid[1], c.codebook_size, c.latent_channels)

    # ---- timing

    def run(self, index: int) -> float:
        """Prompts to pixels on the device, once, with the device idle before and after and no stop in between."""
        prompts, noise = self._inputs(index)
        synchronize(self.device)
        start = time.perf_counter()
        self._images(prompts, noise)
        synchronize(self.device)
        return time.perf_counter() - start

    def run_stages(self, index: int) -> dict[str, float]:
        """The same with a synchronisation around every stage: seconds by stage."""
        prompts, noise = self._inputs(index)
        with record_stages(lambda: synchronize(self.device)) as times:
            self._images(prompts, noise)
        return dict(times.seconds)

    def _inputs(self, index: int) -> tuple[list[str], TorchNoise]:
        c = self.pipeline.generator.config
        generator = torch.Generator(self.device).manual_seed(index)
        noise = TorchNoise(
            self.work.batch,
            num_tokens=self.grid[0] * self.grid[1],
            codebook_size=c.codebook_size,
            latent_channels=c.latent_channels,
            generator=generator,
            device=self.device,
        )
        return self.work.prompts(index), noise

    def _images(self, prompts: list[str], noise: Noise) -> Tensor:
        text = self.pipeline.encode_text(prompts)
        if text.states.shape[1] != self.work.prompt_tokens:
            raise RuntimeError(f"prompts became {text.states.shape[1]} tokens, not {self.work.prompt_tokens}")
        return self.pipeline.decode(self.pipeline.generate(text, noise, self.sampling, self.grid), self.grid)

    # ---- memory

    def reset_peak(self) -> None:
        """Peak memory counts from here."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif (clear := Path("/proc/self/clear_refs")).exists():
            clear.write_text("5")  # VmHWM becomes the present resident set

    def peak(self) -> int:
        """torch.cuda.max_memory_allocated, or this process's peak resident set."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        if status.exists():
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compile_pipeline(pipeline: DCARPipeline, mode: str, grid: tuple[int, int]) -> None:
    """torch.compile of trunk, head network and decoder, for the shapes of their first call only.

    The position table, a constant of the grid that numpy computes, stays out of it. In modes with CUDA graphs a result
    lives until the next call of any of them, so the hidden states, which all denoising steps read, are copied out.
    """
    generator, decoder = pipeline.generator, pipeline.tokenizer.decoder
    positions = generator.positions(grid)
    generator.positions = lambda _: positions
    trunk = torch.compile(generator.forward, mode=mode, dynamic=False)
    head = torch.compile(generator.head.forward, mode=mode, dynamic=False)
    decode = torch.compile(decoder.forward, mode=mode, dynamic=False)

    # CUDA graphs need to know where results may be given up; on a CPU the call would only import them
    begin = torch.compiler.cudagraph_mark_step_begin if pipeline.device.type == "cuda" else lambda: None

    def run_trunk(*args):
        begin()
        output = trunk(*args)
        output.hidden = output.hidden.clone()
        return output

    def run_head(*args):
        begin()
        return head(*args)

    def run_decoder(*args):
        begin()
        return decode(*args)

    generator.forward, generator.head.forward, decoder.forward = run_trunk, run_head, run_decoder


@torch.no_grad()
def fill_zeros(pipeline: DCARPipeline) -> None:
    """Small random values for parameters that start at zero: as zeros they would hide errors from the parity check, and
    products with zeros draw less power and run faster than those of a trained model."""
    generator = torch.Generator().manual_seed(1)
    for model in (pipeline.tokenizer, pipeline.generator, pipeline.text_encoder):
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.02, generator=generator)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = "CPU"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {k: _to_cpu(v) for k, v in value.items()}
    return [_to_cpu(v) for v in value]


def serve(connection, spec: RowSpec, work: Workload) -> None:
    """The process of a row: answers (method, arguments) with ("ok", result) or ("error", one line, details), until the
    parent is gone."""
    session = Session(spec, work)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = ("ok", getattr(session, method)(*arguments))
        except Exception as error:  # whatever it is, the parent reports it with the row's name
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
            # the compiler's own frames say nothing, its message names the line of ours that it stumbled over
            details = str(error) if spec.kind == "compile" else traceback.format_exc()
            answer = ("error", f"{type(error).__name__}: {' '.join(lines[:2])}", details)
        try:
            connection.send(answer)
        except BrokenPipeError:
            return

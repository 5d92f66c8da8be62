"""The fast sampler: the same tokens and residuals as :class:`ReferenceSampler`, without what cannot matter."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.config import SamplingConfig
from dcar_fast.engine import buckets
from dcar_fast.engine.base import Engine, without_autocast
from dcar_fast.engine.choice import Choice
from dcar_fast.engine.graph import CaptureError
from dcar_fast.models.dcar import DCAR
from dcar_fast.noise import CounterNoise, Noise
from dcar_fast.profiling import recording
from dcar_fast.sampling._draws import DrawnDraws, Draws, SeededDraws
from dcar_fast.sampling._fast_run import FastRun
from dcar_fast.sampling.reference import ReferenceSampler
from dcar_fast.sampling.request import Progress, Request
from dcar_fast.sampling.schedules import masked_counts
from dcar_fast.sampling.types import Known, Sample

logger = logging.getLogger(__name__)


class FastSampler:
    """DC-AR sampling with the weights packed once: the call and the results of :class:`ReferenceSampler`.

    Left out is what cannot change the result: see ``engine/trunk.py`` and ``engine/head.py``; and logits are computed
    for open positions alone, from the guided hidden state. In float32 the tokens are those of the reference up to ties
    within rounding. The packed weights follow the model: they are made anew when its parameters change, and all
    samplers of a model share them.

    backend: "triton" is the fused ops' kernels, "native" PyTorch's matrix products (packed by oneDNN on a CPU) and
    attention, "reference" the fused ops in plain PyTorch; "auto" takes "triton" on a GPU that can, else "native".
    dtype: of trunk and head, by default the model's; the sampling arithmetic is float32. cuda_graph: "auto" captures
    the whole of a call in a CUDA graph where that is possible and says once in the log where it is not; True insists,
    False never does. ``ValueError`` for what cannot be.

    A graph serves a bucket: 1, 2, 4, 8 or 16 images, prompts of up to 32, 64, 128 or all tokens, one grid and one
    config. It is captured when it is first needed, which takes seconds; see :meth:`warmup`.
    """

    def __init__(
        self,
        model: DCAR,
        config: SamplingConfig | None = None,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        cuda_graph: str | bool = "auto",
    ) -> None:
        if not isinstance(model, DCAR):
            raise ValueError(f"model must be a DCAR, got {type(model).__name__}")
        if cuda_graph not in ("auto", True, False):
            raise ValueError(f"cuda_graph must be 'auto', True or False, got {cuda_graph!r}")
        self.model, self.cuda_graph = model, cuda_graph
        self.config = ReferenceSampler(model, config).config  # checked there
        self._choice = Choice(model, backend, dtype)
        self._said: set[str] = set()

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
        from the device, the one time that this waits for it (and once more for the number of open tokens in ``known``
        on a GPU). A mask on a CPU must agree with them, one on a GPU is not read: there the lengths count. In a graph
        progress is reported at the end only. Autocast changes nothing.
        """
        request = self._request(text_states, text_mask, noise, known, grid, progress)
        if lengths is None:
            lengths = _lengths(text_mask)
        else:
            lengths = _checked(lengths, text_mask)
            request = replace(request, text_mask=_prefixes(lengths, request.text_mask))
        with without_autocast(request.device):
            return self._sample(_fit(request, lengths), lengths, trace)

    def _sample(self, request: Request, lengths: list[int] | None, trace: bool) -> Sample:
        engine = self._choice.engine(prefix=lengths is not None)
        with engine.lock:
            reason = self._no_graph(engine, request, trace)
            if reason is None:
                try:
                    return self._graphed(engine, request, lengths)
                except CaptureError as error:
                    if self.cuda_graph is True:
                        raise
                    reason = engine.capture_failed = f"capturing failed ({error})"
                    logger.warning("sampling without a CUDA graph from now on: %s", reason)
            self._explain(reason)
            prompts = lengths or [row.numpy().tobytes() for row in request.text_mask.cpu()]
            first = None
            if request.known is None:
                first = engine.first_unconditional(request.grid, request.text_mask, prompts)
            counts, most_open = _open_counts(request)
            states, mask = request.text_states, request.text_mask
            return FastRun(engine, request, _draws(request), states, mask, counts, most_open, first, trace)()

    @torch.no_grad()
    def warmup(
        self,
        batches: Sequence[int] = (1,),
        lengths: Sequence[int] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> list[tuple[int, int]]:
        """Packs the weights and captures the graphs of these batches and prompt lengths, the largest first.

        lengths: by default prompts of up to 64 tokens. Returns the captured buckets (images, tokens), none where there
        are no graphs. Kernels are compiled on the way.
        """
        longest = self.model.config.text_length
        lengths = [min(64, longest)] if lengths is None else lengths
        sizes = [
            (buckets.batch_bucket(batch), buckets.length_bucket(length, longest))
            for batch in buckets.check_sizes("batches", batches, buckets.BATCHES[-1])
            for length in buckets.check_sizes("lengths", lengths, longest)
        ]
        found = []
        for batch, length in dict.fromkeys(sizes):
            states = torch.zeros(batch, length, self.model.config.text_dim, device=self._choice.device)
            mask = torch.ones(batch, length, dtype=torch.bool, device=states.device)
            self(states, mask, 0, grid=grid, lengths=[length] * batch)
            request = self._request(states, mask, 0, None, grid, None)
            engine = self._choice.engine(prefix=True)
            if self._no_graph(engine, request, trace=False) is None:
                found.append((batch, length))
        return found

    def _request(self, text_states, text_mask, noise, known, grid, progress) -> Request:
        """Checked, and with the text on the model's device."""
        device = self._choice.device
        model, config = self.model.config, self.config
        request = Request.check(model, config, device, text_states, text_mask, noise, known, grid, progress)
        return replace(request, text_states=text_states.to(device), text_mask=text_mask.to(device))

    # ---- graphs

    def _no_graph(self, engine: Engine, request: Request, trace: bool) -> str | None:
        """Why this call runs without a graph; ``ValueError`` if one was insisted on."""
        if self.cuda_graph is False:
            return "cuda_graph is False"
        reason = engine.no_graph()
        if reason is not None:
            pass
        elif not isinstance(request.noise, CounterNoise):
            reason = f"a graph draws its own noise from seeds, this is a {type(request.noise).__name__}"
        elif request.known is not None:
            reason = "the number of open tokens differs from call to call"
        elif trace:
            reason = "a trace was asked for"
        elif recording():
            reason = "stages are being recorded, and none is seen in what a graph replays"
        if reason is not None and self.cuda_graph is True:
            raise ValueError(f"cuda_graph is True, but {reason}")
        return reason

    def _explain(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.info("sampling without a CUDA graph: %s", reason)

    def _graphed(self, engine: Engine, request: Request, lengths: list[int]) -> Sample:
        """The call in pieces of a bucket each."""
        samples = [
            self._replay(engine, _part(request, images), lengths[images]) for images in buckets.parts(request.batch)
        ]
        request.report("unmask", self.config.num_steps, self.config.num_steps)
        request.report("head", request.schedule.num_steps, request.schedule.num_steps)
        ids, residual = (torch.cat(parts) for parts in zip(*((s.ids, s.residual) for s in samples), strict=True))
        return Sample(ids, residual)

    def _replay(self, engine: Engine, request: Request, lengths: list[int]) -> Sample:
        """At most sixteen images: padded to their bucket, and cut off again."""
        batch, images = request.batch, buckets.batch_bucket(request.batch)
        length = buckets.length_bucket(max(lengths), self.model.config.text_length)
        more, keys = images - batch, length - request.text_mask.shape[1]
        seeds = _upload([*request.noise.seeds, *[0] * more], request.device)
        states = F.pad(request.text_states, (0, 0, 0, keys, 0, more))  # images without text, that nobody looks at
        mask = F.pad(request.text_mask, (0, keys, 0, more))
        inputs = {"states": states.to(engine.dtype), "mask": mask, "seeds": seeds}
        inputs["first"] = engine.first_unconditional(request.grid, mask, [*lengths, *[0] * more])
        padded = replace(request, text_states=states, text_mask=mask, progress=None)
        counts, most_open = _open_counts(padded)

        def sample(static: dict[str, Tensor]) -> tuple[Tensor, ...]:
            draws = SeededDraws(static["seeds"], padded.num_tokens, padded.model.latent_channels)
            text = static["states"], static["mask"]
            found = FastRun(engine, padded, draws, *text, counts, most_open, static["first"])()
            return found.ids, found.residual

        key = (self.config, request.grid, images, length)
        kept = engine.constants(request.grid, length), counts
        ids, residual = engine.graphs.run(key, sample, inputs, kept)
        return Sample(ids[:batch], residual[:batch])


def _lengths(mask: Tensor) -> list[int] | None:
    """How many True each row starts with and has; None if a row has some elsewhere. Reads the mask (B, T)."""
    mask = mask.cpu()
    lengths = mask.sum(dim=1)
    prefix = torch.arange(mask.shape[1]) < lengths[:, None]
    return lengths.tolist() if torch.equal(mask, prefix) else None


def _checked(lengths: Sequence[int], mask: Tensor) -> list[int]:
    """``ValueError`` unless there is one length for each row of the mask (B, T), within it, and, where the mask is on a
    CPU, its own."""
    batch, longest = mask.shape
    if not isinstance(lengths, Sequence) or isinstance(lengths, str):
        raise ValueError(f"lengths must be a list of integers, got {type(lengths).__name__}")
    if len(lengths) != batch:
        raise ValueError(f"lengths must have {batch} entries, one for each row of text, got {len(lengths)}")
    if not all(type(length) is int and 0 <= length <= longest for length in lengths):
        raise ValueError(f"lengths must be integers in 0..{longest}, got {list(lengths)}")
    if mask.device.type == "cpu" and _lengths(mask) != list(lengths):
        raise ValueError(f"lengths must be those of text_mask, {_lengths(mask)}, got {list(lengths)}")
    return list(lengths)


def _prefixes(lengths: list[int], mask: Tensor) -> Tensor:
    """The mask (B, T) that the lengths tell of: what is kept from call to call goes by them."""
    if mask.device.type == "cpu":
        return mask  # checked
    return torch.arange(mask.shape[1], device=mask.device) < _upload(lengths, mask.device)[:, None]


def _fit(request: Request, lengths: list[int] | None) -> Request:
    """With the text cut behind the longest prompt, and padded to a multiple of eight: libraries keep something for
    every shape that they meet."""
    here = request.text_mask.shape[1]
    longest = here if lengths is None else max(1, *lengths)
    longest = min(-(-longest // 8) * 8, request.model.text_length)
    states, mask = request.text_states[:, :longest], request.text_mask[:, :longest]
    if longest > here:
        states, mask = F.pad(states, (0, 0, 0, longest - here)), F.pad(mask, (0, longest - here))
    return replace(request, text_states=states, text_mask=mask)


def _part(request: Request, images: slice) -> Request:
    """The request of some of its images."""
    noise = request.noise
    seeds = CounterNoise(
        noise.seeds[images],
        num_tokens=request.num_tokens,
        codebook_size=noise.codebook_size,
        latent_channels=noise.latent_channels,
        device=request.device,
    )
    return replace(request, text_states=request.text_states[images], text_mask=request.text_mask[images], noise=seeds)


def _draws(request: Request) -> Draws:
    if isinstance(request.noise, CounterNoise):
        seeds = _upload(request.noise.seeds, request.device)
        return SeededDraws(seeds, request.num_tokens, request.model.latent_channels)
    return DrawnDraws(request)


def _open_counts(request: Request) -> tuple[Tensor, list[int]]:
    """The counts (S, B) and most_open (S) of :class:`FastRun`."""
    tokens = request.num_tokens
    table = masked_counts(request.sampling, tokens)  # (S, N + 1)
    on_device = _counts_on_device(request.sampling, tokens, request.device)
    if request.known is None:
        counts, most = on_device[:, tokens:].expand(-1, request.batch), tokens
        return counts, [most, *table[:-1, tokens].tolist()]
    open_tokens = (request.known.ids == request.model.mask_id).sum(dim=1)
    here = open_tokens.cpu().numpy()
    counts = on_device.index_select(1, open_tokens.to(request.device))
    return counts, [int(here.max()), *table[:-1, here].max(axis=1).tolist()]


@lru_cache(maxsize=32)
def _counts_on_device(sampling: SamplingConfig, num_tokens: int, device: torch.device) -> Tensor:
    return torch.from_numpy(masked_counts(sampling, num_tokens)).to(device)


def _upload(values: Sequence[int], device: torch.device) -> Tensor:
    """(len(values),) int64 on the device, without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(values, device=device)
    return torch.tensor(values, pin_memory=True).to(device, non_blocking=True)

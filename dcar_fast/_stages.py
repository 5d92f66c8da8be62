"""The three models and the stages between a prompt and pixels; what people call is in ``pipeline.py``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from dcar_fast._inputs import check_device
from dcar_fast.config import PipelineConfig, SamplingConfig
from dcar_fast.engine import captured
from dcar_fast.engine.decoder import FastDecoder
from dcar_fast.images import MAX_SIDE, tensor_to_pixels
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.text_encoder import TextEncoder, TextStates
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.noise import Noise
from dcar_fast.ops.vq_lookup import vq_lookup
from dcar_fast.profiling import stage
from dcar_fast.sampling import FastSampler, Known, ReferenceSampler, Sample
from dcar_fast.sampling.request import Progress

log = logging.getLogger(__name__)

Engine = Literal["fast", "reference"]
Self = TypeVar("Self", bound="Stages")


class Stages:
    """Tokenizer, generator and text encoder in eval mode, and the engine that runs them.

    The models must fit together (``ValueError``); the tokenizer gets the fast nearest-code lookup. trained: whether the
    weights mean anything; untrained ones are announced once. engine: what samples and decodes, "fast" or the plain
    modules, "reference"; it can be changed at any time, and so can ``sampler_dtype``. sampling: how calls sample that
    do not say, by default as the released sampler; it is saved with the models.
    """

    _sampler_dtype: torch.dtype | None = None

    def __init__(
        self,
        tokenizer: DCHT,
        generator: DCAR,
        text_encoder: TextEncoder,
        *,
        trained: bool = True,
        engine: Engine = "fast",
        sampling: SamplingConfig | None = None,
    ) -> None:
        self.engine = engine
        self.config = PipelineConfig(
            tokenizer.config, generator.config, text_encoder.config, sampling or SamplingConfig()
        )
        self.tokenizer, self.generator, self.text_encoder = tokenizer, generator, text_encoder
        self.tokenizer.quantizer.lookup = vq_lookup
        self.trained = trained
        self._announced = trained
        for model in self._models():
            model.eval()

    def to(self: Self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves all three models; the quantiser and all sampling arithmetic stay in float32 whatever the dtype.

        With float16 the text encoder stays in float32: T5's activations overflow float16.
        """
        device = device if device is None else check_device(device)
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
        self.tokenizer.to(device, dtype)
        self.generator.to(device, dtype)
        self.text_encoder.to(device, torch.float32 if dtype == torch.float16 else dtype)
        return self

    @property
    def engine(self) -> Engine:
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._engine = check_engine(engine)

    @property
    def sampler_dtype(self) -> torch.dtype | None:
        """The precision of the fast engine's sampler, by default None, the pipeline's own; see :class:`FastSampler`.
        torch.float8_e4m3fn needs a GPU that has it. ``ValueError`` for what cannot run where the pipeline is."""
        return self._sampler_dtype

    @sampler_dtype.setter
    def sampler_dtype(self, dtype: torch.dtype | None) -> None:
        FastSampler(self.generator, dtype=dtype)  # checks it
        self._sampler_dtype = dtype

    @property
    def sampling(self) -> SamplingConfig:
        """How calls sample that do not say; it can be set. ``ValueError`` for anything but a SamplingConfig."""
        return self.config.sampling

    @sampling.setter
    def sampling(self, sampling: SamplingConfig) -> None:
        self.config = replace(self.config, sampling=sampling)

    @property
    def device(self) -> torch.device:
        return self.generator.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.generator.token_embedding.weight.dtype

    def _models(self) -> tuple[DCHT, DCAR, TextEncoder]:
        return self.tokenizer, self.generator, self.text_encoder

    # ---- for benchmarks and other people's loops

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> TextStates:
        """B prompts -> TextStates, cut to the longest of them."""
        with stage("text"):
            if self.engine == "reference":
                return self.text_encoder(prompts)
            return captured.encode_text(self.text_encoder, prompts)

    def generate(
        self,
        text: TextStates,
        noise: int | Sequence[int] | Noise,
        sampling: SamplingConfig | None = None,
        grid: tuple[int, int] | None = None,
        known: Known | None = None,
        progress: Progress | None = None,
    ) -> Sample:
        """Token ids and residuals for encoded prompts; see :class:`dcar_fast.sampling.ReferenceSampler`. ``ValueError``
        under the reference engine while ``sampler_dtype`` is set, which it does not have."""
        options = {"known": known, "grid": grid, "progress": progress}
        if self.engine == "reference":
            if self.sampler_dtype is not None:
                raise ValueError(f"sampler_dtype is {self.sampler_dtype}, which engine 'reference' does not have")
            return ReferenceSampler(self.generator, sampling)(text.states, text.mask, noise, **options)
        sampler = FastSampler(self.generator, sampling, dtype=self.sampler_dtype)
        return sampler(text.states, text.mask, noise, lengths=text.lengths, **options)

    @torch.no_grad()
    def decode(self, sample: Sample, grid: tuple[int, int]) -> Tensor:
        """(B, H, W, 3) uint8 pixels on the device, from the codes plus the residuals."""
        with stage("decode"):
            ids = sample.ids.unflatten(1, tuple(grid))
            if self.engine == "reference":
                return tensor_to_pixels(self.tokenizer.decode_tokens(ids, sample.residual))
            return tensor_to_pixels(captured.decode_tokens(self.tokenizer, ids, sample.residual))

    def grid(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Pixels (None: the model's own square) -> (h, w) tokens; ``ValueError`` for other than multiples."""
        f = self.config.tokenizer.compression
        sides = []
        for name, value in (("height", height), ("width", width)):
            value = self.config.image_size if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value % f or not f <= value <= MAX_SIDE:
                raise ValueError(f"{name} must be a multiple of {f} in {f}..{MAX_SIDE} pixels, got {value!r}")
            sides.append(value // f)
        return sides[0], sides[1]

    # ---- for the pipeline

    def _decoder(self) -> DCHT | FastDecoder:
        return self.tokenizer if self.engine == "reference" else FastDecoder(self.tokenizer)

    def _announce(self) -> None:
        if not self._announced:
            log.warning("untrained weights: the images are noise, good for timing and tests only")
            self._announced = True


def check_engine(engine: str) -> Engine:
    """``ValueError`` unless ``engine`` is one of those there are."""
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {get_args(Engine)}, got {engine!r}")
    return engine

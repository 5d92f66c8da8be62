"""From a prompt to an image: text encoder, sampler, tokenizer and PIL in one object."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dcar_fast import __version__, checkpoints
from dcar_fast._inputs import check_device, image_seeds
from dcar_fast._progress import SamplingBar
from dcar_fast.config import DCARConfig, DCHTConfig, PipelineConfig, SamplingConfig, preset
from dcar_fast.images import (
    MAX_SIDE,
    image_to_multiple,
    image_to_tensor,
    mask_to_tensor,
    mask_to_tokens,
    tensor_to_pixels,
)
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.quantizer import Tokens
from dcar_fast.models.text_encoder import TextEncoder, TextStates, check_prompts
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.noise import STREAM_CHOICE, Noise, check_seeds, uniform
from dcar_fast.ops.vq_lookup import vq_lookup
from dcar_fast.profiling import stage
from dcar_fast.reference.diffusion import diffusion_schedule
from dcar_fast.sampling import Known, ReferenceSampler, Sample

log = logging.getLogger(__name__)


class DCARPipeline:
    """Text-to-image, reconstruction, inpainting and variations with one set of models.

    tokenizer, generator, text_encoder: the three models, which must fit together (``ValueError``); they are put into
    eval mode and the tokenizer gets the fast nearest-code lookup. trained: whether the weights mean anything; an
    untrained pipeline says so once.
    """

    def __init__(self, tokenizer: DCHT, generator: DCAR, text_encoder: TextEncoder, *, trained: bool = True) -> None:
        self.config = PipelineConfig(tokenizer.config, generator.config, text_encoder.config)
        self.tokenizer, self.generator, self.text_encoder = tokenizer, generator, text_encoder
        self.tokenizer.quantizer.lookup = vq_lookup
        self.trained = trained
        self._announced = trained
        for model in self._models():
            model.eval()

    # ---- making one

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        seed: int = 0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> DCARPipeline:
        """The named preset ("shapes", "dc-ar-256", "dc-ar-512", "dc-ar-1024") with random weights from ``seed``.

        dtype: float32 by default. torch's global generator is left as it was.
        """
        config = preset(name)
        device = check_device(device)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(check_seeds([seed])[0])  # the CPU's alone, which is put back
            tokenizer = DCHT(config.tokenizer)
            generator = DCAR(config.generator)
            text_encoder = TextEncoder(config.text)
        return cls(tokenizer, generator, text_encoder, trained=False).to(device, dtype)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> DCARPipeline:
        """A folder written by :meth:`save_pretrained` or ``dcar-fast convert``, or a hub repository with its files."""
        device = check_device(device)
        parts, _, trained = checkpoints.load_folder(checkpoints.find_folder(folder_or_hub_id, revision))
        return cls(**parts, trained=trained).to(device, dtype)

    @classmethod
    def from_official(
        cls,
        generator: str | Path,
        tokenizer: str | Path,
        text_encoder: str | Path = "google-t5/t5-base",
        *,
        generator_config: DCARConfig | None = None,
        tokenizer_config: DCHTConfig | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> DCARPipeline:
        """The released checkpoints: generator file, tokenizer folder, T5 folder or hub id.

        The configs are inferred from the shapes if left out, see :func:`dcar_fast.load_official_generator`.
        """
        device = check_device(device)
        dcar = checkpoints.load_official_generator(generator, generator_config)
        dcht = checkpoints.load_official_tokenizer(tokenizer, tokenizer_config)
        text = TextEncoder.from_t5(text_encoder, max_length=dcar.config.text_length)
        return cls(dcht, dcar, text).to(device, dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and one safetensors file per model; an interruption leaves an older save whole."""
        parts = dict(zip(checkpoints.PARTS, self._models(), strict=True))
        checkpoints.save_folder(folder, parts, self.config, self.trained)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> DCARPipeline:
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
    def device(self) -> torch.device:
        return self.generator.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.generator.token_embedding.weight.dtype

    def _models(self) -> tuple[DCHT, DCAR, TextEncoder]:
        return self.tokenizer, self.generator, self.text_encoder

    # ---- what users call

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        num_steps: int = 12,
        guidance_scale: float = 4.5,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 8,
        progress: bool = True,
        **sampling: Any,
    ) -> list[Image.Image]:
        """One image per prompt, in order.

        seed: image b uses seed + b; a list gives one seed per image; None draws one. An image's noise depends on its
        seed alone: in float32 its tokens are the same in every batch, in lower precision rounding may flip some.
        height, width: pixels, multiples of the compression, by default the model's own square. batch_size: prompts
        sampled together. Further keywords are fields of SamplingConfig. Each image's ``info`` holds prompt, seed and
        settings as text. ``ValueError`` for bad input, before any work.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        check_prompts(prompts)
        config = SamplingConfig.from_dict({"num_steps": num_steps, "guidance_scale": guidance_scale, **sampling})
        grid = self.grid(height, width)
        seeds = image_seeds(seed, len(prompts))
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
        self._announce()
        images: list[Image.Image] = []
        with self._bar(progress, math.ceil(len(prompts) / batch_size), config) as bar:
            for start in range(0, len(prompts), batch_size):
                chunk, chunk_seeds = prompts[start : start + batch_size], seeds[start : start + batch_size]
                text = self.encode_text(chunk)
                sample = self.generate(text, chunk_seeds, config, grid, progress=bar.step)
                images += self._to_images(sample, grid, chunk, chunk_seeds, config)
                bar.decoded()
        return images

    @torch.no_grad()
    def reconstruct(self, image: Image.Image, mode: str = "hybrid", pad: bool = False) -> Image.Image:
        """The image through the tokenizer and back: "hybrid" (codes + residuals) or "discrete" (codes alone).

        Its sides must be multiples of the compression; with ``pad`` edges are repeated to the next multiple and cut off
        again.
        """
        if mode not in ("hybrid", "discrete"):
            raise ValueError(f"mode must be 'hybrid' or 'discrete', got {mode!r}")
        pixels = image_to_multiple(image, self.config.tokenizer.compression, pad)
        self._announce()
        tokens = self.tokenizer.encode(pixels.to(self.device))
        latents = tokens.features if mode == "hybrid" else tokens.quantized
        result = Image.fromarray(tensor_to_pixels(self.tokenizer.decode(latents))[0].cpu().numpy())
        return result.crop((0, 0, *image.size))

    @torch.no_grad()
    def inpaint(
        self,
        image: Image.Image,
        mask: Image.Image,
        prompt: str,
        *,
        seed: int | None = None,
        num_steps: int = 12,
        guidance_scale: float = 4.5,
        pad: bool = False,
        paste: bool = False,
        progress: bool = True,
        **sampling: Any,
    ) -> Image.Image:
        """Repaints the white part of ``mask`` after ``prompt``; every token it touches and one around are sampled.

        The rest goes through the tokenizer unchanged (tokens and residuals bit-equal); ``paste`` puts the original
        pixels back outside the mask. An all-black mask gives the reconstruction, an all-white one a new image.
        """
        config = SamplingConfig.from_dict({"num_steps": num_steps, "guidance_scale": guidance_scale, **sampling})
        pixels = image_to_multiple(image, self.config.tokenizer.compression, pad)
        hidden = mask_to_tensor(mask, image.size)
        padded = torch.zeros(pixels.shape[2:], dtype=torch.bool)
        padded[: hidden.shape[0], : hidden.shape[1]] = hidden
        is_open = mask_to_tokens(padded, self.config.tokenizer.compression)
        seeds = image_seeds(seed, 1)
        result = self._repaint(pixels.masked_fill(padded, 0.0), is_open, prompt, seeds, config, progress)
        result = self._cut(result, image)
        if paste:
            original = Image.fromarray(tensor_to_pixels(image_to_tensor(image))[0].numpy())
            pasted = Image.composite(result, original, Image.fromarray(hidden.numpy()))
            pasted.info = result.info
            return pasted
        return result

    @torch.no_grad()
    def variation(
        self,
        image: Image.Image,
        prompt: str,
        strength: float = 0.5,
        *,
        seed: int | None = None,
        num_steps: int = 12,
        guidance_scale: float = 4.5,
        pad: bool = False,
        progress: bool = True,
        **sampling: Any,
    ) -> Image.Image:
        """Samples a random ``strength`` share (0..1, rounded to whole tokens) of the image's tokens anew."""
        if not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
            raise ValueError(f"strength must be a number in 0..1, got {strength!r}")
        config = SamplingConfig.from_dict({"num_steps": num_steps, "guidance_scale": guidance_scale, **sampling})
        pixels = image_to_multiple(image, self.config.tokenizer.compression, pad)
        seeds = image_seeds(seed, 1)
        f = self.config.tokenizer.compression
        height, width = pixels.shape[2] // f, pixels.shape[3] // f
        ranks = uniform(seeds[0], torch.arange(height * width), 1, 0, STREAM_CHOICE)[:, 0].argsort().argsort()
        is_open = ranks < round(strength * height * width)
        result = self._repaint(pixels, is_open.view(height, width), prompt, seeds, config, progress)
        return self._cut(result, image)

    # ---- stages, for benchmarks and other people's loops

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> TextStates:
        """B prompts -> TextStates, cut to the longest of them."""
        with stage("text"):
            return self.text_encoder(prompts)

    def generate(
        self,
        text: TextStates,
        noise: int | Sequence[int] | Noise,
        sampling: SamplingConfig | None = None,
        grid: tuple[int, int] | None = None,
        known: Known | None = None,
        progress=None,
    ) -> Sample:
        """Token ids and residuals for encoded prompts; see :class:`dcar_fast.sampling.ReferenceSampler`."""
        sampler = ReferenceSampler(self.generator, sampling)
        return sampler(text.states, text.mask, noise, known=known, grid=grid, progress=progress)

    @torch.no_grad()
    def decode(self, sample: Sample, grid: tuple[int, int]) -> Tensor:
        """(B, H, W, 3) uint8 pixels on the device, from the codes plus the residuals."""
        with stage("decode"):
            images = self.tokenizer.decode_tokens(sample.ids.unflatten(1, tuple(grid)), sample.residual)
            return tensor_to_pixels(images)

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

    # ---- shared by the above

    def _repaint(self, pixels, is_open, prompt, seeds, config, progress: bool) -> Image.Image:
        check_prompts([prompt])
        self._announce()
        tokens: Tokens = self.tokenizer.encode(pixels.to(self.device))
        ids = tokens.ids.flatten(1).masked_fill(is_open.to(self.device).flatten(), self.config.generator.mask_id)
        grid = tuple(tokens.ids.shape[1:])
        with self._bar(progress, 1, config) as bar:
            text = self.encode_text([prompt])
            known = Known(ids, tokens.residual)
            sample = self.generate(text, seeds, config, grid, known=known, progress=bar.step)
            image = self._to_images(sample, grid, [prompt], seeds, config)[0]
            bar.decoded()
        return image

    def _to_images(self, sample, grid, prompts, seeds, config) -> list[Image.Image]:
        pixels = self.decode(sample, grid).cpu().numpy()
        images = [Image.fromarray(p) for p in pixels]
        size = {"height": images[0].height, "width": images[0].width}
        settings = json.dumps({**config.to_dict(), **size, "dtype": str(self.dtype).removeprefix("torch.")})
        software = f"dcar_fast {__version__}"
        for image, prompt, seed in zip(images, prompts, seeds, strict=True):
            image.info = {"prompt": prompt, "seed": str(seed), "settings": settings, "software": software}
        return images

    @staticmethod
    def _cut(result: Image.Image, image: Image.Image) -> Image.Image:
        cut = result.crop((0, 0, *image.size))
        cut.info = result.info
        return cut

    def _bar(self, shown: bool, batches: int, config: SamplingConfig) -> SamplingBar:
        denoising = diffusion_schedule(self.config.generator.head_steps).num_steps
        return SamplingBar(shown, batches, config.num_steps + denoising)

    def _announce(self) -> None:
        if not self._announced:
            log.warning("untrained weights: the images are noise, good for timing and tests only")
            self._announced = True

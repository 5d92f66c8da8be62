"""From a prompt to an image: text encoder, sampler, tokenizer and PIL in one object."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dcar_fast import __version__, checkpoints
from dcar_fast._inputs import check_device, image_seeds
from dcar_fast._progress import SamplingBar
from dcar_fast._stages import Engine, Stages, check_engine
from dcar_fast.bulk.folder import ImageFolder, fingerprint
from dcar_fast.bulk.jobs import make_jobs
from dcar_fast.bulk.ranks import Rank
from dcar_fast.bulk.run import Report, check_batch_size, draw_all
from dcar_fast.config import DCARConfig, DCHTConfig, SamplingConfig, preset
from dcar_fast.images import (
    image_to_multiple,
    image_to_tensor,
    mask_to_tensor,
    mask_to_tokens,
    tensor_to_pixels,
)
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.quantizer import Tokens
from dcar_fast.models.text_encoder import TextEncoder, check_prompts
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.noise import STREAM_CHOICE, check_seeds, uniform
from dcar_fast.reference.diffusion import diffusion_schedule
from dcar_fast.sampling import Known


class DCARPipeline(Stages):
    """Text-to-image, reconstruction, inpainting and variations with one set of models.

    DCARPipeline(tokenizer, generator, text_encoder, *, trained=True, engine="fast", sampling=None): the three models,
    which must fit together (``ValueError``); they are put into eval mode and the tokenizer gets the fast nearest-code
    lookup. trained: whether the weights mean anything; an untrained pipeline says so once. engine: what samples and
    decodes, "fast" or the plain modules, "reference". sampling: how calls sample that do not say (None: as the released
    sampler). The attributes engine and sampling can be set at any time.
    """

    # ---- making one

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        seed: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        engine: Engine = "fast",
    ) -> DCARPipeline:
        """The named preset: "shapes", with the trained weights that come with the package; "dc-ar-256", "dc-ar-512" and
        "dc-ar-1024" with random ones.

        seed: random weights from this seed instead of trained ones (None: 0 where there are none); torch's global
        generator is left as it was. dtype: float32 by default.
        """
        config = preset(name)
        device, engine = check_device(device), check_engine(engine)
        if seed is None and (folder := checkpoints.shipped_folder(name)) is not None:
            parts, config, trained = checkpoints.load_folder(folder)
            # they are stored in half precision
            return cls(**parts, trained=trained, engine=engine, sampling=config.sampling).to(
                device, dtype or torch.float32
            )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(check_seeds([seed or 0])[0])  # the CPU's alone, which is put back
            tokenizer = DCHT(config.tokenizer)
            generator = DCAR(config.generator)
            text_encoder = TextEncoder(config.text)
        return cls(tokenizer, generator, text_encoder, trained=False, engine=engine).to(device, dtype)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        engine: Engine = "fast",
    ) -> DCARPipeline:
        """A folder written by :meth:`save_pretrained` or ``dcar-fast convert``, or a hub repository with its files."""
        device, engine = check_device(device), check_engine(engine)
        parts, config, trained = checkpoints.load_folder(checkpoints.find_folder(folder_or_hub_id, revision))
        return cls(**parts, trained=trained, engine=engine, sampling=config.sampling).to(device, dtype)

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
        engine: Engine = "fast",
    ) -> DCARPipeline:
        """The released checkpoints: generator file, tokenizer folder, T5 folder or hub id.

        The configs are inferred from the shapes if left out, see :func:`dcar_fast.load_official_generator`.
        """
        device, engine = check_device(device), check_engine(engine)
        dcar = checkpoints.load_official_generator(generator, generator_config)
        dcht = checkpoints.load_official_tokenizer(tokenizer, tokenizer_config)
        text = TextEncoder.from_t5(text_encoder, max_length=dcar.config.text_length)
        return cls(dcht, dcar, text, engine=engine).to(device, dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and one safetensors file per model; an interruption leaves an older save whole."""
        parts = dict(zip(checkpoints.PARTS, self._models(), strict=True))
        checkpoints.save_folder(folder, parts, self.config, self.trained)

    # ---- what users call

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
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
        sampled together. num_steps, guidance_scale and further keywords are fields of SamplingConfig; what is left out
        is as in ``pipeline.sampling``, for the released models 12 steps and a scale of 4.5. Each image's ``info`` holds
        prompt, seed and settings as text. ``ValueError`` for bad input, before any work.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        check_prompts(prompts)
        config = self._sampling(num_steps=num_steps, guidance_scale=guidance_scale, **sampling)
        grid = self.grid(height, width)
        seeds = image_seeds(seed, len(prompts))
        check_batch_size(batch_size)
        self._announce()
        images: list[Image.Image] = []
        with self._bar(progress, math.ceil(len(prompts) / batch_size), config) as bar:
            for start in range(0, len(prompts), batch_size):
                chunk, chunk_seeds = prompts[start : start + batch_size], seeds[start : start + batch_size]
                images += self._draw(chunk, chunk_seeds, config, grid, bar.step)
                bar.decoded()
        return images

    @torch.no_grad()
    def generate_to(
        self,
        folder: str | Path,
        prompts: Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        names: Sequence[str | None] | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 8,
        overwrite: bool = False,
        rank: Rank | None = None,
        progress: bool = True,
        **sampling: Any,
    ) -> Report:
        """One PNG per prompt in ``folder``, written as they come; 00000.png, ... in the order of the prompts, or names.

        Prompts of about equal length share a batch; an image depends on its prompt and its seed alone (seed + its
        index, or one seed each), as in :meth:`__call__`. A further call with the same arguments draws what is missing:
        each file is whole or not there at all. An image that other prompts, seeds, settings or weights gave is a
        ``ValueError``; with ``overwrite`` everything is drawn anew. metadata.jsonl lists the files once all are there.

        rank: which share of the prompts this process draws, by default as ``torchrun`` or ``accelerate launch`` say in
        the environment. Bad input is a ``ValueError`` before any work.
        """
        jobs = make_jobs(prompts, seed, names)
        config = self._sampling(num_steps=num_steps, guidance_scale=guidance_scale, **sampling)
        grid = self.grid(height, width)
        check_batch_size(batch_size)
        rank = Rank.from_environment() if rank is None else rank
        self._announce()
        return draw_all(
            jobs,
            ImageFolder(folder, self._settings(config, grid), fingerprint(self._models())),
            lambda prompts, seeds, progress: self._draw(prompts, seeds, config, grid, progress),
            self.text_encoder.count_tokens,
            batch_size=batch_size,
            overwrite=overwrite,
            rank=rank,
            progress=progress,
        )

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
        result = Image.fromarray(tensor_to_pixels(self._decoder().decode(latents))[0].cpu().numpy())
        return result.crop((0, 0, *image.size))

    @torch.no_grad()
    def inpaint(
        self,
        image: Image.Image,
        mask: Image.Image,
        prompt: str,
        *,
        seed: int | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        pad: bool = False,
        paste: bool = False,
        progress: bool = True,
        **sampling: Any,
    ) -> Image.Image:
        """Repaints the white part of ``mask`` after ``prompt``; every token it touches and one around are sampled.

        The rest goes through the tokenizer unchanged (tokens and residuals bit-equal); ``paste`` puts the original
        pixels back outside the mask. An all-black mask gives the reconstruction, an all-white one a new image.
        """
        config = self._sampling(num_steps=num_steps, guidance_scale=guidance_scale, **sampling)
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
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        pad: bool = False,
        progress: bool = True,
        **sampling: Any,
    ) -> Image.Image:
        """Samples a random ``strength`` share (0..1, rounded to whole tokens) of the image's tokens anew."""
        if not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
            raise ValueError(f"strength must be a number in 0..1, got {strength!r}")
        config = self._sampling(num_steps=num_steps, guidance_scale=guidance_scale, **sampling)
        pixels = image_to_multiple(image, self.config.tokenizer.compression, pad)
        seeds = image_seeds(seed, 1)
        f = self.config.tokenizer.compression
        height, width = pixels.shape[2] // f, pixels.shape[3] // f
        ranks = uniform(seeds[0], torch.arange(height * width), 1, 0, STREAM_CHOICE)[:, 0].argsort().argsort()
        is_open = ranks < round(strength * height * width)
        result = self._repaint(pixels, is_open.view(height, width), prompt, seeds, config, progress)
        return self._cut(result, image)

    # ---- shared by the above

    def _sampling(self, **changes: Any) -> SamplingConfig:
        """The pipeline's own settings with those that a call gives."""
        given = {name: value for name, value in changes.items() if value is not None}
        return SamplingConfig.from_dict({**self.sampling.to_dict(), **given})

    def _draw(self, prompts, seeds, config: SamplingConfig, grid, progress) -> list[Image.Image]:
        sample = self.generate(self.encode_text(prompts), seeds, config, grid, progress=progress)
        return self._to_images(sample, grid, prompts, seeds, config)

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
        settings = json.dumps(self._settings(config, grid))
        software = f"dcar_fast {__version__}, {self.engine} engine"
        for image, prompt, seed in zip(images, prompts, seeds, strict=True):
            image.info = {"prompt": prompt, "seed": str(seed), "settings": settings, "software": software}
        return images

    def _settings(self, config: SamplingConfig, grid: tuple[int, int]) -> dict[str, Any]:
        height, width = (side * self.config.tokenizer.compression for side in grid)
        dtype = str(self.dtype).removeprefix("torch.")
        settings = {**config.to_dict(), "height": height, "width": width, "dtype": dtype}
        if self.sampler_dtype is not None:
            settings["sampler_dtype"] = str(self.sampler_dtype).removeprefix("torch.")
        return settings

    @staticmethod
    def _cut(result: Image.Image, image: Image.Image) -> Image.Image:
        cut = result.crop((0, 0, *image.size))
        cut.info = result.info
        return cut

    def _bar(self, shown: bool, batches: int, config: SamplingConfig) -> SamplingBar:
        denoising = diffusion_schedule(self.config.generator.head_steps).num_steps
        return SamplingBar(shown, batches, config.num_steps + denoising)

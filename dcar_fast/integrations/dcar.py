"""The released DC-AR generator on :class:`FastSampler`: the same ``generate``, weights read from the live module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dcar_fast.config import GUIDANCE_SCHEDULES, DCARConfig, SamplingConfig
from dcar_fast.integrations._live import LiveGenerator
from dcar_fast.models.dcar import DCAR
from dcar_fast.noise import Noise
from dcar_fast.sampling import FastSampler, Known
from dcar_fast.sampling.schedules import head_guidance, plan


def accelerate(
    generator: nn.Module,
    *,
    compatible: bool = False,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    cuda_graph: str | bool = "auto",
) -> AcceleratedGenerator:
    """An object with the released generator's ``generate`` and everything else of it, that samples on FastSampler.

    Weights are not copied but read from ``generator`` in every call: training, ``.to()``, ``load_state_dict`` go on
    working on it. compatible: draw random numbers from torch as the released sampler does, in its order and of its
    shapes, and spread inpainting over all tokens: the same seed then gives the released tokens and residuals to
    rounding, wherever the released sampler's own are well defined. Else every image draws from a seed of its own, so
    that what it shows does not depend on the batch, and inpainting is spread over the open tokens.

    In both cases the defects of the released sampler are gone: each row keeps its own count of open tokens, no
    guidance (0) and a single linear step work, and ``condition`` may be token ids. backend, dtype and cuda_graph are
    FastSampler's. ``ValueError`` with the reason for anything but the released generator.
    """
    if not isinstance(compatible, bool):
        raise ValueError(f"compatible must be True or False, got {compatible!r}")
    return AcceleratedGenerator(LiveGenerator(generator), compatible, backend, dtype, cuda_graph)


class AcceleratedGenerator:
    """What :func:`accelerate` returns. Attributes that are not here are the generator's."""

    def __init__(
        self, live: LiveGenerator, compatible: bool, backend: str, dtype: torch.dtype | None, cuda_graph: str | bool
    ) -> None:
        self.generator, self.compatible = live.generator, compatible
        self._live = live
        self._options = {"backend": backend, "dtype": dtype, "cuda_graph": cuda_graph}
        FastSampler(live.model(), **self._options)  # checks them

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "generator" not in self.__dict__:
            raise AttributeError(name)
        value = getattr(self.generator, name)
        return self._staying(value) if callable(value) and not isinstance(value, nn.Module) else value

    @torch.no_grad()
    def generate(
        self,
        condition: Sequence[str] | Tensor,
        init_image_tokens: Tensor | None = None,
        init_residual_features: Tensor | None = None,
        init_mask: Tensor | None = None,
        guidance_scale: float = 3.0,
        guidance_decay: str = "constant",
        guidance_scale_pow: float = 3.0,
        randomize_temperature: float = 4.5,
        softmax_temperature_annealing: bool = False,
        num_sample_steps: int = 8,
        *,
        noise: int | Sequence[int] | Noise | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Token ids (B, N) int64 and residuals (B, N, C) float32, as the released ``generate`` returns them.

        condition: B prompts, or their token ids (B, T). init_image_tokens (B, N): what is known, with the mask id
        where it is open. init_residual_features (B, N, C) are put back where init_mask (B, N) is True (by default where
        the token is known). noise: one seed, a seed for each image, or a Noise; None draws from torch's generators.
        The other arguments have the released names, meanings and defaults. ``ValueError`` for what does not fit.
        """
        if guidance_decay not in GUIDANCE_SCHEDULES:
            raise ValueError(f"guidance_decay must be one of {GUIDANCE_SCHEDULES}, got {guidance_decay!r}")
        if noise is not None and self.compatible:
            raise ValueError("noise must be None with compatible=True, which draws as the released sampler does")
        config = SamplingConfig(
            num_steps=num_sample_steps,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_decay,
            guidance_power=guidance_scale_pow,
            temperature=randomize_temperature,
            anneal_softmax=softmax_temperature_annealing,
            schedule_tokens="all" if self.compatible else "open",
        )
        model = self._live.model()
        states, mask = self._text(condition, model.token_embedding.weight.device)
        known = _known(init_image_tokens, init_residual_features, init_mask)
        if noise is None:
            noise = self._noise(len(states), model, config)
        found = FastSampler(model, config, **self._options)(states, mask, noise, known)
        return found.ids, found.residual

    def _text(self, condition: Sequence[str] | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """States (B, T, Dt) and mask (B, T) of the generator's own text encoder."""
        if isinstance(condition, Tensor):
            if condition.dim() != 2 or condition.is_floating_point() or condition.dtype == torch.bool:
                raise ValueError(f"condition must be token ids (B, T), got {tuple(condition.shape)} {condition.dtype}")
            ids = condition
        else:
            prompts = [condition] if isinstance(condition, str) else list(condition or [])
            if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
                raise ValueError("condition must be a list of at least one prompt, or token ids (B, T)")
            longest = self._live.model().config.text_length
            options = {"padding": "max_length", "max_length": longest, "truncation": True, "return_tensors": "pt"}
            ids = torch.cat([self.generator.text_tokenizer(prompt, **options).input_ids for prompt in prompts])
        states, mask = self.generator.encode_text(ids.to(device))
        return states, mask.bool()

    def _noise(self, batch: int, model: DCAR, config: SamplingConfig) -> list[int] | ReleasedNoise:
        if self.compatible:
            return ReleasedNoise(batch, model, config)
        return torch.randint(2**62, (batch,)).tolist()

    def _staying(self, method: Any) -> Any:
        """A method of the generator; what returns the generator (``eval``, ``to``, ...) returns this object."""

        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self if result is self.generator else result

        return call


class ReleasedNoise(Noise):
    """torch's generators, used up as the released sampler does.

    In every step: a uniform for each row, on the default device, if there are unconditional ones (which of them to drop
    is certain, but it draws); uniforms of all logits, then of all confidences (also in the last step, which needs
    none). Then the start of half of the residuals' rows (of all of them where the head is not guided), on the default
    device; then normals of all rows in every denoising step.
    """

    def __init__(self, batch: int, model: DCAR, config: SamplingConfig) -> None:
        c: DCARConfig = model.config
        self._tokens, self._codes, self._channels = (batch, c.num_tokens), c.codebook_size, c.latent_channels
        weight = model.token_embedding.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._guided = head_guidance(config) != 1.0
        always = config.guidance_schedule == "power-cosine"
        self._drops = [always or step.guidance is not None for step in plan(config)]

    def token(self, step: int) -> Tensor:
        if self._drops[step]:
            torch.rand(2 * self._tokens[0])
        return torch.rand(*self._tokens, self._codes, device=self._device, dtype=self._dtype).float()

    def confidence(self, step: int) -> Tensor:
        return torch.rand(*self._tokens, device=self._device)

    def latent_init(self) -> Tensor:
        torch.rand(*self._tokens, device=self._device)  # the last step's confidences
        rows = self._tokens[0] * self._tokens[1]
        start = torch.randn(rows if self._guided else 2 * rows, self._channels)
        return start[:rows].view(*self._tokens, -1).to(self._device)

    def latent(self, i: int) -> Tensor:
        rows = self._tokens[0] * self._tokens[1]
        return torch.randn(2 * rows, self._channels, device=self._device)[:rows].view(*self._tokens, -1)


def _known(ids: Tensor | None, residual: Tensor | None, keep: Tensor | None) -> Known | None:
    if ids is None:
        for name, value in (("init_residual_features", residual), ("init_mask", keep)):
            if value is not None:
                raise ValueError(f"{name} needs init_image_tokens")
        return None
    if keep is not None:
        keep = keep.reshape(ids.shape).bool()
    return Known(ids, residual, keep if residual is not None else None)

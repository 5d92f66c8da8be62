"""Sampling noise as an argument: pure functions of (seed, position, step), recordings, or torch's generator.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with

    key     = (low, high) 32-bit words of the image's 64-bit seed
    counter = (element // 4, token, step, stream), the value is word ``element % 4`` of the result

Streams: 0 token noise (element = vocabulary id), 1 confidence noise (element 0), 2 first latent and 3 latent of one
denoising step (element = channel, step = drawing order), 4 the choice of tokens to repaint (element 0). The noise of an
image therefore depends on its seed alone: not on its neighbours in the batch, tile sizes, the device or the backend.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

STREAM_TOKEN, STREAM_CONFIDENCE, STREAM_LATENT_INIT, STREAM_LATENT, STREAM_CHOICE = range(5)

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CHUNK_CPU = 1 << 16  # counters per block of work: int64 temporaries of 512 KiB stay in cache
_CHUNK = 1 << 24  # on other devices: few launches, temporaries of 128 MiB


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32: four words of the counter and two of the key in, four random words out.

    All are int64 tensors holding unsigned 32-bit values and broadcast against each other. A 32 x 32 bit product wraps
    in int64, which leaves its 64 bits right; the arithmetic shift's sign bits are masked off.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words_to_uniform(words: Tensor) -> Tensor:
    """u = ((word >> 9) + 0.5) * 2^-23: float32, exact, strictly inside (0, 1)."""
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23


def uniform(seed: int | Tensor, tokens: Tensor, elements: int, step: int, stream: int) -> Tensor:
    """Uniforms (len(tokens), elements), float32 on the device of ``tokens`` (int64 positions). ``seed``: one image's,
    or int64 (len(tokens),) for rows of several; nothing waits for a GPU."""
    quads = -(-elements // 4)
    out = torch.empty(len(tokens), quads * 4, dtype=torch.float32, device=tokens.device)
    first = torch.arange(quads, device=tokens.device)  # counter word 0
    step_word, stream_word = (torch.full((1, 1), v, device=tokens.device) for v in (step, stream))
    chunk = _CHUNK_CPU if tokens.device.type == "cpu" else _CHUNK
    rows = max(1, chunk // max(quads, 1))
    for start in range(0, len(tokens), rows):
        block = tokens[start : start + rows, None]
        seeds = seed if isinstance(seed, int) else seed[start : start + rows, None]
        key = (seeds & _MASK, (seeds >> 32) & _MASK)
        counter = torch.broadcast_tensors(first[None], block, step_word, stream_word)
        words = torch.stack(philox4x32(counter, key), dim=-1)  # (rows, quads, 4)
        out[start : start + rows] = words_to_uniform(words).flatten(1)
    return out[:, :elements]


def normal(seed: int | Tensor, tokens: Tensor, elements: int, step: int, stream: int) -> Tensor:
    """Standard normals (len(tokens), elements): Box-Muller on the words (0, 1) and (2, 3) of each counter."""
    quads = -(-elements // 4)
    u = uniform(seed, tokens, quads * 4, step, stream).view(len(tokens), quads * 2, 2)  # pairs
    radius, angle = torch.sqrt(-2.0 * torch.log(u[..., 0])), (2.0 * math.pi) * u[..., 1]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(1)[:, :elements]


@dataclass(frozen=True, eq=False)
class TokenNoise:
    """Counter noise for rows that are not a whole image: seeds (R,) int64, tokens (R,) int64 positions, one step."""

    seeds: Tensor
    tokens: Tensor
    step: int

    def uniform(self, elements: int) -> Tensor:
        """The uniforms (R, elements) that :class:`CounterNoise` gives these rows."""
        return uniform(self.seeds, self.tokens, elements, self.step, STREAM_TOKEN)


@dataclass(frozen=True, eq=False)
class ConfidenceNoise:
    """Counter noise on the confidences of whole images: seeds (B,) int64, one step."""

    seeds: Tensor
    step: int

    def uniform(self, tokens: int) -> Tensor:
        """The uniforms (B, tokens) that :meth:`CounterNoise.confidence` gives these images."""
        batch = len(self.seeds)
        positions = torch.arange(tokens, device=self.seeds.device).expand(batch, tokens)
        seeds = self.seeds[:, None].expand(batch, tokens)
        return uniform(seeds.flatten(), positions.flatten(), 1, self.step, STREAM_CONFIDENCE).view(batch, tokens)


@dataclass(frozen=True, eq=False)
class LatentNoise:
    """Counter noise of one denoising step for rows that are not a whole image: seeds (R,) int64, tokens (R,) int64
    positions, ``step`` in drawing order (0 belongs to the largest timestep)."""

    seeds: Tensor
    tokens: Tensor
    step: int

    def normal(self, channels: int) -> Tensor:
        """The normals (R, channels) that :meth:`CounterNoise.latent` gives these rows."""
        return normal(self.seeds, self.tokens, channels, self.step, STREAM_LATENT)


@dataclass(frozen=True)
class NoiseShape:
    """What one run draws: B images of N tokens, V codes, C channels, S unmasking steps, K denoising steps."""

    batch: int
    num_tokens: int
    codebook_size: int
    latent_channels: int
    steps: int
    denoising_steps: int


class Noise(ABC):
    """What a sampler draws. Uniforms lie in (0, 1); latents are standard normal; everything is float32."""

    @abstractmethod
    def token(self, step: int) -> Tensor:
        """Uniforms (B, N, V) that become the Gumbel noise of unmasking step ``step``."""

    @abstractmethod
    def confidence(self, step: int) -> Tensor:
        """Uniforms (B, N) that become the Gumbel noise on the confidences of step ``step``."""

    @abstractmethod
    def latent_init(self) -> Tensor:
        """Normals (B, N, C): where denoising starts."""

    @abstractmethod
    def latent(self, i: int) -> Tensor:
        """Normals (B, N, C) of the i-th denoising step in drawing order (i = 0 is the largest timestep)."""

    def check(self, shape: NoiseShape) -> None:  # noqa: B027 - optional: what is drawn is checked again
        """``ValueError`` if this noise cannot serve a run of this shape; samplers ask before any work."""


class CounterNoise(Noise):
    """Philox noise of B images from B seeds (each 0 <= seed < 2^63); see the module's docstring."""

    def __init__(
        self,
        seeds: Sequence[int],
        *,
        num_tokens: int,
        codebook_size: int,
        latent_channels: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seeds = check_seeds(seeds)
        self.codebook_size, self.latent_channels = codebook_size, latent_channels
        self.tokens = torch.arange(num_tokens, device=device)

    def token(self, step: int) -> Tensor:
        return self._draw(uniform, self.codebook_size, step, STREAM_TOKEN)

    def confidence(self, step: int) -> Tensor:
        return self._draw(uniform, 1, step, STREAM_CONFIDENCE)[..., 0]

    def latent_init(self) -> Tensor:
        return self._draw(normal, self.latent_channels, 0, STREAM_LATENT_INIT)

    def latent(self, i: int) -> Tensor:
        return self._draw(normal, self.latent_channels, i, STREAM_LATENT)

    def check(self, shape: NoiseShape) -> None:
        ours = (len(self.seeds), len(self.tokens), self.codebook_size, self.latent_channels)
        wanted = (shape.batch, shape.num_tokens, shape.codebook_size, shape.latent_channels)
        if ours != wanted:
            raise ValueError(f"noise: CounterNoise is for (B, N, V, C) = {ours}, the run needs {wanted}")

    def _draw(self, draw, elements: int, step: int, stream: int) -> Tensor:
        return torch.stack([draw(seed, self.tokens, elements, step, stream) for seed in self.seeds])


class RecordedNoise(Noise):
    """Plays back tensors: ``token[s]`` (B, N, V), ``confidence[s]`` (B, N), ``latent_init`` and ``latent[i]``
    (B, N, C), all in drawing order. Running out of a recording is a ``ValueError``."""

    def __init__(
        self,
        token: Sequence[Tensor],
        confidence: Sequence[Tensor],
        latent_init: Tensor,
        latent: Sequence[Tensor],
    ) -> None:
        self._lists = {"token": list(token), "confidence": list(confidence), "latent": list(latent)}
        self._latent_init = latent_init

    def token(self, step: int) -> Tensor:
        return self._get("token", step)

    def confidence(self, step: int) -> Tensor:
        return self._get("confidence", step)

    def latent_init(self) -> Tensor:
        return self._latent_init

    def latent(self, i: int) -> Tensor:
        return self._get("latent", i)

    def check(self, shape: NoiseShape) -> None:
        rows = (shape.batch, shape.num_tokens)
        latent = (*rows, shape.latent_channels)
        needed = {
            "token": (shape.steps, (*rows, shape.codebook_size)),
            "confidence": (shape.steps - 1, rows),  # the last step masks nothing
            "latent": (shape.denoising_steps, latent),
        }
        for name, (count, size) in needed.items():
            recorded = self._lists[name]
            if len(recorded) < count:
                raise ValueError(f"noise: RecordedNoise holds {len(recorded)} draws of {name}, the run needs {count}")
            _check_draws(name, recorded[:count], size)
        _check_draws("latent_init", [self._latent_init], latent)

    def _get(self, name: str, index: int) -> Tensor:
        recorded = self._lists[name]
        if index >= len(recorded):
            raise ValueError(f"noise: RecordedNoise holds {len(recorded)} draws of {name}, number {index} is needed")
        return recorded[index]


class TorchNoise(Noise):
    """torch's own generator, drawn anew at every call: what the released sampler uses, and the benchmark baselines.

    The draws depend on the batch and the device; use :class:`CounterNoise` where images must be reproducible.
    """

    def __init__(
        self,
        batch: int,
        *,
        num_tokens: int,
        codebook_size: int,
        latent_channels: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._options = {"generator": generator, "device": device}
        self._shape, self._codebook, self._channels = (batch, num_tokens), codebook_size, latent_channels

    def token(self, step: int) -> Tensor:
        return torch.rand(*self._shape, self._codebook, **self._options)

    def confidence(self, step: int) -> Tensor:
        return torch.rand(*self._shape, **self._options)

    def latent_init(self) -> Tensor:
        return torch.randn(*self._shape, self._channels, **self._options)

    def latent(self, i: int) -> Tensor:
        return torch.randn(*self._shape, self._channels, **self._options)


def _check_draws(name: str, draws: Sequence[Tensor], size: tuple[int, ...]) -> None:
    for i, draw in enumerate(draws):
        if not isinstance(draw, Tensor) or tuple(draw.shape) != size or not draw.is_floating_point():
            came = f"{tuple(draw.shape)} {draw.dtype}" if isinstance(draw, Tensor) else type(draw).__name__
            raise ValueError(f"noise: {name} draw {i} must be {size} and floating point, got {came}")


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds as a list of ints; ``ValueError`` unless each is an integer (NumPy's too) with 0 <= seed < 2^63."""
    for seed in seeds:
        if not is_seed(seed) or not 0 <= seed < 2**63:
            raise ValueError(f"noise: a seed must be an integer with 0 <= seed < 2^63, got {seed!r}")
    return [int(seed) for seed in seeds]


def is_seed(value: object) -> bool:
    """Whether ``value`` is one integer, Python's or NumPy's."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def make_noise(noise: int | Sequence[int] | Noise, shape: NoiseShape, device: torch.device | str) -> Noise:
    """What the samplers accept: a :class:`Noise`, one seed (image b uses seed + b) or one seed per image.

    ``ValueError`` for anything else and for a Noise that cannot serve ``shape``.
    """
    if not isinstance(noise, Noise):
        if is_seed(noise):
            noise = [int(noise) + b for b in range(shape.batch)]
        if not isinstance(noise, Sequence) or isinstance(noise, (str, bytes)):
            raise ValueError(f"noise must be a seed, a list of seeds or a Noise, got {type(noise).__name__}")
        if len(noise) != shape.batch:
            raise ValueError(f"noise: {len(noise)} seeds came for a batch of {shape.batch}")
        noise = CounterNoise(
            noise,
            num_tokens=shape.num_tokens,
            codebook_size=shape.codebook_size,
            latent_channels=shape.latent_channels,
            device=device,
        )
    noise.check(shape)
    return noise

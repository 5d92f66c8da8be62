"""Frozen configuration dataclasses and the named presets.

Every class checks itself on construction and raises ``ValueError`` naming the field, what came and what is allowed.
``from_dict`` takes plain JSON (lists become tuples) and refuses unknown keys; ``to_dict`` gives plain JSON back.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

BLOCKS = ("res", "efficientvit")
NORMS = ("batch_norm", "layer_norm")
ACTIVATIONS = ("relu", "silu")
GUIDANCE_SCHEDULES = ("constant", "linear", "power-cosine")
MAX_STEPS = 256


class _Config:
    """Shared JSON conversion of the frozen dataclasses below."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """Builds the config from JSON values; anything but a dict of known fields is a ``ValueError``."""
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__} is made from a dict of fields, got {type(values).__name__}")
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown fields {unknown}; known fields are {sorted(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: ``json.dumps`` takes them, ``from_dict`` gives an equal config back."""
        return asdict(self)  # type: ignore[call-overload]

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{type(self).__name__}.{name} must be {allowed}, got {getattr(self, name)!r}")

    def _require_positive_ints(self, *names: str) -> None:
        for name in names:
            self._require(name, _is_int(getattr(self, name)) and getattr(self, name) > 0, "a positive integer")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_respacing(value: Any) -> bool:
    """Whether ``value`` keeps at least one of 1000 timesteps and in no section more than there are."""
    if not isinstance(value, str):
        return _is_int(value) and 1 <= value <= 1000
    if not re.fullmatch(r" *[0-9]{1,4} *(, *[0-9]{1,4} *)*", value):
        return False
    counts = [int(part) for part in value.split(",")]
    size, extra = divmod(1000, len(counts))
    return sum(counts) > 0 and all(count <= size + (i < extra) for i, count in enumerate(counts))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


@dataclass(frozen=True)
class DCHTConfig(_Config):
    """The DC-HT tokenizer (the defaults are the released 323.9 M parameter model, 32x compression).

    Stage 0 has the highest resolution. With depth 0 in stage 0 the input (output) layer goes straight from 3 channels
    to stage 1, down (up) by 2; all sequences have one entry per stage.
    """

    codebook_size: int = 16384
    latent_channels: int = 32
    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_depths: tuple[int, ...] = (0, 4, 8, 2, 2, 2)
    decoder_depths: tuple[int, ...] = (0, 5, 10, 2, 2, 2)
    blocks: tuple[str, ...] = ("res", "res", "res", "efficientvit", "efficientvit", "efficientvit")
    encoder_norm: str = "layer_norm"
    encoder_act: str = "silu"
    decoder_norms: tuple[str, ...] = ("batch_norm",) * 3 + ("layer_norm",) * 3
    decoder_acts: tuple[str, ...] = ("relu",) * 3 + ("silu",) * 3
    l2_normalize: bool = True

    @property
    def compression(self) -> int:
        """Pixels per latent cell along each axis: every stage but the first halves the resolution."""
        return 2 ** (len(self.widths) - 1)

    def __post_init__(self) -> None:
        for name in ("widths", "encoder_depths", "decoder_depths", "blocks", "decoder_norms", "decoder_acts"):
            self._require(name, isinstance(getattr(self, name), (tuple, list)), "a sequence with one entry per stage")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._require_positive_ints("codebook_size", "latent_channels")
        stages = len(self.widths)
        self._require("widths", stages >= 2 and all(_is_int(w) and w > 0 for w in self.widths), ">= 2 positive ints")
        for name in ("encoder_depths", "decoder_depths"):
            depths = getattr(self, name)
            ok = len(depths) == stages and all(_is_int(d) and d >= (0 if i == 0 else 1) for i, d in enumerate(depths))
            self._require(name, ok, f"{stages} integers, >= 1 except the first, which may be 0")
        for name, allowed in (("blocks", BLOCKS), ("decoder_norms", NORMS), ("decoder_acts", ACTIVATIONS)):
            values = getattr(self, name)
            self._require(name, len(values) == stages and all(v in allowed for v in values), f"{stages} of {allowed}")
        self._require("encoder_norm", self.encoder_norm in NORMS, f"one of {NORMS}")
        self._require("encoder_act", self.encoder_act in ACTIVATIONS, f"one of {ACTIVATIONS}")
        self._require("l2_normalize", self.l2_normalize is True, "True (DC-HT quantises on the unit sphere)")
        for i, (width, block) in enumerate(zip(self.widths, self.blocks, strict=True)):
            if block == "efficientvit" and width % 32:
                raise ValueError(f"DCHTConfig.widths[{i}] must be a multiple of the head size 32, got {width}")
        self._require(
            "widths", all(w % 4 == 0 for w in self.widths[1:]), "multiples of 4 (pixel shuffle) from stage 1 on"
        )
        for i in range(stages - 1):
            joined = self.encoder_depths[i] or self.decoder_depths[i]  # an empty stage 0 has no shortcut to stage 1
            if joined and 4 * self.widths[i] % self.widths[i + 1]:
                raise ValueError(f"DCHTConfig.widths[{i + 1}] must divide 4 widths[{i}] (shortcuts), got {self.widths}")
        self._require("latent_channels", self.widths[-1] % self.latent_channels == 0, "a divisor of the last width")


@dataclass(frozen=True)
class DCARConfig(_Config):
    """The DC-AR generator: masked transformer and diffusion head (defaults: the released 512 px model)."""

    codebook_size: int = 16384
    latent_channels: int = 32
    num_tokens: int = 256
    hidden_size: int = 1152
    num_layers: int = 28
    num_heads: int = 16
    mlp_hidden_size: int = 4608
    qk_norm: bool = True
    text_length: int = 300
    text_dim: int = 768
    head_width: int = 1024
    head_depth: int = 6
    head_steps: int | str = 32
    head_scale: float = 0.107
    head_batch_multiplier: int = 4

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the square grid whose position table the checkpoint stores."""
        side = math.isqrt(self.num_tokens)
        return side, side

    @property
    def mask_id(self) -> int:
        """The id that stands for an undecided token: one past the last code."""
        return self.codebook_size

    def __post_init__(self) -> None:
        ints = ("codebook_size", "latent_channels", "num_tokens", "hidden_size", "num_layers", "num_heads")
        ints += ("mlp_hidden_size", "text_length", "text_dim", "head_width", "head_depth", "head_batch_multiplier")
        self._require_positive_ints(*ints)
        self._require("num_tokens", math.isqrt(self.num_tokens) ** 2 == self.num_tokens, "a square number")
        self._require("hidden_size", self.hidden_size % self.num_heads == 0, f"a multiple of {self.num_heads} heads")
        self._require("hidden_size", self.hidden_size % 4 == 0, "a multiple of 4 (2-D sin-cos positions)")
        self._require("qk_norm", isinstance(self.qk_norm, bool), "True or False")
        self._require("head_scale", _is_number(self.head_scale) and self.head_scale > 0, "a positive number")
        allowed = "1..1000, or a comma list of steps per equal section of the 1000, such as '10,0'"
        self._require("head_steps", _is_respacing(self.head_steps), allowed)


@dataclass(frozen=True)
class TextEncoderConfig(_Config):
    """A T5 encoder and how prompts become its input (defaults: T5-base as the released model calls it).

    ``attend_pads=True`` is the released behaviour: prompts are padded to ``max_length`` and T5 runs without an
    attention mask. ``tokenizer`` is "t5" (sentencepiece vocabulary, needs files) or "bytes" (ByT5, needs none).
    """

    tokenizer: str = "t5"
    max_length: int = 300
    attend_pads: bool = True
    vocab_size: int = 32128
    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    feed_forward_proj: str = "relu"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        self._require("tokenizer", self.tokenizer in ("t5", "bytes"), "'t5' or 'bytes'")
        self._require("attend_pads", isinstance(self.attend_pads, bool), "True or False")
        self._require_positive_ints("max_length", "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        self._require_positive_ints("relative_attention_num_buckets", "relative_attention_max_distance")
        epsilon = self.layer_norm_epsilon
        self._require("layer_norm_epsilon", _is_number(epsilon) and epsilon > 0, "a positive number")
        self._require("feed_forward_proj", self.feed_forward_proj in ("relu", "gated-gelu"), "'relu' or 'gated-gelu'")
        self._require("vocab_size", self.tokenizer == "t5" or self.vocab_size >= 384, ">= 384 for bytes")


@dataclass(frozen=True)
class SamplingConfig(_Config):
    """How tokens are sampled; the defaults are the released sampler's."""

    num_steps: int = 12
    """Unmasking steps, 1..256."""
    guidance_scale: float = 4.5
    """Classifier-free guidance; 0: none, 1: the diffusion head is left unguided (as in the released sampler)."""
    guidance_schedule: Literal["constant", "linear", "power-cosine"] = "constant"
    """How the scale changes over the steps."""
    guidance_power: float = 2.5
    """Exponent of the power-cosine schedule."""
    temperature: float = 1.5
    """Scale of the Gumbel noise at the start; it falls to 0 at the last step."""
    anneal_softmax: bool = True
    """Divide the logits by 0.5 + 0.8 (1 - r), r = the share of steps done."""
    schedule_tokens: Literal["open", "all"] = "open"
    """Inpainting: spread the steps over each image's open tokens, or use the schedule of all (as released)."""
    final_forward: bool = False
    """One more forward on the final tokens conditions the diffusion head (the released sampler does without)."""

    def __post_init__(self) -> None:
        self._require("num_steps", _is_int(self.num_steps) and 1 <= self.num_steps <= MAX_STEPS, f"1..{MAX_STEPS}")
        for name in ("guidance_scale", "temperature"):
            self._require(name, _is_number(getattr(self, name)) and getattr(self, name) >= 0, "a finite number >= 0")
        self._require("guidance_power", _is_number(self.guidance_power) and self.guidance_power > 0, "a number > 0")
        self._require("guidance_schedule", self.guidance_schedule in GUIDANCE_SCHEDULES, f"one of {GUIDANCE_SCHEDULES}")
        self._require("schedule_tokens", self.schedule_tokens in ("open", "all"), "'open' or 'all'")
        for name in ("anneal_softmax", "final_forward"):
            self._require(name, isinstance(getattr(self, name), bool), "True or False")


@dataclass(frozen=True)
class PipelineConfig:
    """The three models of a pipeline, checked to fit together, and how it samples where a call does not say."""

    tokenizer: DCHTConfig = field(default_factory=DCHTConfig)
    generator: DCARConfig = field(default_factory=DCARConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @property
    def image_size(self) -> int:
        """Side in pixels of the square image the generator was made for."""
        return self.generator.grid[0] * self.tokenizer.compression

    def __post_init__(self) -> None:
        for name, left, right in (
            ("codebook_size", self.tokenizer.codebook_size, self.generator.codebook_size),
            ("latent_channels", self.tokenizer.latent_channels, self.generator.latent_channels),
            ("text width", self.text.d_model, self.generator.text_dim),
            ("text length", self.text.max_length, self.generator.text_length),
        ):
            if left != right:
                raise ValueError(f"PipelineConfig: the generator's {name} is {right}, its partner's is {left}")
        if not isinstance(self.sampling, SamplingConfig):
            raise ValueError(f"PipelineConfig.sampling must be a SamplingConfig, got {self.sampling!r:.80}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PipelineConfig:
        wanted = {"tokenizer": DCHTConfig, "generator": DCARConfig, "text": TextEncoderConfig}
        if not isinstance(values, dict) or set(values) - {"sampling"} != set(wanted):
            raise ValueError(
                f"PipelineConfig is made from a dict with the keys {sorted(wanted)} and perhaps 'sampling', got "
                f"{values!r:.80}"
            )
        made = {name: config.from_dict(values[name]) for name, config in wanted.items()}
        return cls(**made, sampling=SamplingConfig.from_dict(values.get("sampling", {})))


def _full_size(num_tokens: int) -> PipelineConfig:
    return PipelineConfig(DCHTConfig(), DCARConfig(num_tokens=num_tokens), TextEncoderConfig(tokenizer="bytes"))


def _shapes() -> PipelineConfig:
    """64 px, 8 x 8 tokens: small enough to train on a CPU, with every block type of the full model."""
    tokenizer = DCHTConfig(
        codebook_size=512,
        latent_channels=16,
        widths=(32, 32, 64, 128),
        encoder_depths=(0, 1, 1, 1),
        decoder_depths=(0, 1, 1, 1),
        blocks=("res", "res", "efficientvit", "efficientvit"),
        decoder_norms=("batch_norm", "batch_norm", "layer_norm", "layer_norm"),
        decoder_acts=("relu", "relu", "silu", "silu"),
    )
    generator = DCARConfig(
        codebook_size=512,
        latent_channels=16,
        num_tokens=64,
        hidden_size=160,
        num_layers=5,
        num_heads=5,
        mlp_hidden_size=640,
        text_length=128,
        text_dim=128,
        head_width=128,
        head_depth=3,
        head_steps=16,
        head_batch_multiplier=1,
    )
    text = TextEncoderConfig(
        tokenizer="bytes",
        max_length=128,
        attend_pads=False,
        vocab_size=384,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return PipelineConfig(tokenizer, generator, text)


_PRESETS = {
    "shapes": _shapes,
    "dc-ar-256": lambda: _full_size(64),
    "dc-ar-512": lambda: _full_size(256),
    "dc-ar-1024": lambda: _full_size(1024),
}
PRESETS = tuple(_PRESETS)


def preset(name: str) -> PipelineConfig:
    """The named configuration: "shapes" (small, CPU), "dc-ar-256", "dc-ar-512", "dc-ar-1024" (full size)."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {PRESETS}, got {name!r}")
    return _PRESETS[name]()

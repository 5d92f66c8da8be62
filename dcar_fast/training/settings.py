"""Settings of a training, as frozen dataclasses: what a YAML recipe holds and the command line overrides.

Like the configurations of the models they check themselves on construction and raise ``ValueError`` naming the field,
what came and what is allowed. ``from_dict`` also takes the nested ones as dicts and names the full key (``run.steps``).
The defaults are neutral, or the tokenizer's; what a published model was trained with is in its recipe
(docs/training.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dcar_fast.config import (
    PRESETS,
    DCARConfig,
    DCHTConfig,
    SamplingConfig,
    TextEncoderConfig,
    _Config,
    _is_int,
    _is_number,
)

DATA_KINDS = ("shapes", "folder", "shards", "cache")
STAGES = ("continuous", "discrete", "alternate")
MIN_PICTURE, MAX_PICTURE = 16, 4096  # pixels


class _Settings(_Config):
    """Adds nested settings, and the checks that several classes need."""

    @classmethod
    def from_dict(cls, values: dict[str, Any], path: str = "") -> Any:
        """Builds the settings from JSON values, lists becoming tuples. ``ValueError`` names the key as in
        ``path``.``field`` for unknown or missing fields and for values that are not allowed."""
        if not isinstance(values, dict):
            raise ValueError(f"{path or cls.__name__} must be a mapping of fields, got {values!r:.80}")
        prefix, hints = f"{path}." if path else "", get_type_hints(cls)
        unknown = sorted(str(prefix) + str(name) for name in values if name not in hints)
        if unknown:
            raise ValueError(f"unknown settings {unknown}; known are {sorted(prefix + name for name in hints)}")
        made = {name: _nested(hints[name], value, prefix + name) for name, value in values.items()}
        return _named(lambda: cls(**made), cls.__name__, prefix)

    def _require_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        self._require(name, _is_int(value) and value >= least, f"an integer >= {least}")

    def _require_number(self, name: str, least: float = 0.0) -> None:
        value = getattr(self, name)
        self._require(name, _is_number(value) and value >= least, f"a finite number >= {least:g}")

    def _require_bool(self, *names: str) -> None:
        for name in names:
            self._require(name, isinstance(getattr(self, name), bool), "true or false")

    def _require_text(self, *names: str) -> None:
        for name in names:
            self._require(name, isinstance(getattr(self, name), str), "text")

    def _require_choice(self, name: str, allowed: Sequence[str]) -> None:
        self._require(name, getattr(self, name) in allowed, f"one of {tuple(allowed)}")

    def _require_type(self, name: str, kind: type) -> None:
        self._require(name, isinstance(getattr(self, name), kind), f"{kind.__name__}")

    def _require_texts(self, name: str) -> None:
        """A tuple of strings, made from a list."""
        values = getattr(self, name)
        ok = isinstance(values, (tuple, list)) and all(isinstance(value, str) and value for value in values)
        self._require(name, ok, "a list of non-empty texts")
        object.__setattr__(self, name, tuple(values))


@dataclass(frozen=True)
class DataSettings(_Settings):
    """Where the pictures and captions come from, and how they are made square."""

    kind: Literal["shapes", "folder", "shards", "cache"] = "shapes"
    """shapes: drawn by program, endless; folder: pictures with metadata.jsonl or .txt captions; shards: webdataset tar
    files; cache: tokens that ``dcar-fast cache`` wrote (generator only)."""
    path: str = ""
    """The folder; for shards a brace pattern, a glob, a URL or a "pipe:" command."""
    size: int = 64
    """Side of the square training pictures in pixels."""
    random_crop: bool = False
    """Crop at random instead of at the centre."""
    flip: bool = False
    """Mirror half of the pictures; not for captions that say left and right."""
    workers: int = 2
    """Processes that decode pictures; 0: the training process does it."""
    seed: int = 0
    """Of the order, the crops and the drawn pictures."""
    variety: Literal["full", "few"] = "full"
    """Of shapes: how much varies that captions do not speak of; a small model learns "few" much sooner."""

    def __post_init__(self) -> None:
        self._require_choice("kind", DATA_KINDS)
        self._require_text("path")
        size = self.size
        self._require("size", _is_int(size) and MIN_PICTURE <= size <= MAX_PICTURE, f"{MIN_PICTURE}..{MAX_PICTURE}")
        self._require_bool("random_crop", "flip")
        self._require_int("workers", 0)
        self._require_int("seed", 0)
        self._require_choice("variety", ("full", "few"))
        self._require("variety", self.variety == "full" or self.kind == "shapes", "'full' where nothing is drawn")
        needs_path = self.kind != "shapes"
        self._require("path", bool(self.path) == needs_path, f"{'given' if needs_path else 'empty'} for {self.kind!r}")


@dataclass(frozen=True)
class OptimizerSettings(_Settings):
    """The optimiser, and how its learning rate changes: a linear rise, then constant or half a cosine down to the last
    step."""

    learning_rate: float = 1e-4
    """After the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moments."""
    weight_decay: float = 0.0
    """Decoupled, on weight matrices and convolutions alone."""
    warmup_steps: int = 0
    """Steps of the linear rise."""
    final_learning_rate: float | None = None
    """Where the cosine ends; None: the rate stays."""
    clip: float = 1.0
    """Largest norm of the gradients; 0: any."""
    method: Literal["adamw", "muon"] = "adamw"
    """muon: the generator's matrices between hidden states get orthogonalised updates, the rest AdamW's."""

    def __post_init__(self) -> None:
        self._require_choice("method", ("adamw", "muon"))
        self._require("learning_rate", _is_number(self.learning_rate) and self.learning_rate > 0, "a positive number")
        betas = self.betas
        ok = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in betas)
        self._require("betas", ok, "two numbers in [0, 1)")
        object.__setattr__(self, "betas", tuple(float(b) for b in betas))
        self._require_number("weight_decay")
        self._require_int("warmup_steps", 0)
        if self.final_learning_rate is not None:
            self._require_number("final_learning_rate")
        self._require_number("clip")


@dataclass(frozen=True)
class RunSettings(_Settings):
    """How long, how much at a time, with what precision, and what is written when."""

    output: str
    """Folder of checkpoints, log, previews and the exported model; a run found there is continued."""
    steps: int
    """Optimiser steps in all."""
    batch_size: int
    """Pictures per step, over all processes and accumulated parts."""
    accumulation: int = 1
    """Parts in which every process takes its share of a batch, one after another."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; weights, quantiser and losses are float32."""
    seed: int = 0
    """Of the initial weights and of every random number in the losses."""
    ema_decay: float = 0.9999
    """Decay of the weights' moving average, reached after a warm-up."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; 0: at the end alone."""
    keep_checkpoints: int = 2
    """How many of the last checkpoints are kept."""
    log_every: int = 50
    """Steps between lines of the log, each the mean since the last one."""
    preview_every: int = 1000
    """Steps between pictures in the log; 0: none."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Names of accelerate's trackers: tensorboard, wandb, mlflow, ...; metrics.jsonl is always written."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """With several processes: every one has all weights (ddp), or a part of them (fsdp2)."""
    resume: bool = True
    """Continue from the newest checkpoint in the output folder; else that folder must hold none."""
    threads: int | None = None
    """CPU threads per process; None: torch's choice."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU if there is one."""

    def __post_init__(self) -> None:
        self._require("output", isinstance(self.output, str) and bool(self.output), "the name of a folder")
        for name in ("steps", "batch_size", "accumulation", "keep_checkpoints", "log_every"):
            self._require_int(name, 1)
        for name in ("seed", "checkpoint_every", "preview_every"):
            self._require_int(name, 0)
        parts = self.accumulation
        self._require("batch_size", self.batch_size % parts == 0, f"a multiple of accumulation {parts}")
        self._require_choice("precision", ("float32", "bfloat16"))
        self._require("ema_decay", _is_number(self.ema_decay) and 0 <= self.ema_decay < 1, "in [0, 1)")
        self._require_texts("trackers")
        self._require_choice("parallel", ("ddp", "fsdp2"))
        self._require_bool("resume")
        if self.threads is not None:
            self._require_int("threads", 1)
        self._require_choice("device", ("auto", "cpu"))


@dataclass(frozen=True)
class TokenizerTraining(_Settings):
    """What ``dcar-fast train-tokenizer`` takes: one stage of the tokenizer's training."""

    run: RunSettings
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """Of the tokenizer."""
    discriminator: OptimizerSettings = field(default_factory=OptimizerSettings)
    """Of the discriminator."""
    model: str | DCHTConfig = "shapes"
    """A preset (shapes, dc-ar-256, dc-ar-512, dc-ar-1024), or the fields of a DCHTConfig."""
    stage: Literal["continuous", "discrete", "alternate"] = "continuous"
    """continuous: no codes; discrete: through the codes; alternate: decoder alone, either path for each picture."""
    initial: str = ""
    """Folder with the tokenizer of the previous stage."""
    reconstruction: Literal["mse", "l1"] = "mse"
    """Loss on the pixels, in [-1, 1]."""
    lpips_weight: float = 1.0
    """Of the perceptual loss."""
    lpips_weights: str = ""
    """File of the VGG-16 or AlexNet weights that the perceptual loss needs; "": it is off."""
    gan_weight: float = 0.0
    """Of the adversarial loss, times the adaptive weight of VQGAN; 0: no discriminator."""
    gan_start: int = 0
    """Steps before the discriminator comes in."""
    discriminator_width: int = 64
    """Channels of its first layer."""
    discriminator_layers: int = 3
    """Its strided layers after the first."""
    quantizer_weight: float = 1.0
    """Of the codebook and commitment losses."""
    codebook_init: Literal["random", "data"] = "random"
    """At the start of the discrete stage: the codes as they are, or encoder outputs of the first steps."""
    restart_dead_codes_after: int = 0
    """Steps without use after which a code is replaced by an encoder output; 0: never."""
    merge_codes: float = 0.0
    """At the start of the alternate stage: codes of at least this cosine become one; 0: none."""
    residual_std_examples: int = 1024
    """Pictures on which an exported tokenizer's residuals are measured: held-out shapes, or the first of other data."""
    preview_examples: int = 8
    """Pictures that are reconstructed for the log: held-out shapes, or the first of other data."""

    def __post_init__(self) -> None:
        _require_shared(self, {"optimizer": OptimizerSettings, "discriminator": OptimizerSettings})
        _require_model(self, DCHTConfig)
        self._require_choice("stage", STAGES)
        for name in ("optimizer", "discriminator"):
            adamw = getattr(self, name).method == "adamw"
            self._require(name, adamw, "of method 'adamw': muon is for the generator's matrices")
        self._require_text("initial", "lpips_weights")
        self._require("initial", bool(self.initial) or self.stage != "alternate", "given for stage 'alternate'")
        self._require_choice("reconstruction", ("mse", "l1"))
        for name in ("lpips_weight", "gan_weight", "quantizer_weight", "merge_codes"):
            self._require_number(name)
        self._require("merge_codes", not self.merge_codes or self.stage == "alternate", "0 but for stage 'alternate'")
        self._require("merge_codes", self.merge_codes < 1, "below 1")
        for name in ("gan_start", "restart_dead_codes_after", "preview_examples"):
            self._require_int(name, 0)
        for name in ("discriminator_width", "discriminator_layers", "residual_std_examples"):
            self._require_int(name, 1)
        self._require_choice("codebook_init", ("random", "data"))
        if self.data.kind == "cache":
            raise ValueError("TokenizerTraining.data.kind must not be 'cache': it holds no pictures")


@dataclass(frozen=True)
class GeneratorModel(_Settings):
    """A generator and its text encoder, where no preset fits."""

    generator: DCARConfig = field(default_factory=DCARConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)

    def __post_init__(self) -> None:
        self._require_type("generator", DCARConfig)
        self._require_type("text", TextEncoderConfig)


@dataclass(frozen=True)
class GeneratorTraining(_Settings):
    """What ``dcar-fast train-generator`` takes."""

    run: RunSettings
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    tokenizer: str = ""
    """Folder of the trained tokenizer."""
    model: str | GeneratorModel = "shapes"
    """A preset (shapes, dc-ar-256, dc-ar-512, dc-ar-1024), or the fields of a DCARConfig and a TextEncoderConfig."""
    text_encoder: str = ""
    """Folder or hub id of a T5 encoder, kept frozen; "": the preset's encoder on bytes is trained along."""
    initial: str = ""
    """Pipeline folder whose generator is trained on, also one for another resolution."""
    label_smoothing: float = 0.1
    """Of the cross-entropy on the tokens."""
    unmasked_weight: float = 0.1
    """Weight of known tokens in the cross-entropy; masked ones have 1."""
    diffusion_weight: float = 1.0
    """Of the residuals' diffusion loss."""
    text_dropout: float = 0.1
    """Share of captions that are left out, for classifier-free guidance."""
    residual_scale: float | None = None
    """Standard deviation of the tokenizer's residuals; None: measured before the first step."""
    residual_examples: int = 1024
    """Pictures on which it is measured."""
    preview_prompts: tuple[str, ...] = ()
    """Prompts that are drawn for the log."""
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """In which the exported model is stored."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How previews are drawn, and by default whatever the exported model draws."""

    def __post_init__(self) -> None:
        _require_shared(self, {"optimizer": OptimizerSettings})
        self._require("tokenizer", isinstance(self.tokenizer, str) and bool(self.tokenizer), "the name of a folder")
        _require_model(self, GeneratorModel)
        self._require_text("text_encoder", "initial")
        for name in ("label_smoothing", "unmasked_weight", "text_dropout"):
            value = getattr(self, name)
            self._require(name, _is_number(value) and 0 <= value <= 1, "in [0, 1]")
        self._require_number("diffusion_weight")
        scale = self.residual_scale
        self._require("residual_scale", scale is None or (_is_number(scale) and scale > 0), "positive, or null")
        self._require_int("residual_examples", 1)
        self._require_texts("preview_prompts")
        self._require_choice("export_dtype", ("float32", "float16", "bfloat16"))
        self._require_type("sampling", SamplingConfig)


Training = TokenizerTraining | GeneratorTraining


def _require_shared(settings: Any, optimizers: dict[str, type]) -> None:
    for name, kind in {"run": RunSettings, "data": DataSettings, **optimizers}.items():
        settings._require_type(name, kind)


def _require_model(settings: Any, fields_of: type) -> None:
    ok = isinstance(settings.model, fields_of) or settings.model in PRESETS
    settings._require("model", ok, f"one of {PRESETS}, or the fields of a {fields_of.__name__}")


def _nested(hint: Any, value: Any, key: str) -> Any:
    """A dict as the settings or configuration that the field is annotated with; anything else as it is."""
    kinds = [hint, *get_args(hint)] if get_origin(hint) is not None else [hint]
    for kind in kinds:
        if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, _Config):
            if issubclass(kind, _Settings):
                return kind.from_dict(value, key)
            return _named(lambda kind=kind: kind.from_dict(value), kind.__name__, f"{key}.")
    return value


def _named(make: Any, class_name: str, prefix: str) -> Any:
    """What ``make`` gives; errors name the key in the recipe instead of the class."""
    try:
        return make()
    except ValueError as error:
        message = str(error)
        if message.startswith(f"{class_name}."):
            message = prefix + message.removeprefix(f"{class_name}.")
        elif message.startswith(f"{class_name}:"):
            message = prefix.rstrip(".") + message.removeprefix(class_name)
        raise ValueError(message) from error
    except TypeError as error:  # a field without default is missing
        raise ValueError(f"{prefix.rstrip('.') or class_name}: {str(error).split('() ')[-1]}") from error

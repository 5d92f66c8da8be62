"""The recorded vectors of tests/golden: inputs, noise and outputs of the released implementation with small
random weights, and the models that hold those weights.

Everything is cached and shared between tests: do not change the tensors or the models that come from here.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dcar_fast.checkpoints import load_official_generator, load_official_tokenizer, load_state
from dcar_fast.config import DCARConfig, DCHTConfig, SamplingConfig
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.diffusion_head import DiffusionHead
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.noise import RecordedNoise

FOLDER = Path(__file__).parent / "golden"
MODES = tuple(f"{schedule}{end}" for schedule in ("constant", "linear", "power-cosine") for end in ("-annealed", ""))
INPAINTINGS = ("inpaint", "inpaint_1", "inpaint_3", "inpaint_15")
HEADS = ("dcar", "hart", "mar")


@lru_cache
def vectors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


@lru_cache
def settings(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def released_state(name: str) -> dict[str, Tensor]:
    """The weights under the released names; a fresh dict, the tensors are shared."""
    return {key.removeprefix("state/"): value for key, value in vectors(name).items() if key.startswith("state/")}


def full_size_state(name: str) -> dict[str, Tensor]:
    """All tensors of the released full-size checkpoint ("generator" or "tokenizer"), on the meta device."""
    names = settings(f"official_{name}_keys")
    return {k: torch.empty(shape, dtype=getattr(torch, kind), device="meta") for k, (shape, kind) in names.items()}


def generator_config() -> DCARConfig:
    return DCARConfig.from_dict(settings("generator")["config"])


def tokenizer_config() -> DCHTConfig:
    return DCHTConfig.from_dict(settings("tokenizer")["config"])


@lru_cache
def generator() -> DCAR:
    return load_official_generator(released_state("generator"), generator_config())


@lru_cache
def tokenizer() -> DCHT:
    return load_official_tokenizer(released_state("tokenizer"), tokenizer_config())


@lru_cache
def head(name: str) -> DiffusionHead:
    """The diffusion head of head_{name}.safetensors."""
    sizes = settings(f"head_{name}")["kwargs"]
    model = DiffusionHead(sizes["target_channels"], sizes["z_channels"], sizes["width"], sizes["depth"])
    state = {key.removeprefix("net."): value for key, value in released_state(f"head_{name}").items()}
    load_state(model, state, name)
    return model.eval()


def text() -> tuple[Tensor, Tensor]:
    """States (3, T, Dt) and mask (3, T)."""
    return vectors("generator")["text/states"], vectors("generator")["text/mask"]


def recorded_noise(case: str) -> RecordedNoise:
    """The noise of ``generate/<mode>`` or of an inpainting, in drawing order."""
    found = vectors("generator")

    def series(name: str) -> list[Tensor]:
        count = sum(key.startswith(f"{case}/noise/{name}/") for key in found)
        return [found[f"{case}/noise/{name}/{i}"] for i in range(count)]

    return RecordedNoise(series("token"), series("confidence"), found[f"{case}/noise/latent_init"], series("latent"))


def sampling_config(values: dict, **changes) -> SamplingConfig:
    """The released settings of one recorded case, under our names."""
    return SamplingConfig(
        num_steps=values["num_sample_steps"],
        guidance_scale=values["guidance_scale"],
        guidance_schedule=values["guidance_decay"],
        guidance_power=values.get("guidance_scale_pow", 2.5),
        temperature=values["randomize_temperature"],
        anneal_softmax=values["softmax_temperature_annealing"],
        **changes,
    )


def error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; shapes must agree and nothing may be NaN."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
    difference = (found.double() - expected.double()).abs()
    assert not difference.isnan().any()
    return difference.max().item() if difference.numel() else 0.0

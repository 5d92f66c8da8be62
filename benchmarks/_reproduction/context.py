"""What every part of a study is given: the model, the budget, the folder, the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from _reproduction.budget import Budget
from _reproduction.store import Store
from dcar_fast import DCARPipeline
from dcar_fast.bulk.folder import fingerprint
from dcar_fast.checkpoints import find_folder, shipped_folder
from dcar_fast.config import PRESETS, PipelineConfig, preset

LEAST_SIDE = 32  # pixels, of a picture that ShapesEval judges


@dataclass
class Context:
    """model: folder of the trained pipeline, None where no study needs one."""

    store: Store
    budget: Budget
    device: torch.device
    model: Path | None
    pipeline: DCARPipeline | None
    kept: dict[str, Any] = field(default_factory=dict)
    """What parts of one study keep for each other, such as a large model; dropped behind the study."""

    @property
    def config(self) -> PipelineConfig:
        """Of the model that is studied."""
        return self.trained.config

    @property
    def trained(self) -> DCARPipeline:
        """The trained pipeline; only studies with ``trained`` may ask for it."""
        if self.pipeline is None:
            raise ValueError("this study needs a trained model, and none was loaded")
        return self.pipeline


def load_model(model: str, device: torch.device) -> tuple[Path, DCARPipeline]:
    """A trained pipeline in float32, and its folder, from a preset with weights, a folder or a hub id.

    ``ValueError`` for a preset that comes without trained weights, and for a folder whose weights are untrained.
    """
    folder = shipped_folder(model) if model in PRESETS else find_folder(model)
    if folder is None:
        raise ValueError(
            f"preset {model!r} comes without trained weights: name the folder of a trained model, such as "
            "runs/shapes-generator/model"
        )
    pipeline = DCARPipeline.from_pretrained(folder, device=device, dtype=torch.float32)
    if not pipeline.trained:
        raise ValueError(f"{folder} holds untrained weights: nothing can be repeated with them")
    if pipeline.config.image_size < LEAST_SIDE:
        side = pipeline.config.image_size
        raise ValueError(f"{folder} draws {side} px, and ShapesEval judges pictures of {LEAST_SIDE} px or more")
    return folder, pipeline


def model_fingerprint(pipeline: DCARPipeline) -> str:
    """Of all its weights."""
    return fingerprint([pipeline.tokenizer, pipeline.generator, pipeline.text_encoder])


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> DCARPipeline:
    """A preset with random weights, zeros filled: products with zeros run faster than those of a trained model."""
    from _weights import fill_zeros

    preset(name)
    pipeline = DCARPipeline.from_preset(name, seed=0)
    fill_zeros(pipeline)
    return pipeline.to(device, dtype)

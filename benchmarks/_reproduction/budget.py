"""How much is computed: prompts, pictures, training steps. Part of what makes results comparable."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Budget:
    """The full one keeps every model below ten minutes of training on two CPU cores."""

    prompts: int = 300
    """Held-out prompts drawn by every variant and seed; as many held-out pictures are reconstructed."""
    sampling_batch: int = 16
    """Pictures sampled together, and in a timed batch."""
    timed_rounds: int = 7
    """Timed batches of every variant."""
    stages_steps: int = 2500
    """Steps of a tokenizer's training, all stages together."""
    stages_batch: int = 32
    pretraining_steps: int = 900
    """Steps of the generator at low resolution."""
    finetuning_steps: int = 180
    """Steps of the same generator at high resolution."""
    generator_batch: int = 32
    cached_pictures: int = 16384
    """Training pictures that the generators see, encoded once at each resolution."""
    workers: int = 1
    """Processes that draw training pictures."""
    full_size_preset: str = "dc-ar-512"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


FULL = Budget()
QUICK = Budget(
    prompts=24,
    timed_rounds=2,
    stages_steps=60,
    stages_batch=8,
    pretraining_steps=30,
    finetuning_steps=6,
    generator_batch=8,
    cached_pictures=64,
    workers=0,
    full_size_preset="shapes",
)

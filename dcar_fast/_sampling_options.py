"""The flags of sampling: what is not given is left to the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from dcar_fast.config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The fields of :class:`SamplingConfig`, each by default as the model's config.json has it."""

    num_steps: int | None = None
    """Unmasking steps, 1..256."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 0: none, 1: the diffusion head is left unguided (as in the released sampler)."""
    guidance_schedule: Literal["constant", "linear", "power-cosine"] | None = None
    """How the scale changes over the steps."""
    guidance_power: float | None = None
    """Exponent of the power-cosine schedule."""
    temperature: float | None = None
    """Scale of the Gumbel noise at the start; it falls to 0 at the last step."""
    anneal_softmax: bool | None = None
    """Divide the logits by 0.5 + 0.8 (1 - r), r = the share of steps done."""
    schedule_tokens: Literal["open", "all"] | None = None
    """Inpainting: spread the steps over each image's open tokens, or use the schedule of all (as released)."""
    final_forward: bool | None = None
    """One more forward on the final tokens conditions the diffusion head (the released sampler does without)."""

    def __post_init__(self) -> None:
        SamplingConfig.from_dict(given(self))


def given(options: SamplingOptions | SamplingConfig) -> dict[str, Any]:
    """The fields that have a value, as keywords of a pipeline's calls."""
    return {name: value for name, value in asdict(options).items() if value is not None}

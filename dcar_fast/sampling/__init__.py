"""Samplers: from text states and noise to token ids and residuals."""

from dcar_fast.sampling.reference import ReferenceSampler
from dcar_fast.sampling.types import Known, Sample, StepTrace

__all__ = ["Known", "ReferenceSampler", "Sample", "StepTrace"]

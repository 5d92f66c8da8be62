"""Samplers: from text states and noise to token ids and residuals."""

from dcar_fast.sampling.fast import FastSampler
from dcar_fast.sampling.reference import ReferenceSampler
from dcar_fast.sampling.types import Known, Sample, StepTrace

__all__ = ["FastSampler", "Known", "ReferenceSampler", "Sample", "StepTrace"]

"""All studies by name, in the order in which they run."""

from __future__ import annotations

from _reproduction import hybrids, pretraining, sweeps, tokenizers
from _reproduction.study import Study

_MAKERS = (
    hybrids.hybrid_study,
    tokenizers.stages_study,
    sweeps.steps_study,
    tokenizers.resolution_study,
    pretraining.pretraining_study,
    sweeps.final_forward_study,
    sweeps.guidance_study,
    sweeps.head_steps_study,
    sweeps.temperature_study,
    hybrids.full_size_study,
)
STUDIES: dict[str, Study] = {study.name: study for study in (make() for make in _MAKERS)}
ON_REQUEST = ("full-size",)
DEFAULT = tuple(name for name in STUDIES if name not in ON_REQUEST)

"""What a row of a benchmark runs, and on what: no torch is imported here."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

DTYPES = ("float32", "bfloat16", "float16")  # names of torch's
FAST_DTYPES = (*DTYPES, "fp8")  # float8_e4m3fn in the sampler's large layers, bfloat16 in all else
KINDS = ("eager", "compile", "fast")


@dataclass(frozen=True)
class RowSpec:
    """What a row runs.

    kind: "eager" (the reference as it is), "compile" (the reference through torch.compile) or "fast" (the fast sampler
    and decoder, what users get). dtype: its name, "fp8" for the fast kind only. mode: torch.compile's, "" for the
    others.
    """

    kind: str
    dtype: str
    mode: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.dtype}" + (f":{self.mode}" if self.mode not in ("", "default") else "")

    @property
    def base_dtype(self) -> str:
        """The pipeline's."""
        return "bfloat16" if self.dtype == "fp8" else self.dtype

    @property
    def engine(self) -> str:
        """DCARPipeline's."""
        return "fast" if self.kind == "fast" else "reference"


@dataclass(frozen=True)
class Workload:
    """What every row computes: ``batch`` images of (height, width) pixels from prompts of ``prompt_tokens`` tokens."""

    preset: str
    batch: int
    height: int
    width: int
    steps: int
    prompt_tokens: int
    device: str

    def prompts(self, run: int) -> list[str]:
        """Other letters in every run; bytes and an end mark make ``prompt_tokens`` tokens."""
        draw, letters = random.Random(run), string.ascii_lowercase + " "
        return ["".join(draw.choices(letters, k=self.prompt_tokens - 1)) for _ in range(self.batch)]

    def seeds(self, run: int) -> list[int]:
        """One per image, other ones in every run."""
        return [(run << 20) + image for image in range(self.batch)]

    @property
    def is_small(self) -> bool:
        """Whether a run takes seconds at most: the small preset, or a GPU."""
        return self.preset == "shapes" or self.device != "cpu"

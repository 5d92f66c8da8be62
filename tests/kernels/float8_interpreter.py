"""Float8 in Triton's interpreter, whose own conversion is not that of a GPU: ties go up, and what rounds up to a power
of two goes down to the one before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

convert = interpreter._convert_float


def _converted(values: np.ndarray, source: tl.dtype, wanted: tl.dtype, rounding: object) -> np.ndarray:
    if (source, wanted) != (tl.float32, tl.float8e4nv):
        return convert(values, source, wanted, rounding)
    assert rounding is None or rounding.name == "RTNE"
    found = torch.from_numpy(values.view(np.float32).copy()).to(torch.float8_e4m3fn)
    return found.view(torch.uint8).numpy()


def use_torchs_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's conversion to float8 takes its place."""
    monkeypatch.setattr(interpreter, "_convert_float", _converted)

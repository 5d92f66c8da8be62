"""Which engine serves a model: by backend, device, precision and kind of text mask."""

from __future__ import annotations

import torch

from dcar_fast.engine.base import Engine
from dcar_fast.engine.fp8 import FLOAT8, Float8Engine
from dcar_fast.engine.fused import FusedEngine
from dcar_fast.engine.pack import packed
from dcar_fast.engine.packed import PackedEngine
from dcar_fast.models.dcar import DCAR
from dcar_fast.ops._dispatch import FLOAT8_CAPABILITY, choose, float8_usable, requested

BACKENDS = ("auto", "triton", "native", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, FLOAT8)
OPS = (
    "fused_linear",
    "embed_tokens",
    "self_attention",
    "cross_attention",
    "sample_tokens",
    "place_tokens",
    "denoise_step",
)


class Choice:
    """A backend and a precision for one model; ``ValueError`` for what cannot be.

    backend "auto" follows ``DCAR_FAST_BACKEND`` like the ops do; unset, it takes "triton" on a GPU that can and
    "native" elsewhere. dtype None is the model's own, whatever it is when the model runs; float8_e4m3fn is for
    "triton" on a GPU that has it, and for "reference".
    """

    def __init__(self, model: DCAR, backend: str, dtype: torch.dtype | None) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16, float16 or float8_e4m3fn, got {dtype!r}")
        self.model, self.backend, self.dtype = model, backend, dtype
        if backend != "auto":
            self._check(backend)
        elif dtype == FLOAT8:
            self._resolve(prefix=True)

    @property
    def device(self) -> torch.device:
        return self.model.token_embedding.weight.device

    def engine(self, prefix: bool) -> Engine:
        """The engine, its weights those that the model has now. prefix: all text masks are prefixes."""
        dtype = self.dtype or self.model.token_embedding.weight.dtype
        backend = self._resolve(prefix)
        if dtype == torch.float64 and backend != "native":
            if self._asked() in ("triton", "reference"):
                raise ValueError(f"the model is float64, which backend {backend!r} cannot run: 'native' can")
            backend = "native"
        kind = ("packed", dtype) if backend == "native" else ("fused", dtype, backend)

        def build(model: DCAR) -> Engine:
            check_plain(model)
            if dtype == FLOAT8:
                return Float8Engine(model, backend)
            return PackedEngine(model, dtype) if backend == "native" else FusedEngine(model, dtype, backend)

        return packed(self.model, kind, build)

    def _asked(self) -> str:
        return requested() if self.backend == "auto" else self.backend

    def _resolve(self, prefix: bool) -> str:
        asked = self._asked()
        if asked not in ("auto", "cuda"):  # "cuda" asks ops for their C++ kernels, of which the trunk has none
            self._check(asked)
            if not prefix and asked != "native":
                raise ValueError(
                    f"text_mask has rows whose True do not come first, which backend {asked!r} cannot run: 'auto' can"
                )
            return asked
        if self.dtype == FLOAT8:
            self._check_float8(prefix)
            return "triton"
        if self.device.type != "cuda" or not prefix or not self.model.config.qk_norm:
            return "native"
        return "triton" if all(choose(op, self.device, "auto").name == "triton" for op in OPS) else "native"

    def _check_float8(self, prefix: bool) -> None:
        """What "auto" runs natively in other types is refused: float8 is there for its speed."""
        if not prefix:
            raise ValueError("text_mask has rows whose True do not come first, which dtype float8_e4m3fn cannot run")
        if not self.model.config.qk_norm:
            raise ValueError("dtype is float8_e4m3fn, which needs qk_norm")
        usable, least = float8_usable(self.device), ".".join(map(str, FLOAT8_CAPABILITY))
        if not usable.ok:
            here = self.device.type + (f" ({usable.reason})" if self.device.type == "cuda" else "")
            needs = f"fp8 needs a GPU of compute capability {least} or newer, this is {here}"
            raise ValueError(f"{needs}; backend='reference' emulates it")

    def _check(self, backend: str) -> None:
        if self.dtype == FLOAT8 and backend in ("triton", "native"):
            self._check_float8(prefix=True)
            if backend == "native":
                raise ValueError("backend is 'native', which has no fp8: 'triton' has, backend='reference' emulates it")
        if backend == "triton":
            for op in OPS:
                choose(op, self.device, backend)
        if backend != "native" and not self.model.config.qk_norm:
            raise ValueError(f"backend is {backend!r}, which needs qk_norm: 'auto' and 'native' do not")


def check_plain(model: DCAR) -> None:
    """``ValueError`` for what packed weights would leave out: hooks, and layers that are not the model's own, such as
    adapters that are not merged."""
    for name, module in model.named_modules():
        where = type(module).__module__
        if not where.startswith(("torch.nn.modules.", "dcar_fast.models.")):
            raise ValueError(
                f"model.{name} is a {type(module).__name__}: merge adapters first, or use ReferenceSampler"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"model.{name} has a forward hook, which would not run: ReferenceSampler runs it")

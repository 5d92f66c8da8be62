"""Diffusion heads of the MAR family, faster: ``sample`` of one instance is replaced, nothing else is touched.

    patch_diffloss(model)            # a MAR, HART, MaskGen, DC-AR, ... or its DiffLoss
    model.sample_tokens(...)         # as before

What such a head is made of, its schedule, its guidance formula, clipping and scale are read off the object and tried
out on small inputs; what is not understood is refused with the reason. See ``_structure.py`` and ``_probes.py``.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcar_fast.engine.base import without_autocast
from dcar_fast.engine.fused_head import FusedHead
from dcar_fast.engine.head import Head
from dcar_fast.engine.pack import forget, packed
from dcar_fast.integrations._probes import probe_diffusion, probe_method, probe_network
from dcar_fast.integrations._structure import Unrecognised, check_network, find_diffloss
from dcar_fast.models.diffusion_head import Dialect
from dcar_fast.noise import LatentNoise
from dcar_fast.ops._dispatch import choose
from dcar_fast.ops.latent_noise import latent_noise
from dcar_fast.reference.diffusion import Schedule

logger = logging.getLogger(__name__)

RNGS = ("parity", "counter")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KNOWN_ARGUMENTS = ("z", "temperature", "cfg")


def patch_diffloss(obj: object, rng: str = "parity", dtype: torch.dtype | None = None) -> Patch:
    """Binds a faster ``sample`` to the one diffusion head in ``obj``: a DiffLoss, or a model that holds one.

    rng: "parity" uses torch's generators up exactly as the original does (one randn for the start, one randn_like of
    all rows in every step), so that a seed gives the samples it gave before, to rounding. "counter" takes one seed from
    torch's CPU generator and draws by row from it: what a row gets depends on its position alone. dtype: in which the
    network computes, float32, bfloat16 or float16; None is what the original computes in, autocast included.

    Class, ``forward``, ``state_dict`` and training stay as they are. The weights are packed when ``sample`` is called
    and packed anew when they have changed, in place or not. Where a call cannot be served (gradients, hooks, quantised
    or adapted layers, arguments beyond z, temperature and cfg), the original runs and a warning says why, once.

    Returns the patch: a context manager that takes itself back at its end, and ``explain()``. Patching again replaces
    the patch. ``ValueError`` with the reason for what is not recognised; then nothing was changed.
    """
    if rng not in RNGS:
        raise ValueError(f"rng must be one of {', '.join(map(repr, RNGS))}, got {rng!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16, float16 or None, got {dtype!r}")
    path, diffloss = find_diffloss(obj)
    _not_replaced(diffloss)
    sample = FastSample(diffloss, rng, dtype)
    sample.recognised()
    diffloss.__dict__["sample"] = sample  # an attribute of the instance, that is no module and no parameter
    logger.info("%s.sample runs on dcar_fast", path or type(diffloss).__name__)
    return Patch(path, diffloss)


def unpatch(obj: object) -> bool:
    """Takes the patch of the diffusion head in ``obj`` back; False if there was none."""
    _, diffloss = find_diffloss(obj)
    patched = isinstance(diffloss.__dict__.get("sample"), FastSample)
    if patched:
        del diffloss.__dict__["sample"]
        forget(diffloss.net)
    return patched


def recognise(diffloss: nn.Module) -> Recognised:
    """How a diffusion head samples; ``Unrecognised`` with the reason. Changes nothing."""
    return FastSample(diffloss, "parity", None).recognised()


def explain(obj: object) -> str:
    """What is recognised in ``obj``, what will run for it and, where nothing will, why not. Changes nothing."""
    try:
        path, diffloss = find_diffloss(obj)
    except Unrecognised as reason:
        return f"not recognised: {reason}"
    name = f"{path or 'the object itself'} ({type(diffloss).__module__}.{type(diffloss).__qualname__})"
    sample = diffloss.__dict__.get("sample")
    try:
        if not isinstance(sample, FastSample):
            _not_replaced(diffloss)
        fast = sample if isinstance(sample, FastSample) else FastSample(diffloss, "parity", None)
        known = fast.recognised()
    except Unrecognised as reason:
        return f"{name}: not recognised: {reason}"
    net, dialect = diffloss.net, known.dialect
    size = f"{len(net.res_blocks)} blocks x {net.input_proj.out_features}, {net.input_proj.in_features} channels"
    steps = f"{known.schedule.num_steps} steps from t = {known.schedule.timesteps[-1]}"
    clip = "x_0 clamped to [-1, 1]" if dialect.clip else "x_0 not clamped"
    runs = fast.runs() if fast is sample else f"not patched; would be: {fast.runs()}"
    return f"{name}: {size}, {steps}, guidance {dialect.guidance}, {clip}, result x {dialect.scale:g}\n  {runs}"


@dataclass(frozen=True)
class Patch:
    """What :func:`patch_diffloss` did. As a context manager it is taken back at the end."""

    path: str
    diffloss: nn.Module

    def unpatch(self) -> None:
        unpatch(self.diffloss)

    def explain(self) -> str:
        return explain(self.diffloss)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.unpatch()


@dataclass(frozen=True)
class Recognised:
    """How an instance samples, and what that was read from."""

    schedule: Schedule
    dialect: Dialect
    drawn_on_device: bool
    without_gradients: bool  # the loop switches them off itself
    read_from: tuple[object, ...]


class FastSample:
    """What is called instead of ``sample`` on one instance. Copies and pickles go along with the instance."""

    def __init__(self, diffloss: nn.Module, rng: str, dtype: torch.dtype | None) -> None:
        self.diffloss, self.rng, self.dtype = diffloss, rng, dtype
        self._reset()

    def _reset(self) -> None:
        self._recognised: Recognised | None = None
        self._said: set[str] = set()
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"diffloss": self.diffloss, "rng": self.rng, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The samples (R, C) float32 that the original gives for z (R, Z), temperature and cfg."""
        try:
            call = self._bind(args, kwargs)
        except Unrecognised as reason:
            self._say(str(reason))
            return self._original()(self.diffloss, *args, **kwargs)
        return self._run(*call)

    def runs(self) -> str:
        """Which engine serves the weights where they are now."""
        weight = self.diffloss.net.input_proj.weight
        kind = "the fused kernels (triton)" if _fuses(weight.device) else "packed matrix products"
        dtype = str(self.dtype or weight.dtype).removeprefix("torch.") + ("" if self.dtype else " (or autocast)")
        return f"sample runs on {kind}, {weight.device}, {dtype}, rng {self.rng}"

    def recognised(self) -> Recognised:
        """What the instance is now; ``Unrecognised`` with the reason. Tried out again only if something has changed."""
        diffloss = self.diffloss
        read_from = _read_from(diffloss)
        with self._lock:
            known = self._recognised
            check_network(diffloss.net)
            if known is None or not _same(known.read_from, read_from):
                with without_autocast(torch.device("cpu")):  # where small inputs are tried
                    known = _try_out(diffloss, read_from)
                forget(diffloss.net)
                self._recognised = known
            return known

    def _original(self) -> Callable[..., Tensor]:
        return type(self.diffloss).sample

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("%s.sample runs the original: %s", type(self.diffloss).__name__, reason)

    def _bind(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Recognised, Tensor, float, float]:
        """(what is known, z, temperature, cfg) of a call that can be served; ``Unrecognised`` for any other."""
        diffloss = self.diffloss
        signature = inspect.signature(self._original())
        try:
            bound = signature.bind(diffloss, *args, **kwargs)
        except TypeError as error:
            raise Unrecognised(f"the arguments do not fit: {error}") from None
        bound.apply_defaults()
        given = dict(list(bound.arguments.items())[1:])
        for name, value in given.items():
            default = signature.parameters[name].default
            usual = value is default or (name == "sampler" and value == "iddpm")
            if name not in KNOWN_ARGUMENTS and not usual:
                raise Unrecognised(f"argument {name} = {value!r}")
        if getattr(diffloss, "sampler", "iddpm") != "iddpm":
            raise Unrecognised(f"sampler is {diffloss.sampler!r}")
        known = self.recognised()
        z, weight = given["z"], diffloss.net.input_proj.weight
        if not isinstance(z, Tensor) or z.dim() != 2 or z.shape[1] != diffloss.net.cond_embed.in_features:
            came = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise Unrecognised(f"z is {came}, not (rows, {diffloss.net.cond_embed.in_features})")
        if z.device != weight.device:
            raise Unrecognised(f"z is on {z.device}, the head on {weight.device}")
        temperature, cfg = _number("temperature", given["temperature"]), _number("cfg", given["cfg"])
        if cfg != 1.0 and len(z) % 2:
            raise Unrecognised(f"z has {len(z)} rows, which cannot be halved")
        if torch.is_grad_enabled() and (z.requires_grad or not known.without_gradients):
            raise Unrecognised("gradients are asked for")
        if torch.get_default_dtype() != torch.float32 or weight.dtype not in DTYPES:
            raise Unrecognised(f"types: {torch.get_default_dtype()} by default, weights {weight.dtype}")
        return known, z, temperature, cfg

    @torch.no_grad()
    def _run(self, known: Recognised, z: Tensor, temperature: float, cfg: float) -> Tensor:
        net, channels = self.diffloss.net, self.diffloss.net.input_proj.in_features
        dtype = self.dtype or _computes_in(net.input_proj.weight)
        if not len(z):
            return torch.empty(0, channels, device=z.device)
        fused = _fuses(z.device)

        def build(head: nn.Module) -> Head | FusedHead:
            if fused:
                return FusedHead(head, known.schedule, dtype, "triton")
            return Head(head, known.schedule, dtype)

        first = len(z) // 2 if cfg != 1.0 else len(z)
        with without_autocast(z.device):
            engine = packed(net, ("diffloss", dtype, fused), build, wait=True)
            start, latent = self._noise(known, z, first, channels, fused)
            start = start if first == len(z) else start.repeat(2, 1)
            settings = {"guidance": cfg, "dialect": known.dialect, "temperature": temperature}
            return engine(z, start, latent, **settings)

    def _noise(
        self, known: Recognised, z: Tensor, first: int, channels: int, fused: bool
    ) -> tuple[Tensor, Callable[[int], Tensor | LatentNoise]]:
        """The start (first, C) and what draws the noise of all rows in a step."""
        rows = len(z)
        if self.rng == "parity":
            on = {"device": z.device} if known.drawn_on_device else {}
            start = torch.randn(first, channels, **on).to(z.device)
            like = start.new_empty(rows, channels)
            return start, lambda i: torch.randn_like(like)
        seed = int(torch.randint(2**62, ()))
        seeds = torch.full((rows,), seed, device=z.device)
        tokens = torch.arange(rows, device=z.device)
        start = latent_noise(seeds[:first], tokens[:first], channels, 0, initial=True)
        if fused:
            return start, lambda i: LatentNoise(seeds, tokens, i)
        return start, lambda i: latent_noise(seeds, tokens, channels, i, initial=False)


def _try_out(diffloss: nn.Module, read_from: tuple[object, ...]) -> Recognised:
    net = diffloss.net
    channels = net.input_proj.in_features
    method = probe_method(diffloss, channels, net.cond_embed.in_features)
    schedule, without_gradients = probe_diffusion(diffloss.gen_diffusion, channels, clip=method.clip)
    dialect = Dialect(probe_network(net), method.clip, method.scale)
    return Recognised(schedule, dialect, method.drawn_on_device, without_gradients, read_from)


def _not_replaced(diffloss: nn.Module) -> None:
    sample = diffloss.__dict__.get("sample")
    if sample is not None and not isinstance(sample, FastSample):
        raise Unrecognised(f"{type(diffloss).__name__}.sample was already replaced on this instance, by {sample!r}")


def _read_from(diffloss: nn.Module) -> tuple[object, ...]:
    """Everything that decides how ``sample`` works, but for the modules' kinds and weights."""
    numbers = tuple(
        (name, value)
        for name, value in sorted(vars(diffloss).items())
        if name != "training" and isinstance(value, int | float | str | bool | None)
    )
    net = diffloss.net
    methods = type(diffloss).sample, type(net).forward, getattr(type(net), "forward_with_cfg", None)
    return numbers, diffloss.gen_diffusion, net, *methods, net.__dict__.get("forward_with_cfg")


def _same(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    return one[0] == other[0] and all(a is b for a, b in zip(one[1:], other[1:], strict=True))


def _number(name: str, value: object) -> float:
    """A Python number or a tensor that holds one, as MAR's guidance schedule gives it."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unrecognised(f"{name} is {type(value).__name__}, not one number")
    return float(value)


def _fuses(device: torch.device) -> bool:
    return device.type == "cuda" and choose("denoise_step", device, "auto").name == "triton"


def _computes_in(weight: Tensor) -> torch.dtype:
    """The original's precision: autocast's where that is on."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

"""What is called instead of ``sample`` on a patched diffusion head."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dcar_fast.engine.base import without_autocast
from dcar_fast.engine.fused_head import FusedHead
from dcar_fast.engine.head import Head
from dcar_fast.engine.pack import forget, packed
from dcar_fast.integrations._probes import probe_diffusion, probe_method, probe_network
from dcar_fast.integrations._replay import PackedHead, recorder
from dcar_fast.integrations._structure import Unrecognised, check_network
from dcar_fast.models.diffusion_head import Dialect
from dcar_fast.ops._dispatch import choose
from dcar_fast.ops.latent_noise import latent_noise
from dcar_fast.reference.diffusion import Schedule

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KNOWN_ARGUMENTS = ("z", "temperature", "cfg")


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

    def __init__(
        self,
        diffloss: nn.Module,
        rng: str = "parity",
        dtype: torch.dtype | None = None,
        graphs: str | bool = "auto",
    ) -> None:
        self.diffloss, self.rng, self.dtype, self.graphs = diffloss, rng, dtype, graphs
        self._reset()

    def refresh(self) -> None:
        """Packs the weights and tries everything out anew in the next call, whatever was noticed."""
        with self._lock:
            self._recognised = None
            forget(self.diffloss.net)

    def _reset(self) -> None:
        self._recognised: Recognised | None = None
        self._said: set[str] = set()
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("diffloss", "rng", "dtype", "graphs")}

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
        graphs = ", in CUDA graphs" if self._replays(weight.device) else ""
        return f"sample runs on {kind}, {weight.device}, {dtype}, rng {self.rng}{graphs}"

    def check_graphs(self) -> None:
        """``ValueError`` if graphs are insisted on where there are none."""
        device = self.diffloss.net.input_proj.weight.device
        if self.graphs is True and not self._replays(device):
            raise ValueError(f"graphs is True, but CUDA graphs need a CUDA device, the head is on {device.type}")

    def _replays(self, device: torch.device) -> bool:
        return self.graphs is not False and recorder(device) is not None

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
        if z.dtype != weight.dtype and not torch.is_autocast_enabled(z.device.type):
            raise Unrecognised(f"z is {z.dtype}, the head {weight.dtype}")
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

        def build(head: nn.Module) -> PackedHead:
            engine = FusedHead(head, known.schedule, dtype, "triton") if fused else Head(head, known.schedule, dtype)
            return PackedHead(engine, z.device)

        self.check_graphs()
        with without_autocast(z.device):
            head = packed(net, ("diffloss", dtype, fused), build, wait=True)
            start, noise = self._noise(known, z, len(z) // 2 if cfg != 1.0 else len(z), channels)
            run = head.replay if self._replays(z.device) else head
            return run(z, start, noise, cfg, temperature, known.dialect)

    def _noise(self, known: Recognised, z: Tensor, first: int, channels: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The start of all rows, the ``first`` ones and their repetition, and the noise of all rows in all steps."""
        rows = len(z)
        if self.rng == "parity":
            on = {"device": z.device} if known.drawn_on_device else {}
            start = torch.randn(first, channels, **on).to(z.device)
            normals = torch.empty(known.schedule.num_steps, rows, channels, device=z.device)
            for step in normals:
                step.copy_(torch.randn_like(step))  # as many draws of the same shape as in the original
            noise = {"normals": normals}
        else:
            seeds = torch.full((rows,), int(torch.randint(2**62, ())), device=z.device)
            noise = {"seeds": seeds, "tokens": torch.arange(rows, device=z.device)}
            start = latent_noise(seeds[:first], noise["tokens"][:first], channels, 0, initial=True)
        return (start if first == rows else start.repeat(2, 1)), noise


def _try_out(diffloss: nn.Module, read_from: tuple[object, ...]) -> Recognised:
    net = diffloss.net
    channels = net.input_proj.in_features
    method = probe_method(diffloss, channels, net.cond_embed.in_features)
    schedule, without_gradients = probe_diffusion(diffloss.gen_diffusion, channels, clip=method.clip)
    dialect = Dialect(probe_network(net), method.clip, method.scale)
    return Recognised(schedule, dialect, method.drawn_on_device, without_gradients, read_from)


def _read_from(diffloss: nn.Module) -> tuple[object, ...]:
    """Everything that decides how ``sample`` works, but for the modules' kinds and weights: values, and objects."""
    net, diffusion = diffloss.net, diffloss.gen_diffusion
    own = vars(diffloss) | diffloss._buffers | diffloss._parameters
    numbers = [(name, _number_or_none(value)) for name, value in sorted(own.items()) if name != "training"]
    tables = [_content(getattr(diffusion, name, None)) for name in ("betas", "timestep_map")]
    kinds = [getattr(diffusion, f"model_{name}_type", None) for name in ("mean", "var")]
    methods = type(diffloss).sample, getattr(type(net), "forward_with_cfg", None), net.__dict__.get("forward_with_cfg")
    forwards = [type(module).forward for module in net.modules()]
    loop = getattr(type(diffusion), "p_sample_loop", None)
    return ([pair for pair in numbers if pair[1] is not None], tables, kinds), diffusion, net, loop, *methods, *forwards


def _number_or_none(value: object) -> int | float | str | None:
    """What ``sample`` may multiply by or branch on; None for anything else."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        return value.item()
    return value if isinstance(value, int | float | str) else None


def _content(table: object) -> object:
    """What a table of the schedule holds, to be compared; of a tensor place and version: no GPU is waited for."""
    if isinstance(table, Tensor):
        return table.data_ptr(), table._version, tuple(table.shape)
    return None if table is None else np.asarray(table).tobytes()


def _same(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    return (
        one[0] == other[0] and len(one) == len(other) and all(a is b for a, b in zip(one[1:], other[1:], strict=True))
    )


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

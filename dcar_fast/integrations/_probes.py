"""How a head samples, found out by trying: its own methods are called on small inputs and compared with our formulas.

Nothing of the caller's is changed and no random number of torch's generators is used up. ``Unrecognised`` says what
came out differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from dcar_fast.integrations._structure import Unrecognised
from dcar_fast.ops._head import embed_condition, embed_timesteps, modulations, pack_head
from dcar_fast.reference.denoise_step import FORMULAS, guide, network, posterior_step
from dcar_fast.reference.diffusion import Schedule, schedule_of

ROWS = 4  # two conditional ones and two unconditional ones
SCALE = 2.75  # of guidance: no formula agrees with another there
TEMPERATURE = 0.875
TOLERANCE = 1e-3  # of the largest value: another formula is off by far more


@dataclass(frozen=True)
class Method:
    """What a ``sample`` does around the loop. drawn_on_device: its first noise comes from the generator of the
    condition's device, and not from that of torch's default device, to be moved afterwards."""

    clip: bool
    scale: float
    drawn_on_device: bool


class Intercepted(TorchFunctionMode):
    """Random draws come from a generator of our own and are recorded; moves to a GPU stay here."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.draws: list[tuple[str, tuple[int, ...], object]] = []  # function, shape, device that was asked for
        self.values: list[Tensor] = []

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), given: dict[str, Any] | None = None
    ) -> Any:
        given = given or {}
        name = getattr(function, "__name__", str(function))
        if function is Tensor.cuda:
            return args[0]
        if name in ("randn", "randn_like"):
            return self._draw(name, args, given)
        if name.startswith(("rand", "normal", "bernoulli", "multinomial", "uniform", "exponential", "poisson")):
            raise Unrecognised(f"it draws {name}")
        return function(*args, **given)

    def _draw(self, name: str, args: tuple, given: dict[str, Any]) -> Tensor:
        odd = set(given) - {"size", "device", "dtype"}
        if odd or given.get("dtype") not in (None, torch.float32):
            raise Unrecognised(f"it draws {name} with {', '.join(sorted(odd or {'dtype'}))}")
        size = args[0].shape if name == "randn_like" else given.get("size", args)
        size = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)
        value = torch.randn(size, generator=self.generator)
        self.draws.append((name, size, given.get("device")))
        self.values.append(value)
        return value


def probe_method(diffloss: nn.Module, channels: int, condition_dim: int) -> Method:
    """Clipping and output scale of ``type(diffloss).sample``, with and without guidance; how it draws is checked."""
    found = [_call(diffloss, channels, condition_dim, cfg) for cfg in (1.0, SCALE)]
    if found[0] != found[1]:
        raise Unrecognised(f"sample clips or scales differently with guidance: {found[0]}, {found[1]}")
    return found[0]


class _Loop:
    """Stands for ``gen_diffusion`` and records how it is called."""

    def __init__(self, real: object) -> None:
        self._real = real
        self.calls: list[dict[str, Any]] = []

    def p_sample_loop(self, model: Callable, shape: Sequence[int], noise: Tensor | None = None, **rest: Any) -> Tensor:
        self.calls.append({"model": model, "shape": tuple(shape), "noise": noise, **rest})
        return _powers(shape)

    def __getattr__(self, name: str) -> object:
        raise Unrecognised(f"sample uses gen_diffusion.{name}, only p_sample_loop can be replaced")


def _powers(shape: Sequence[int]) -> Tensor:
    """Powers of two, the first one 1: a factor on them is found exactly."""
    return 2.0 ** (torch.arange(math.prod(shape)) % 7).view(tuple(shape))


def _stand_in(diffloss: nn.Module, loop: _Loop) -> nn.Module:
    """An instance of the same class with the same attributes and modules, but for ``gen_diffusion``."""
    copied = object.__new__(type(diffloss))
    for name, value in vars(diffloss).items():
        copied.__dict__[name] = value.copy() if name.startswith("_") and isinstance(value, dict) else value
    copied.__dict__.pop("sample", None)
    copied._modules.pop("gen_diffusion", None)
    copied.__dict__["gen_diffusion"] = loop
    return copied


def _call(diffloss: nn.Module, channels: int, condition_dim: int, cfg: float) -> Method:
    loop = _Loop(diffloss.gen_diffusion)
    z = torch.zeros(ROWS, condition_dim)
    intercepted, stand_in = Intercepted(), _stand_in(diffloss, loop)
    before = dict(vars(stand_in))
    try:
        with torch.no_grad(), intercepted:
            result = stand_in.sample(z, temperature=TEMPERATURE, cfg=cfg)
    except Unrecognised:
        raise
    except Exception as error:  # of somebody else's code: whatever it is, it says why
        raise Unrecognised(f"sample(z, temperature, cfg={cfg}) fails: {type(error).__name__}: {error}") from error
    after = vars(stand_in)
    changed = [name for name in after if name not in before or after[name] is not before[name]]
    if changed:
        raise Unrecognised(f"sample sets {', '.join(changed)}")
    if len(loop.calls) != 1:
        raise Unrecognised(f"sample calls p_sample_loop {len(loop.calls)} times, not once")
    call = loop.calls[0]
    guided = cfg != 1.0
    wanted = {
        "model": diffloss.net.forward_with_cfg if guided else diffloss.net.forward,
        "shape": (ROWS, channels),
        "temperature": TEMPERATURE,
    }
    for name, value in wanted.items():
        if call.get(name) != value:
            raise Unrecognised(f"sample gives p_sample_loop {name} = {call.get(name)!r}, not {value!r}")
    given = dict(call.get("model_kwargs") or {})
    if given.pop("c", None) is not z or given != ({"cfg_scale": cfg} if guided else {}):
        raise Unrecognised(f"sample gives the network {sorted(call.get('model_kwargs') or {})}, not c (and cfg_scale)")
    unknown = set(call) - {*wanted, "noise", "model_kwargs", "clip_denoised", "progress", "device"}
    extra = sorted(name for name in unknown if call[name] is not None)
    if extra:
        raise Unrecognised(f"sample gives p_sample_loop {', '.join(extra)}")
    drawn = (ROWS // 2 if guided else ROWS, channels)
    draws = [draw[:2] for draw in intercepted.draws]
    if draws != [("randn", drawn)]:
        raise Unrecognised(f"sample draws {draws}, not one randn of {drawn}")
    noise = intercepted.values[0].repeat(2, 1) if guided else intercepted.values[0]
    if not isinstance(call["noise"], Tensor) or not torch.equal(call["noise"], noise):
        raise Unrecognised("sample starts from something else than the noise it draws")
    clip = call.get("clip_denoised", True)
    here = isinstance(result, Tensor) and result.shape == (ROWS, channels)
    scale = result[0, 0].item() if here else 0.0
    if not isinstance(clip, bool) or not here or not torch.equal(result, _powers(result.shape) * scale):
        raise Unrecognised("sample returns something else than p_sample_loop's result times a constant")
    # the number that somebody wrote, before it was rounded to float32
    return Method(clip, float(str(np.float32(scale))), drawn_on_device=intercepted.draws[0][2] is not None)


def probe_diffusion(diffusion: object, channels: int, *, clip: bool) -> tuple[Schedule, bool]:
    """The schedule of ``gen_diffusion``, from its betas and timestep_map, and whether its loop switches gradients off.

    Its ``p_sample_loop`` is run over all steps on a function instead of the network; each step is compared with ours.
    """
    schedule = _schedule(diffusion)
    table = torch.randn(2, channels, generator=torch.Generator().manual_seed(1))
    asked: list[int] = []
    states: list[Tensor] = []  # x before each step
    gradients: list[bool] = []
    descending = list(reversed(range(schedule.num_steps)))

    def model(x: Tensor, t: Tensor, **given: object) -> Tensor:
        if given or t.shape != (ROWS,):
            raise Unrecognised(f"p_sample_loop calls the network with t {tuple(t.shape)} and {sorted(given)}")
        asked.append(int(t[0]))
        states.append(x.detach().clone())
        gradients.append(torch.is_grad_enabled())
        if asked != [schedule.timesteps[k] for k in descending[: len(asked)]]:
            raise Unrecognised("gen_diffusion feeds the network other timesteps than its timestep_map, descending")
        return _fake_network(x, float(schedule.alpha_bar[descending[len(asked) - 1]]), table)

    start = torch.randn(ROWS, channels, generator=torch.Generator().manual_seed(2))
    intercepted = Intercepted()
    try:
        with torch.enable_grad(), intercepted:
            settings = {"clip_denoised": clip, "model_kwargs": {}, "progress": False, "temperature": TEMPERATURE}
            theirs = diffusion.p_sample_loop(model, start.shape, start, **settings)
    except Unrecognised:
        raise
    except Exception as error:
        raise Unrecognised(f"gen_diffusion.p_sample_loop fails: {type(error).__name__}: {error}") from error
    if len(asked) != schedule.num_steps:
        raise Unrecognised(
            f"gen_diffusion calls the network {len(asked)} times, its timestep_map has {schedule.num_steps}"
        )
    draws = [draw[:2] for draw in intercepted.draws]
    if draws != [("randn_like", (ROWS, channels))] * schedule.num_steps:
        raise Unrecognised(f"gen_diffusion draws {draws[:3]} and so on, not one randn_like of all rows in each step")
    _agree("gen_diffusion.p_sample_loop's first x", states[0], start)
    for i, (k, x, after) in enumerate(zip(descending, states, [*states[1:], theirs], strict=True)):
        epsilon, variance = _fake_network(x, float(schedule.alpha_bar[k]), table).chunk(2, dim=1)
        settings = {"temperature": TEMPERATURE, "clip": clip}
        ours = posterior_step(x, epsilon, variance, intercepted.values[i], schedule, k, **settings)
        _agree(f"gen_diffusion.p_sample_loop at t = {schedule.timesteps[k]}", after, ours)
    return schedule, not any(gradients)


def probe_network(net: nn.Module) -> str:
    """The guidance formula of ``net.forward_with_cfg``, after ``net.forward`` was found to be ``SimpleMLPAdaLN``'s.

    Both are called with random weights in place of the module's: fresh heads return nothing but zeros.
    """
    generator = torch.Generator().manual_seed(3)
    caller = _Caller(net)
    values = {
        name: torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5 for name, p in caller.named_parameters()
    }

    def run(function: Callable[[nn.Module], Any]) -> Any:
        return functional_call(caller, values, (function,))

    with torch.no_grad():
        weights = run(lambda net: pack_head(net, torch.float32))
        x = torch.randn(ROWS, weights.channels, generator=generator)
        t = torch.tensor([3, 250, 3, 250])
        z = torch.randn(ROWS, weights.condition_weight.shape[1], generator=generator)
        modulation = modulations(weights, embed_condition(weights, z), embed_timesteps(weights, t))

        found = _theirs("net.forward", lambda: run(lambda net: net.forward(x, t, z)))
        _agree("net.forward", found, network(x, modulation, weights))
        found = _theirs("net.forward_with_cfg", lambda: run(lambda net: net.forward_with_cfg(x, t, z, SCALE)))
        epsilon, rest = network(x[: ROWS // 2].repeat(2, 1), modulation, weights).chunk(2, dim=1)
        for formula in FORMULAS:
            guided = torch.cat((guide(*epsilon.chunk(2), SCALE, formula).repeat(2, 1), rest), dim=1)
            if found.shape == guided.shape and _close(found, guided):
                return formula
    raise Unrecognised(f"net.forward_with_cfg guides epsilon neither by {' nor by '.join(FORMULAS)}")


class _Caller(nn.Module):
    """Calls any function of a network, so that ``functional_call`` can."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.net)


def _theirs(what: str, call: Callable[[], Any]) -> Any:
    """The result of somebody else's code, which may fail in any way."""
    try:
        with Intercepted() as intercepted:
            found = call()
    except Unrecognised as reason:
        raise Unrecognised(f"{what}: {reason}") from None
    except Exception as error:
        raise Unrecognised(f"{what} fails: {type(error).__name__}: {error}") from error
    if intercepted.draws:
        raise Unrecognised(f"{what} draws random numbers")
    return found


def _schedule(diffusion: object) -> Schedule:
    kinds = {"model_mean_type": "EPSILON", "model_var_type": "LEARNED_RANGE"}
    for name, wanted in kinds.items():
        here = getattr(getattr(diffusion, name, None), "name", None)
        if here != wanted:
            raise Unrecognised(f"gen_diffusion.{name} is {here}, not {wanted}")
    betas, timesteps = getattr(diffusion, "betas", None), getattr(diffusion, "timestep_map", None)
    if betas is None or timesteps is None or len(betas) != len(timesteps) or len(betas) < 2:
        raise Unrecognised("gen_diffusion has no timestep_map of as many entries as betas, two or more")
    betas = betas.cpu().numpy() if isinstance(betas, Tensor) else np.asarray(betas)
    return schedule_of(tuple(int(t) for t in timesteps), betas.astype(np.float64))


def _fake_network(x: Tensor, alpha_bar: float, table: Tensor) -> Tensor:
    """Some function of x and alpha_bar that leaves no coefficient of a step unseen, the same for all who call it.

    The x_0 that its epsilon stands for lies within +-1.5, partly beyond the clamp, and its variance value within
    +-1, as a trained network's: at t = 999 the schedule multiplies epsilon by 2e4, and anything else would overflow.
    """
    x0 = 1.5 * torch.tanh(0.5 * x + table[0])
    epsilon = (x - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5
    return torch.cat((epsilon, torch.tanh(0.25 * x + table[1])), dim=1)


def _agree(what: str, theirs: object, ours: Tensor) -> None:
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        raise Unrecognised(f"{what} returns {tuple(theirs.shape) if isinstance(theirs, Tensor) else theirs!r}")
    if not _close(theirs, ours):
        difference = (theirs.float() - ours).abs().max().item()
        raise Unrecognised(f"{what} computes something else: off by {difference:.2g} on a small input")


def _close(theirs: Tensor, ours: Tensor) -> bool:
    return bool(((theirs.float() - ours).abs().max() <= TOLERANCE * ours.abs().max()).item())

"""What a head of the MAR family is made of: found by its modules, refused with the reason where anything differs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules import module as module_globals
from torch.nn.utils.parametrize import is_parametrized

from dcar_fast.reference.denoise_step import EPS
from dcar_fast.reference.diffusion import FREQUENCIES


class Unrecognised(ValueError):
    """Something is no head of the MAR family, or not one that can be replaced; the reason is in the message."""


def find_diffloss(obj: object) -> tuple[str, nn.Module]:
    """(path, module) of the one module in ``obj`` that has ``net``, ``gen_diffusion`` and ``sample``; "" is obj itself.

    obj: that module, one that holds it, or another object with such a module among its attributes.
    """
    found = {id(module): (name, module) for name, module in _modules(obj) if _is_diffloss(module)}
    if not found:
        raise Unrecognised(
            f"{type(obj).__name__} holds no diffusion head: no module of it has net, gen_diffusion and sample"
        )
    if len(found) > 1:
        names = ", ".join(name or "itself" for name, _ in found.values())
        raise Unrecognised(f"{type(obj).__name__} holds {len(found)} diffusion heads ({names}): patch them one by one")
    return next(iter(found.values()))


def check_network(net: nn.Module) -> None:
    """``Unrecognised`` unless ``net`` holds the modules of ``SimpleMLPAdaLN`` and nothing else, as PyTorch has them.

    With W its width, C its channels and Z the size of the condition: time_embed.mlp (256 -> W -> W), cond_embed (Z, W),
    input_proj (C, W), res_blocks[i].{in_ln, mlp (W -> W -> W), adaLN_modulation (W, 3W)} and final_layer.{norm_final,
    linear (W, 2C), adaLN_modulation (W, 2W)}; no hooks, no parametrisations.
    """
    if getattr(module_globals, "_global_forward_hooks", None) or getattr(
        module_globals, "_global_forward_pre_hooks", None
    ):
        raise Unrecognised("a global forward hook is set, which would not run")
    _children(net, "net", "time_embed", "cond_embed", "input_proj", "res_blocks", "final_layer")
    channels, width = _linear(net.input_proj, "net.input_proj")
    _linear(net.cond_embed, "net.cond_embed", None, width)
    _children(net.time_embed, "net.time_embed", "mlp")
    _mlp(net.time_embed.mlp, "net.time_embed.mlp", 2 * FREQUENCIES, width)
    _type(net.res_blocks, "net.res_blocks", nn.ModuleList)
    if not len(net.res_blocks):
        raise Unrecognised("net.res_blocks is empty")
    for i, block in enumerate(net.res_blocks):
        name = f"net.res_blocks.{i}"
        _children(block, name, "in_ln", "mlp", "adaLN_modulation")
        _norm(block.in_ln, f"{name}.in_ln", width, affine=True)
        _mlp(block.mlp, f"{name}.mlp", width, width)
        _modulation(block.adaLN_modulation, f"{name}.adaLN_modulation", width, 3)
    final = net.final_layer
    _children(final, "net.final_layer", "norm_final", "linear", "adaLN_modulation")
    _norm(final.norm_final, "net.final_layer.norm_final", width, affine=False)
    _linear(final.linear, "net.final_layer.linear", width, 2 * channels)
    _modulation(final.adaLN_modulation, "net.final_layer.adaLN_modulation", width, 2)


def _modules(obj: object) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(obj, nn.Module):
        yield from obj.named_modules()
        return
    for name, value in getattr(obj, "__dict__", {}).items():
        if isinstance(value, nn.Module):
            for inner, module in value.named_modules():
                yield f"{name}.{inner}".rstrip("."), module


def _is_diffloss(module: nn.Module) -> bool:
    has_network = isinstance(getattr(module, "net", None), nn.Module)
    return has_network and hasattr(module, "gen_diffusion") and callable(getattr(type(module), "sample", None))


def _children(module: nn.Module, name: str, *wanted: str) -> None:
    if not isinstance(module, nn.Module):
        raise Unrecognised(f"{name} is a {type(module).__name__}, no module")
    here = {key for key, child in module.named_children() if child is not None}
    missing, extra = sorted(set(wanted) - here), sorted(here - set(wanted))
    if missing or extra:
        parts = [f"{word} {', '.join(names)}" for word, names in (("lacks", missing), ("also has", extra)) if names]
        raise Unrecognised(f"{name} ({type(module).__name__}) {' and '.join(parts)}")
    own = [key for key, value in (*module._parameters.items(), *module._buffers.items()) if value is not None]
    if own:
        raise Unrecognised(f"{name} ({type(module).__name__}) also has {', '.join(own)}")
    _no_hooks(module, name)


def _type(module: object, name: str, wanted: type[nn.Module]) -> None:
    """Exactly this type: a quantised linear or one with an adapter around it computes something else."""
    if type(module) is not wanted:
        raise Unrecognised(f"{name} is a {type(module).__name__}, not PyTorch's {wanted.__name__}")
    _no_hooks(module, name)
    if is_parametrized(module):
        raise Unrecognised(f"{name} is parametrised ({', '.join(module.parametrizations)})")


def _no_hooks(module: nn.Module, name: str) -> None:
    if module._forward_hooks or module._forward_pre_hooks:
        raise Unrecognised(f"{name} has a forward hook, which would not run")
    if "forward" in module.__dict__:
        raise Unrecognised(f"{name} has a forward of its own")


def _linear(module: object, name: str, inputs: int | None = None, outputs: int | None = None) -> tuple[int, int]:
    """Checks and returns its (inputs, outputs)."""
    _type(module, name, nn.Linear)
    shape = (module.in_features, module.out_features)
    wanted = tuple(here if asked is None else asked for here, asked in zip(shape, (inputs, outputs), strict=True))
    if shape != wanted or tuple(module.weight.shape) != shape[::-1]:
        raise Unrecognised(f"{name} maps {shape[0]} to {shape[1]} features, not {wanted[0]} to {wanted[1]}")
    if module.bias is None:
        raise Unrecognised(f"{name} has no bias")
    return shape


def _mlp(module: object, name: str, inputs: int, width: int) -> None:
    """Linear, SiLU, Linear."""
    _sequential(module, name, nn.Linear, nn.SiLU, nn.Linear)
    _linear(module[0], f"{name}.0", inputs, width)
    _linear(module[2], f"{name}.2", width, width)


def _modulation(module: object, name: str, width: int, parts: int) -> None:
    """SiLU, Linear."""
    _sequential(module, name, nn.SiLU, nn.Linear)
    _linear(module[1], f"{name}.1", width, parts * width)


def _sequential(module: object, name: str, *wanted: type[nn.Module]) -> None:
    _type(module, name, nn.Sequential)
    if len(module) != len(wanted):
        raise Unrecognised(f"{name} has {len(module)} layers, not {len(wanted)}")
    for i, (layer, kind) in enumerate(zip(module, wanted, strict=True)):
        _type(layer, f"{name}.{i}", kind)


def _norm(module: object, name: str, width: int, affine: bool) -> None:
    _type(module, name, nn.LayerNorm)
    here = (tuple(module.normalized_shape), module.eps, module.weight is not None, module.bias is not None)
    if here != ((width,), EPS, affine, affine):
        wanted = f"({width},), eps {EPS}, {'with' if affine else 'without'} weight and bias"
        came = f"{here[0]}, eps {here[1]}, weight {here[2]}, bias {here[3]}"
        raise Unrecognised(f"{name} normalises {came}; not {wanted}")

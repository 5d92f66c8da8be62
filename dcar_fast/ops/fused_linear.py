"""A linear layer in one launch with the LayerNorm or softmax before it and the activation and residual after it."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.ops._attention import KERNEL_TYPES, check_type
from dcar_fast.ops._checks import (
    check_int64,
    check_moments,
    check_no_grad,
    check_number,
    check_same_device,
    check_tensor,
    check_values,
)
from dcar_fast.ops._dispatch import (
    Backend,
    choose_float8,
    choose_for,
    current,
    everywhere,
    register,
    triton_usable,
)
from dcar_fast.ops._library import define
from dcar_fast.reference import fused_linear as reference
from dcar_fast.reference._moments import PIECE

GROUPS = (16, 32, 64)
FLOAT8 = torch.float8_e4m3fn


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    moments: Tensor | None = None,
    colsum: Tensor | None = None,
    eps: float = 1e-6,
    lengths: Tensor | None = None,
    group: int | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    emit_moments: bool = False,
    out_dtype: torch.dtype | None = None,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """act(f(x) W^T + bias) + residual: (B, N, V) in ``out_dtype``, contiguous; with ``emit_moments`` also its moments.

    x (B, N, K). weight (V, K), or (G, V, K), of which image b takes number min(b, G - 1): images of their own come
    first, those that share one last. bias (V,), or (G, V) likewise, or None. residual (B, N, V) or None. weight, bias,
    residual and x (but see ``lengths``) are of one type: float32, float16, bfloat16, or float64, which only the
    reference runs. All on one device, with any strides. ``out_dtype``: that type, the default, or float32. Sums are
    float32, the result is rounded once. ``activation``: "none", "gelu" (its tanh approximation), "silu".

    f is the identity unless one of these is given:

    - ``moments`` (B, N, ceil(K / 64), 2) float32: LayerNorm over K without affine, with ``eps`` added to the variance.
      They are mean and sum of squared deviations of each piece of 64 columns of a row of x, as ``emit_moments`` gives
      them of the rounded result for the op that reads it (float64 ones with float64). In 16-bit types the kernel
      multiplies x as it is and normalises the sums, rstd (x W^T) - rstd mean colsum: ``colsum`` (V,) or (G, V) float32
      are the sums of the weight's rows, summed in one more launch in each call that does not give them. What cancels
      there costs a relative error of about |mean| / deviation float32 roundings.
    - ``lengths`` (B,) int64 and ``group``, T of 16, 32 or 64: softmax over the first lengths[b] of each T columns, in
      float32, and 0 in the others, so that length 0 gives zeros. K is a multiple of T. x may also be float32. With
      scores = fused_linear(x, keys, out_dtype=torch.float32) this is attention with absorbed projections.

    In float8_e4m3fn, both x and weight (V, K), ``x_scale`` (B, N) and ``weight_scale`` (V,) float32 multiply the sums
    of their row: act(x_scale weight_scale x W^T + bias) + residual, without moments and lengths. bias and residual are
    of ``out_dtype`` then, bfloat16 by default, float16 or float32. See ``quantize_rows``. The kernel needs a GPU of
    compute capability 8.9; elsewhere the reference multiplies what the values stand for in float32. Hopper's matrix
    instructions keep about 14 bits while they add up 128 products, the sums of these are float32.

    Formula: ``reference/fused_linear.py``. Inference only. ``backend``: see ``_dispatch.choose``. Raises ValueError,
    before any work, for what does not fit together, for inputs that ask for a gradient, and for lengths outside 0..T.
    On a GPU looking at those would mean waiting for it: there the nearest of 0..T counts.
    """
    kind = _checked_scales(x, weight, x_scale, weight_scale, moments, lengths, out_dtype)
    _check_linear(x, weight, bias, residual, lengths, kind)
    _check_moments(moments, colsum, eps, x, weight)
    _check_lengths(lengths, group, moments, x)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, allowed are {', '.join(map(repr, reference.ACTIVATIONS))}")
    if out_dtype is None:
        out_dtype = kind
    elif out_dtype not in (kind, torch.float32):
        raise ValueError(f"out_dtype is {out_dtype}, allowed are the type of weight, {weight.dtype}, and torch.float32")
    check_no_grad("fused_linear", x=x, weight=weight, bias=bias, residual=residual)
    y, emitted = _fused_linear(
        x,
        weight,
        bias,
        moments,
        colsum,
        float(eps),
        lengths,
        group,
        activation,
        residual,
        bool(emit_moments),
        out_dtype,
        x_scale,
        weight_scale,
        backend,
    )
    return (y, emitted) if emit_moments else y


def _checked_scales(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    moments: Tensor | None,
    lengths: Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    """The type of bias and residual: the weight's own, but with float8."""
    scaled = isinstance(weight, Tensor) and weight.dtype == FLOAT8
    for name, scale in (("x_scale", x_scale), ("weight_scale", weight_scale)):
        if not scaled and scale is not None:
            raise ValueError(f"{name} is given, allowed is None unless weight is {FLOAT8}")
    if not scaled:
        return weight.dtype if isinstance(weight, Tensor) else torch.float32
    for name, other in (("moments", moments), ("lengths", lengths)):
        if other is not None:
            raise ValueError(f"{name} is given, allowed is None with {FLOAT8}")
    check_tensor("x", x, ("B", "N", "K"))
    check_tensor("weight", weight, ("V", x.shape[2]))
    for name, scale, shape in (("x_scale", x_scale, x.shape[:2]), ("weight_scale", weight_scale, weight.shape[:1])):
        check_tensor(name, scale, shape)
        assert isinstance(scale, Tensor)
        if scale.dtype != torch.float32:
            raise ValueError(f"{name} is {scale.dtype}, allowed is torch.float32")
        check_same_device("x", x, name, scale)
    if out_dtype is not None and out_dtype not in KERNEL_TYPES:
        raise ValueError(f"out_dtype is {out_dtype}, allowed are {', '.join(map(str, KERNEL_TYPES))}")
    return out_dtype or torch.bfloat16


def _check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, lengths: object, kind: torch.dtype
) -> None:
    check_tensor("x", x, ("B", "N", "K"))
    several = isinstance(weight, Tensor) and weight.dim() == 3
    check_tensor("weight", weight, ("G", "V", x.shape[2]) if several else ("V", x.shape[2]))
    if weight.dtype != FLOAT8:
        check_type("weight", weight)
    if 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, allowed are sizes of at least 1")
    if x.dtype != weight.dtype and (lengths is None or x.dtype != torch.float32):
        allowed = f"the type of weight, {weight.dtype}" + (", or torch.float32" if lengths is not None else "")
        raise ValueError(f"x is {x.dtype}, allowed is {allowed}")
    check_same_device("x", x, "weight", weight)
    outer = weight.shape[-2]
    if bias is not None:
        own = several and isinstance(bias, Tensor) and bias.dim() == 2
        check_tensor("bias", bias, (weight.shape[0], outer) if own else (outer,))
        _check_alike("bias", bias, weight, kind)
    if residual is not None:
        check_tensor("residual", residual, (*x.shape[:2], outer))
        _check_alike("residual", residual, weight, kind)


def _check_alike(name: str, value: Tensor, weight: Tensor, kind: torch.dtype) -> None:
    if value.dtype != kind:
        of = "weight" if weight.dtype == kind else "the result"
        raise ValueError(f"{name} is {value.dtype}, allowed is the type of {of}, {kind}")
    check_same_device("x", weight, name, value)


def _check_moments(moments: Tensor | None, colsum: Tensor | None, eps: float, x: Tensor, weight: Tensor) -> None:
    check_number("eps", eps, 0.0)
    if moments is None:
        if colsum is not None:
            raise ValueError("colsum is a tensor, allowed is None without moments")
        return
    check_moments("moments", "x", moments, x, -(-x.shape[2] // PIECE))
    if colsum is not None:
        check_tensor("colsum", colsum, weight.shape[:-1])
        if colsum.dtype != torch.float32:
            raise ValueError(f"colsum is {colsum.dtype}, allowed is torch.float32")
        check_same_device("x", x, "colsum", colsum)


def _check_lengths(lengths: Tensor | None, group: int | None, moments: Tensor | None, x: Tensor) -> None:
    if lengths is None:
        if group is not None:
            raise ValueError(f"group is {group!r}, allowed is None without lengths")
        return
    if moments is not None:
        raise ValueError("lengths is a tensor, allowed is None with moments")
    check_tensor("lengths", lengths, x.shape[:1])
    check_int64("lengths", lengths)
    check_same_device("x", x, "lengths", lengths)
    if group not in GROUPS or isinstance(group, bool):
        raise ValueError(f"group is {group!r}, allowed are {', '.join(map(str, GROUPS))}")
    if x.shape[2] % group:
        raise ValueError(f"x has shape {tuple(x.shape)}, allowed is (B, N, K) with K a multiple of group, {group}")


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    moments: Tensor | None,
    colsum: Tensor | None,
    eps: float,
    lengths: Tensor | None,
    group: int | None,
    activation: str,
    residual: Tensor | None,
    emit_moments: bool,
    out_dtype: torch.dtype,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    if lengths is not None:
        check_values("lengths", lengths, group)
    if x_scale is None:
        run = choose_for("fused_linear", weight, backend).run
    else:
        run = choose_float8("fused_linear", weight.device, backend).run
    result = run(
        x,
        weight,
        bias,
        moments=moments,
        colsum=colsum,
        eps=eps,
        lengths=lengths,
        group=group,
        activation=activation,
        residual=residual,
        emit_moments=emit_moments,
        out_dtype=out_dtype,
        x_scale=x_scale,
        weight_scale=weight_scale,
    )
    return result if emit_moments else (result, _no_moments(result))


def _no_moments(y: Tensor) -> Tensor:
    return y.new_empty(*y.shape[:2], 0, 2, dtype=torch.promote_types(y.dtype, torch.float32))


def _fake(x: Tensor, weight: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    *_, emit_moments, out_dtype, _, _, _ = others
    y = x.new_empty(*x.shape[:2], weight.shape[-2], dtype=out_dtype)
    if not emit_moments:
        return y, _no_moments(y)
    wide = torch.promote_types(out_dtype, torch.float32)
    return y, y.new_empty(*y.shape[:2], -(-y.shape[2] // PIECE), 2, dtype=wide)


_fused_linear = define(
    "fused_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? moments, Tensor? colsum, float eps, Tensor? lengths,"
    " int? group, str activation, Tensor? residual, bool emit_moments, ScalarType out_dtype,"
    " Tensor? x_scale, Tensor? weight_scale, str? backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)


def _run_reference(x: Tensor, weight: Tensor, bias: Tensor | None, *, colsum: Tensor | None, **how):
    return reference.fused_linear(x, weight, bias, **how)


def _run_triton(x: Tensor, weight: Tensor, bias: Tensor | None, **how):
    from dcar_fast.kernels.fused_linear import fused_linear as kernel  # triton is loaded on use only

    with current(x.device):
        return kernel(x, weight, bias, **how)


register(
    "fused_linear",
    Backend("triton", _run_triton, triton_usable, launches=1),
    Backend("reference", _run_reference, everywhere),
)

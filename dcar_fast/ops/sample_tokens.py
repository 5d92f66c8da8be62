"""The logits head and guided Gumbel-max sampling in one, on the fastest backend there is."""

from __future__ import annotations

from torch import Tensor

from dcar_fast.noise import TokenNoise
from dcar_fast.ops import _native
from dcar_fast.ops._checks import check_floating, check_same_device, check_tensor
from dcar_fast.ops._dispatch import Backend, choose, current, everywhere, register, triton_usable
from dcar_fast.ops._library import define
from dcar_fast.ops._sampling import Draw, check_noise, check_rows, check_settings, empty_choice, for_kernels
from dcar_fast.ops.sample_from_logits import run_native as native_from_logits
from dcar_fast.reference import sample_tokens as reference

NATIVE_LOGITS = 4 << 20  # logits that exist at a time on the CPU: 16 MiB


def sample_tokens(
    cond: Tensor,
    uncond: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    guidance: float,
    softmax_temperature: float,
    tau: float,
    noise: Tensor | TokenNoise,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """ids (R,) int64 and confidence (R,) float32 from normed hidden states cond and uncond (R, D).

    logits = hidden @ weight (V, D)^T + bias (V,) of each branch, accumulated in float32; all else is
    ``sample_from_logits``. Any floating dtypes, one device. Formula: ``reference/sample_tokens.py``.

    The head is linear, so the fast backends guide the hidden states, c + guidance (c - u) in float32, and multiply
    once. "triton" rounds them to the weight's type first; for float32 weights the products keep float32's accuracy.
    Hidden states or weights with NaN or infinity give logits that are NaN or infinite, and which of them may differ
    between the backends; an id is 0..V-1 in any case.

    Inference only: the results carry no gradient, whatever the inputs. ``backend``: see ``_dispatch.choose``. Raises
    ValueError, before any work, for what does not fit together, and as ``sample_from_logits`` for the noise.
    """
    check_rows(cond, uncond, "D")
    check_tensor("weight", weight, ("V", cond.shape[1]))
    check_floating("weight", weight)
    if not weight.shape[0]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, allowed is at least one row")
    check_tensor("bias", bias, (weight.shape[0],))
    check_floating("bias", bias)
    check_same_device("cond", cond, "weight", weight)
    check_same_device("cond", cond, "bias", bias)
    check_settings(guidance, softmax_temperature, tau)
    check_noise(noise, cond, weight.shape[0])
    tensors = (None if x is None else x.detach() for x in (cond, uncond, weight, bias))
    settings = (float(guidance), float(softmax_temperature), float(tau))
    return _sample_tokens(*tensors, *Draw.of(noise), *settings, backend)


def _run(
    cond: Tensor,
    uncond: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    uniforms: Tensor | None,
    seeds: Tensor | None,
    tokens: Tensor | None,
    step: int,
    guidance: float,
    softmax_temperature: float,
    tau: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    draw = Draw(uniforms, seeds, tokens, step).checked()
    settings = {"guidance": guidance, "softmax_temperature": softmax_temperature, "tau": tau}
    return choose("sample_tokens", cond.device, backend).run(cond, uncond, weight, bias, draw, settings)


def _fake(cond: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return empty_choice(cond)


_sample_tokens = define(
    "sample_tokens(Tensor cond, Tensor? uncond, Tensor weight, Tensor bias, Tensor? uniforms, Tensor? seeds, "
    "Tensor? tokens, SymInt step, float guidance, float softmax_temperature, float tau, str? backend) "
    "-> (Tensor, Tensor)",
    _run,
    _fake,
)


def _run_reference(
    cond: Tensor, uncond: Tensor | None, weight: Tensor, bias: Tensor, draw: Draw, settings: dict[str, float]
) -> tuple[Tensor, Tensor]:
    return reference.sample_tokens(cond, uncond, weight, bias, noise=draw.noise(), **settings)


def _run_native(
    cond: Tensor, uncond: Tensor | None, weight: Tensor, bias: Tensor, draw: Draw, settings: dict[str, float]
) -> tuple[Tensor, Tensor]:
    """PyTorch's product and the C++ loop over its logits, some rows at a time."""
    hidden, weight, bias = cond.float(), weight.float(), bias.float()
    if uncond is not None:
        hidden = hidden + settings["guidance"] * (hidden - uncond.float())
    ids, confidence = empty_choice(hidden)
    block = max(1, NATIVE_LOGITS // weight.shape[0])
    for start in range(0, len(hidden), block):
        rows = slice(start, start + block)
        logits = reference.head(hidden[rows], weight, bias)
        ids[rows], confidence[rows] = native_from_logits(logits, None, draw.rows(start, start + block), settings)
    return ids, confidence


def _run_triton(
    cond: Tensor, uncond: Tensor | None, weight: Tensor, bias: Tensor, draw: Draw, settings: dict[str, float]
) -> tuple[Tensor, Tensor]:
    from dcar_fast.kernels.sample_tokens import sample_tokens as kernel  # triton is loaded on use only

    tensors = map(for_kernels, (cond, uncond, weight, bias))
    with current(cond.device):
        return kernel(*tensors, **draw._asdict(), **settings)


register(
    "sample_tokens",
    Backend("triton", _run_triton, triton_usable, launches=3),
    Backend("native", _run_native, _native.cpu_usable),
    Backend("reference", _run_reference, everywhere),
)

"""What holds for every op alike: autocast changes nothing, nonsense is refused by name, odd memory is read right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dcar_fast import ops
from dcar_fast.models.diffusion_head import DiffusionHead
from dcar_fast.noise import ConfidenceNoise, LatentNoise, TokenNoise
from dcar_fast.reference.diffusion import diffusion_schedule

CPU = torch.device("cpu")


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def denoise(**options):
    torch.manual_seed(0)
    weights = ops.pack_head(DiffusionHead(4, 6, 32, 2))
    weights = weights._replace(output_weight=normals(8, 32), modulation_weight=normals(8 * 32, 32))
    schedule = diffusion_schedule(10)
    time, steps = ops.embed_timesteps(weights, schedule.timesteps), ops.step_coefficients(schedule, "cpu")
    modulation = ops.modulations(weights, ops.embed_condition(weights, normals(6, 6)), time[4])
    noise = LatentNoise(torch.arange(3), torch.arange(3), 0)
    settings = {"guidance": 2.0, "temperature": 1.0, "formula": "c+s(c-u)", "clip": True, **options}
    return lambda **how: ops.denoise_step(normals(3, 4), modulation, weights, steps[4], noise, **settings, **how)


def calls() -> dict[str, Callable[..., object]]:
    """Op name -> call that takes ``backend``."""
    noise = TokenNoise(torch.arange(5), torch.arange(5), 0)
    drawn = {"guidance": 3.0, "softmax_temperature": 1.1, "tau": 0.5, "noise": noise}
    placing = {"tau": 0.5, "noise": ConfidenceNoise(torch.arange(2), 0), "next_open": 3}
    images, ids = normals(2, 64, 6, 6), torch.randint(0, 9, (2, 4))
    found = {
        "add_residual": lambda **how: ops.add_residual(
            ids.view(2, 2, 2), normals(9, 5), normals(2, 4, 5), dtype=torch.float32, **how
        ),
        "bias_residual": lambda **how: ops.bias_residual(images, normals(64), residual=images, **how),
        "channel_norm": lambda **how: ops.channel_norm(images, normals(64), normals(64), **how),
        "cross_attention": lambda **how: ops.cross_attention(
            normals(2, 9, 2, 40), normals(2, 7, 2, 40), normals(2, 7, 2, 40), torch.tensor([7, 3]), **how
        ),
        "denoise_step": denoise(),
        "depthwise_gate": lambda **how: ops.depthwise_gate(images, normals(64, 1, 3, 3), normals(64), **how),
        "embed_tokens": lambda **how: ops.embed_tokens(ids, normals(9, 70), normals(4, 70), **how),
        "fused_linear": lambda **how: ops.fused_linear(
            normals(2, 9, 80), normals(2, 90, 80), normals(90), residual=normals(2, 9, 90), emit_moments=True, **how
        ),
        "gelu": lambda **how: ops.gelu(images, **how),
        "latent_noise": lambda **how: ops.latent_noise(torch.arange(3), torch.arange(3), 5, 1, initial=False, **how),
        "place_tokens": lambda **how: ops.place_tokens(
            torch.full((2, 4), 9), None, ids, normals(2, 4), torch.tensor([1, 2]), 9, **placing, **how
        ),
        "quantize_rows": lambda **how: ops.quantize_rows(normals(2, 9, 80), **how),
        "relu_linear_attention": lambda **how: ops.relu_linear_attention(normals(2, 96, 6, 6), **how),
        "remask": lambda **how: ops.remask(ids, normals(2, 4), torch.tensor([1, 2]), 9, **how),
        "sample_from_logits": lambda **how: ops.sample_from_logits(
            normals(5, 90), normals(5, 90, seed=1), **drawn, **how
        ),
        "sample_tokens": lambda **how: ops.sample_tokens(
            normals(5, 64), normals(5, 64, seed=1), normals(90, 64), normals(90), **drawn, **how
        ),
        "self_attention": lambda **how: ops.self_attention(normals(2, 9, 240), *(normals(80),) * 4, heads=2, **how),
        "upsample_shortcut": lambda **how: ops.upsample_shortcut(images, normals(2, 32, 6, 6), **how),
        "vq_lookup": lambda **how: ops.vq_lookup(normals(30, 8), normals(90, 8), **how),
    }
    assert set(found) == set(ops.report("cpu"))
    return found


CALLS = calls()


def flat(result: object) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("op", CALLS)
def test_autocast_changes_nothing(op: str) -> None:
    for backend, usable in ops.report("cpu")[op].items():
        if not usable.ok:
            continue
        want = flat(CALLS[op](backend=backend))
        with torch.autocast("cpu", torch.bfloat16):
            got = flat(CALLS[op](backend=backend))
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True)), backend


def test_autocast_does_not_change_gradients() -> None:
    inputs = [normals(2, 9, 2, 40, seed=i).requires_grad_() for i in range(3)]

    def gradients() -> tuple[Tensor, ...]:
        out = ops.cross_attention(*inputs, torch.tensor([9, 4]))
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    want = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients()
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("backend", [3, [], torch.float32, b"native"])
def test_a_backend_is_a_name(op: str, backend: object) -> None:
    with pytest.raises(ValueError, match="backend is .*, allowed are None and a backend's name"):
        CALLS[op](backend=backend)


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), "1", None, 1j, True])
def test_settings_are_finite_numbers(value: object) -> None:
    noise = TokenNoise(torch.arange(2), torch.arange(2), 0)
    settings = {"guidance": 1.0, "softmax_temperature": 1.0, "tau": 1.0, "noise": noise}
    for name in ("guidance", "softmax_temperature", "tau"):
        with pytest.raises(ValueError, match=f"{name} is .*, allowed is a finite number"):
            ops.sample_from_logits(normals(2, 5), None, **{**settings, name: value})
    for name in ("guidance", "temperature"):
        with pytest.raises(ValueError, match=f"{name} is .*, allowed is a finite number"):
            denoise(**{name: value})()
    with pytest.raises(ValueError, match="eps is .*, allowed is a finite number >= 0"):
        ops.channel_norm(normals(1, 3, 2, 2), normals(3), normals(3), eps=value)
    with pytest.raises(ValueError, match="eps is .*, allowed is a finite number >= 0"):
        ops.self_attention(normals(1, 2, 12), *(normals(4),) * 4, heads=2, eps=value)


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="z is torch.sparse_coo, allowed is torch.strided"):
        ops.vq_lookup(normals(3, 4).to_sparse(), normals(5, 4))


def shifted(x: Tensor) -> Tensor:
    """The same numbers, starting one byte after where they should."""
    raw = np.zeros(x.numel() * x.element_size() + 1, np.uint8)
    raw[1:] = np.frombuffer(x.contiguous().numpy().tobytes(), np.uint8)
    return torch.from_numpy(np.ndarray(x.shape, x.numpy().dtype, raw.data, 1))


def test_misaligned_memory_is_read_right() -> None:
    z, codebook, ids, confidence = normals(30, 8), normals(90, 8), torch.randint(0, 90, (2, 15)), normals(2, 15)
    assert shifted(z).data_ptr() % 4
    for got, want in zip(ops.vq_lookup(shifted(z), shifted(codebook)), ops.vq_lookup(z, codebook), strict=True):
        assert torch.equal(got, want)
    counts = torch.tensor([3, 9])
    want = ops.remask(ids, confidence, counts, 90)
    assert torch.equal(ops.remask(shifted(ids), shifted(confidence), shifted(counts), 90), want)
    open_ids, order = torch.full((2, 15), 90), confidence.argsort(1)
    placing = {"tau": 0.5, "next_open": 9}
    for got, want in zip(
        ops.place_tokens(
            *map(shifted, (open_ids, order, ids, confidence, counts)),
            90,
            noise=shifted(confidence.sigmoid()),
            **placing,
        ),
        ops.place_tokens(open_ids, order, ids, confidence, counts, 90, noise=confidence.sigmoid(), **placing),
        strict=True,
    ):
        assert torch.equal(got, want)
    tokens, residual = ids.view(2, 3, 5), normals(2, 15, 8)
    got = ops.add_residual(shifted(tokens), shifted(codebook), shifted(residual), dtype=torch.float32)
    assert torch.equal(got, ops.add_residual(tokens, codebook, residual, dtype=torch.float32))
    settings = {"guidance": 0.0, "softmax_temperature": 1.0, "tau": 1.0}
    noise, moved = (TokenNoise(f(torch.arange(30)), f(torch.arange(30)), 1) for f in (lambda x: x, shifted))
    for got, want in zip(
        ops.sample_from_logits(shifted(z), None, noise=moved, **settings),
        ops.sample_from_logits(z, None, noise=noise, **settings),
        strict=True,
    ):
        assert torch.equal(got, want)
    assert torch.equal(ops.gelu(shifted(z)), ops.gelu(z))
    rows = torch.arange(30)
    got = ops.latent_noise(shifted(rows), shifted(rows), 6, 1, initial=True)
    assert torch.equal(got, ops.latent_noise(rows, rows, 6, 1, initial=True))


def test_noise_objects_compare_as_themselves() -> None:
    for kind in (TokenNoise, LatentNoise):
        noise, other = (kind(torch.arange(2), torch.arange(2), 0) for _ in range(2))
        assert noise == noise and noise != other and len({noise, other}) == 2
    noise, other = (ConfidenceNoise(torch.arange(2), 0) for _ in range(2))
    assert noise == noise and noise != other and len({noise, other}) == 2

"""Every implementation of cross_attention against float64: values, gradients, ignored keys, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dcar_fast.ops import cross_attention
from dcar_fast.reference.cross_attention import cross_attention as reference
from tests.ops.sampling_cases import normals
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")

LOW = [torch.float32, torch.float16, torch.bfloat16]
HERE = ["reference", None]
GPU = ["reference", "triton", None]
# keys and head size: around blocks of 64 keys, and head sizes with and without a second part
SHAPES = [(1, 72), (63, 32), (64, 64), (65, 72), (300, 80), (300, 128), (7, 5), (2, 1)]


def data(keys: int, head: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and lengths of four rows: all keys, half of them, one, none. What is to be ignored is NaN or infinite."""
    q = normals(4, 9, 3, head, dtype=dtype)
    k, v = (normals(4, keys, 3, head, seed=seed, dtype=dtype) for seed in (1, 2))
    lengths = torch.tensor([keys, (keys + 1) // 2, 1, 0])
    for row, length in enumerate(lengths.tolist()):
        k[row, length:], v[row, length:] = math.nan, math.inf
    return q, k, v, lengths


def spelled_out(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """One row and head at a time, without a mask."""
    out = torch.zeros_like(q)
    for row, length in enumerate(lengths.tolist()):
        for head in range(q.shape[2] if length else 0):
            scores = q[row, :, head] @ k[row, :length, head].T / math.sqrt(q.shape[3])
            out[row, :, head] = scores.softmax(dim=-1) @ v[row, :length, head]
    return out


def check(got: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    """``got`` against float64, no worse than twice the formula in float32, rounded to the type of ``got``."""
    truth = spelled_out(q.double(), k.double(), v.double(), lengths)
    plain = spelled_out(q.float(), k.float(), v.float(), lengths).to(q.dtype)
    check_close(got, plain, truth, str(q.dtype))
    assert got.is_contiguous()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("keys, head", SHAPES)
def test_float64_agrees(keys: int, head: int, dtype: torch.dtype, backend: str | None) -> None:
    arguments = data(keys, head, dtype)
    out = cross_attention(*arguments, backend=backend)
    check(out, *arguments)
    assert (out[3] == 0).all() and torch.equal(out[2], arguments[2][2, :1].expand_as(out[2]))  # no key, one key


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("keys, head", SHAPES)
def test_float64_agrees_on_a_gpu(keys: int, head: int, dtype: torch.dtype, backend: str | None) -> None:
    arguments = data(keys, head, dtype)
    out = cross_attention(*(x.cuda() for x in arguments), backend=backend)
    check(out.cpu(), *arguments)
    assert torch.equal(out, cross_attention(*(x.cuda() for x in arguments), backend=backend))


@pytest.mark.parametrize("backend", HERE)
def test_float64_stays_float64(backend: str | None) -> None:
    q, k, v, lengths = data(65, 72, torch.float64)
    out = cross_attention(q, k, v, lengths, backend=backend)
    assert out.dtype == torch.float64
    assert (out - spelled_out(q, k, v, lengths)).abs().max() < 1e-14


def check_gradients(arguments: tuple[Tensor, ...], backend: str | None, device: str) -> None:
    """Gradients against autograd through the formula row by row in float64, and no worse than that in float32."""
    *tensors, lengths = arguments
    grad = normals(*tensors[0].shape, seed=5, dtype=tensors[0].dtype)

    def gradients(call, dtype: torch.dtype, place: str) -> tuple[Tensor, ...]:
        inputs = [x.detach().to(place, dtype).requires_grad_() for x in tensors]
        return torch.autograd.grad(call(*inputs, lengths.to(place)), inputs, grad.to(place, dtype))

    found = gradients(lambda *x: cross_attention(*x, backend=backend), grad.dtype, device)
    plain = gradients(spelled_out, torch.promote_types(grad.dtype, torch.float32), "cpu")
    for name, got, near, truth in zip("qkv", found, plain, gradients(spelled_out, torch.float64, "cpu"), strict=True):
        check_close(got.cpu(), near.to(got.dtype), truth, f"gradient of {name}")
    for row, length in enumerate(lengths.tolist()):
        assert all((x[row, length:] == 0).all() for x in found[1:]), "ignored keys have a gradient"
    assert (found[0][3] == 0).all()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("keys, head", [(1, 5), (65, 72)])
def test_gradients(keys: int, head: int, dtype: torch.dtype, backend: str | None) -> None:
    check_gradients(data(keys, head, dtype), backend, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("keys, head", [(1, 5), (65, 72), (300, 72)])
def test_gradients_on_a_gpu(keys: int, head: int, dtype: torch.dtype, backend: str | None) -> None:
    check_gradients(data(keys, head, dtype), backend, "cuda")


def test_gradcheck() -> None:
    q, k, v = (normals(2, size, 2, 3, seed=size, dtype=torch.float64).requires_grad_() for size in (4, 5, 5))
    lengths = torch.tensor([3, 5])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cross_attention(q, k, v, lengths, backend="reference")

    assert torch.autograd.gradcheck(call, (q, k, v))
    assert torch.autograd.gradgradcheck(call, (q, k, v))


@pytest.mark.parametrize("backend", HERE)
def test_strides_do_not_matter(backend: str | None) -> None:
    q, k, v, lengths = data(17, 8)
    want = cross_attention(q, k, v, lengths, backend=backend)

    def inside_out(x: Tensor) -> Tensor:
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)

    kv = torch.stack([k, v], dim=2)  # (B, T, 2, H, d), as one projection gives them
    every_other = torch.stack([lengths, lengths + 1], dim=1)[:, 0]
    assert torch.equal(want, cross_attention(inside_out(q), inside_out(k), inside_out(v), every_other, backend=backend))
    assert torch.equal(want, cross_attention(q, kv[:, :, 0], kv[:, :, 1], lengths, backend=backend))
    shared = cross_attention(q[:1], k[:1], v[:1], lengths[:1], backend=backend)
    expanded = (x[:1].expand(4, -1, -1, -1) for x in (q, k, v))
    assert torch.equal(shared.expand(4, -1, -1, -1), cross_attention(*expanded, lengths[:1].expand(4), backend=backend))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("batch, queries, keys, heads", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0)])
def test_empty(batch: int, queries: int, keys: int, heads: int, backend: str | None) -> None:
    q, k = torch.ones(batch, queries, heads, 8), torch.ones(batch, keys, heads, 8)
    inputs = [q.requires_grad_(), k.requires_grad_(), k.clone()]
    out = cross_attention(*inputs, torch.full((batch,), keys), backend=backend)
    assert out.shape == q.shape and (out == (0.0 if keys == 0 else 1.0)).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), inputs[:2]))


@pytest.mark.parametrize("backend", HERE)
def test_nan_and_infinity_that_are_not_ignored(backend: str | None) -> None:
    q, k, v, lengths = data(9, 8)
    q[0, 2, 1, 3], v[1, 0, 0, 5], k[2, 0, 2, 7] = math.nan, math.inf, math.inf
    check(cross_attention(q, k, v, lengths, backend=backend), q, k, v, lengths)


@pytest.mark.parametrize("backend", HERE)
def test_float16_does_not_overflow(backend: str | None) -> None:
    """Products of 72 numbers of 200, far beyond 65504, and values at the end of the range."""
    q, k, v, lengths = data(20, 72, torch.float16)
    q, k, v = q * 200, k * 200, v.sign() * 65504
    check(cross_attention(q, k, v, lengths, backend=backend), q, k, v, lengths)


@pytest.mark.parametrize("backend", HERE)
def test_many_rows(backend: str | None) -> None:
    q, k, v = (normals(65_537, 1, 1, 2, seed=seed) for seed in range(3))
    out = cross_attention(q, k, v, torch.ones(65_537, dtype=torch.int64), backend=backend)
    assert torch.equal(out, v)  # one key


def test_opcheck() -> None:
    q, k, v, lengths = data(5, 3)
    inputs = [x.nan_to_num(posinf=0.0).requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.dcar_fast.cross_attention.default, (*inputs, lengths, None))


def test_compiles_as_one_graph_and_exports() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
            return cross_attention(q * 2, k, v, lengths) + 1

    arguments = data(6, 4)
    want = spelled_out(arguments[0] * 2, *arguments[1:]) + 1
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Attention(), arguments)
    for call in (compiled, exported.module()):
        assert (call(*arguments) - want).abs().max() < 1e-6
    nodes = [node.target for node in exported.graph.nodes]
    assert torch.ops.dcar_fast.cross_attention.default in nodes


Q, K = torch.zeros(2, 3, 2, 8), torch.zeros(2, 5, 2, 8)
LENGTHS = torch.tensor([5, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q.long()}, "q is torch.int64, allowed are torch.float32, torch.float16, torch.bfloat16, torch.float64"),
        ({"q": Q.to(torch.float8_e5m2)}, "q is torch.float8_e5m2, allowed are"),
        ({"q": Q[0]}, r"q has shape \(3, 2, 8\), allowed is \(B, N, H, d\)"),
        ({"q": Q[..., :0], "k": K[..., :0], "v": K[..., :0]}, r"q has shape \(2, 3, 2, 0\), allowed is a head size"),
        ({"k": K[..., :4]}, r"k has shape \(2, 5, 2, 4\), allowed is \(2, T, 2, 8\)"),
        ({"k": K.half()}, "k is torch.float16, allowed is the type of q, torch.float32"),
        ({"k": K.to("meta")}, "k is on meta, allowed is the device of q, cpu"),
        ({"v": K[:, 1:]}, r"v has shape \(2, 4, 2, 8\), allowed is \(2, 5, 2, 8\)"),
        ({"v": K.double()}, "v is torch.float64, allowed is the type of q, torch.float32"),
        ({"lengths": LENGTHS + 1}, r"lengths has values in 2..6, allowed are 0..5"),
        ({"lengths": LENGTHS - 2}, r"lengths has values in -1..3, allowed are 0..5"),
        ({"lengths": LENGTHS.float()}, "lengths is torch.float32, allowed is torch.int64"),
        ({"lengths": LENGTHS[:1]}, r"lengths has shape \(1,\), allowed is \(2\)"),
        ({"lengths": LENGTHS.to("meta")}, "lengths is on meta, allowed is the device of q, cpu"),
        (
            {"backend": "triton"},
            "backend is 'triton', which cannot run cross_attention on cpu: Triton kernels run on CUDA",
        ),
        ({"backend": "native"}, "cross_attention has no native implementation"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_attention(**{"q": Q, "k": K, "v": K, "lengths": LENGTHS, **change})


@pytest.mark.gpu
def test_kernel_reads_no_keys_beyond_the_tensor() -> None:
    """The host does not look at lengths on a GPU."""
    q, k, v = (normals(2, 70, 2, 72, seed=seed).cuda() for seed in range(3))
    out = cross_attention(q, k, v, torch.tensor([10**12, -5]).cuda(), backend="triton")
    check(out[:1].cpu(), *(x[:1].cpu() for x in (q, k, v)), torch.tensor([70]))
    assert (out[1] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("images", [2, 32])
@pytest.mark.parametrize("keys", [64, 300])
def test_full_size_on_a_gpu(images: int, keys: int, dtype: torch.dtype) -> None:
    q = normals(images, 256, 16, 72, dtype=dtype)
    k, v = (normals(images, keys, 16, 72, seed=seed, dtype=dtype) for seed in (1, 2))
    lengths = torch.arange(images) * keys // (images - 1)
    out = cross_attention(*(x.cuda() for x in (q, k, v, lengths)), backend="triton")
    plain, truth = reference(q, k, v, lengths), reference(q.double(), k.double(), v.double(), lengths)
    check_close(out.cpu(), plain.contiguous(), truth, str(dtype))

"""Every implementation of self_attention against float64 and against the model's own module; gradients, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.models.transformer import SelfAttention
from dcar_fast.ops import self_attention
from dcar_fast.ops._dispatch import _ops, launches
from dcar_fast.reference._moments import row_moments
from dcar_fast.reference.self_attention import self_attention as reference
from tests.ops.sampling_cases import normals
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")

LOW = [torch.float32, torch.float16, torch.bfloat16]
HERE = ["reference", None]
GPU = ["reference", "triton", None]
NAMES = ("qkv", "q_weight", "q_bias", "k_weight", "k_bias")
EPS = 1e-5
# tokens, heads, head size
SHAPES = [(1, 1, 1), (1, 3, 72), (63, 2, 32), (64, 2, 64), (65, 16, 72), (100, 2, 128), (7, 3, 5), (33, 2, 80)]


def data(tokens: int, heads: int, head: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """qkv of two images, with a mean that is not zero, and the weights and biases."""
    width = heads * head
    qkv = (normals(2, tokens, 3 * width) * 1.5 + 0.7).to(dtype)
    return qkv, *(normals(width, seed=seed, dtype=dtype) for seed in (1, 2, 3, 4))


def spelled_out(
    qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, heads: int, eps: float = EPS
) -> Tensor:
    """One image and head at a time."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight + bias

    width = qkv.shape[2] // 3
    q, k, v = (
        norm(qkv[..., :width], q_weight, q_bias),
        norm(qkv[..., width:-width], k_weight, k_bias),
        qkv[..., -width:],
    )
    head = width // heads
    images = [
        torch.cat(
            [
                (q[b, :, at : at + head] @ k[b, :, at : at + head].T / math.sqrt(head)).softmax(-1)
                @ v[b, :, at : at + head]
                for at in range(0, width, head)
            ],
            dim=-1,
        )
        for b in range(len(qkv))
    ]
    return torch.stack(images)


def check(got: Tensor, inputs: tuple[Tensor, ...], heads: int) -> None:
    """``got`` against float64, no worse than twice the formula in float32, rounded to the type of ``got``."""
    truth = spelled_out(*(x.double() for x in inputs), heads)
    plain = spelled_out(*(x.float() for x in inputs), heads).to(got.dtype)
    check_close(got, plain, truth, str(got.dtype))
    assert got.is_contiguous()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("tokens, heads, head", SHAPES)
def test_float64_agrees(tokens: int, heads: int, head: int, dtype: torch.dtype, backend: str | None) -> None:
    inputs = data(tokens, heads, head, dtype)
    check(self_attention(*inputs, heads=heads, backend=backend), inputs, heads)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("tokens, heads, head", [*SHAPES, (256, 16, 72), (1024, 16, 72)])
def test_float64_agrees_on_a_gpu(tokens: int, heads: int, head: int, dtype: torch.dtype, backend: str | None) -> None:
    inputs = data(tokens, heads, head, dtype)
    on_gpu = [x.cuda() for x in inputs]
    out = self_attention(*on_gpu, heads=heads, backend=backend)
    check(out.cpu(), inputs, heads)
    assert torch.equal(out, self_attention(*on_gpu, heads=heads, backend=backend))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("tokens, heads, head", [(1, 1, 64), (65, 4, 48)])
def test_statistics_from_moments(tokens: int, heads: int, head: int, dtype: torch.dtype, backend: str | None) -> None:
    inputs = data(tokens, heads, head, dtype)
    check(self_attention(*inputs, heads=heads, moments=row_moments(inputs[0]), backend=backend), inputs, heads)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("tokens, heads, head", [(1, 1, 64), (65, 4, 48), (256, 16, 72), (1000, 16, 72)])
def test_statistics_from_moments_on_a_gpu(tokens: int, heads: int, head: int, dtype: torch.dtype) -> None:
    inputs = data(tokens, heads, head, dtype)
    on_gpu, moments = [x.cuda() for x in inputs], row_moments(inputs[0]).cuda()
    out = self_attention(*on_gpu, heads=heads, moments=moments, backend="triton")
    check(out.cpu(), inputs, heads)
    assert torch.equal(out, self_attention(*on_gpu, heads=heads, moments=moments, backend="triton"))


def test_the_given_moments_are_what_is_used() -> None:
    """Those of q and of k; those of v are not read."""
    inputs = data(9, 2, 32)
    moments = row_moments(inputs[0])
    want = self_attention(*inputs, heads=2, moments=moments)
    for part, matters in enumerate((True, True, False)):
        others = moments.clone()
        others[:, ::2, part, 1] *= 4
        assert torch.equal(self_attention(*inputs, heads=2, moments=others), want) != matters


def test_moments_change_no_gradient() -> None:
    inputs = [x.requires_grad_() for x in data(9, 2, 32, torch.float64)]
    moments = row_moments(inputs[0].detach())
    got, want = (
        torch.autograd.grad(self_attention(*inputs, heads=2, moments=m).square().sum(), inputs) for m in (moments, None)
    )
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() < 1e-12 * max(1.0, other.abs().max().item())


def test_float64_stays_float64() -> None:
    inputs = data(65, 3, 24, torch.float64)
    out = self_attention(*inputs, heads=3)
    assert out.dtype == torch.float64
    assert (out - spelled_out(*inputs, 3)).abs().max() < 1e-13


def test_is_what_the_model_computes() -> None:
    module = SelfAttention(48, 4, qk_norm=True).double()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = normals(*parameter.shape, seed=seed, dtype=torch.float64)
    x = normals(3, 10, 48, seed=9, dtype=torch.float64)
    norms = module.q_norm, module.k_norm
    weights = [parameter for norm in norms for parameter in (norm.weight, norm.bias)]
    got = module.proj(self_attention(module.qkv(x), *weights, heads=4, eps=module.q_norm.eps))
    assert (got - module(x)).abs().max() < 1e-11 * module(x).abs().max()


def check_gradients(inputs: tuple[Tensor, ...], heads: int, backend: str | None, device: str) -> None:
    """Gradients against autograd through the formula head by head in float64, and no worse than that in float32."""
    grad = normals(*inputs[0].shape[:2], inputs[0].shape[2] // 3, seed=5, dtype=inputs[0].dtype)

    def gradients(call, dtype: torch.dtype, place: str) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(place, dtype).requires_grad_() for x in inputs]
        return torch.autograd.grad(call(*leaves), leaves, grad.to(place, dtype))

    found = gradients(lambda *x: self_attention(*x, heads=heads, backend=backend), grad.dtype, device)
    plain = gradients(lambda *x: spelled_out(*x, heads), torch.float32, "cpu")
    exact = gradients(lambda *x: spelled_out(*x, heads), torch.float64, "cpu")
    found = [x.cpu() for x in found]
    check_close(found[0], plain[0].to(grad.dtype), exact[0], "gradient of qkv")
    # of the weights together: one by one they are too few numbers for their largest error to be worth comparing
    weights, near, truth = (torch.cat(x[1:4]) for x in (found, plain, exact))
    check_close(weights, near.to(grad.dtype), truth, "gradient of the weights")
    # that of k_bias is zero: what there is of it is rounding, of terms as large as those of q_bias
    assert found[4].abs().max() <= 1e-5 * exact[2].abs().max()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("tokens, heads, head", [(2, 1, 5), (65, 3, 24)])
def test_gradients(tokens: int, heads: int, head: int, dtype: torch.dtype, backend: str | None) -> None:
    check_gradients(data(tokens, heads, head, dtype), heads, backend, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("tokens, heads, head", [(2, 1, 5), (65, 3, 24), (256, 16, 72)])
def test_gradients_on_a_gpu(tokens: int, heads: int, head: int, dtype: torch.dtype, backend: str | None) -> None:
    check_gradients(data(tokens, heads, head, dtype), heads, backend, "cuda")


def test_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in data(3, 2, 3, torch.float64)]

    def call(*inputs: Tensor) -> Tensor:
        return self_attention(*inputs, heads=2, backend="reference")

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("backend", HERE)
def test_weights_may_be_wider(backend: str | None) -> None:
    """As under autocast: the gradients come in each tensor's own type."""
    inputs = data(9, 2, 8, torch.bfloat16)
    inputs = (inputs[0], inputs[1].float(), inputs[2].double(), *inputs[3:])
    leaves = [x.requires_grad_() for x in inputs]
    out = self_attention(*leaves, heads=2, backend=backend)
    check(out.detach(), tuple(x.detach() for x in inputs), 2)
    out.float().sum().backward()
    assert [x.grad.dtype for x in leaves] == [x.dtype for x in inputs]


@pytest.mark.parametrize("backend", HERE)
def test_strides_do_not_matter(backend: str | None) -> None:
    qkv, *weights = data(11, 2, 8)
    want = self_attention(qkv, *weights, heads=2, backend=backend)
    wide = [torch.stack([x, x], dim=-1)[..., 0] for x in weights]
    for strided in (
        qkv.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        qkv.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert torch.equal(want, self_attention(strided, *wide, heads=2, backend=backend))
    expanded = qkv[:1].expand(3, -1, -1)
    want = self_attention(expanded.contiguous(), *weights, heads=2, backend=backend)
    assert torch.equal(want, self_attention(expanded, *weights, heads=2, backend=backend))


@pytest.mark.parametrize("backend", HERE)
def test_empty(backend: str | None) -> None:
    for images, tokens in ((0, 3), (2, 0)):
        qkv = torch.ones(images, tokens, 24, requires_grad=True)
        out = self_attention(qkv, *(torch.ones(8) for _ in range(4)), heads=2, backend=backend)
        assert out.shape == (images, tokens, 8)
        assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


@pytest.mark.parametrize("backend", HERE)
def test_nan_and_infinity_go_where_the_formula_takes_them(backend: str | None) -> None:
    qkv, *weights = data(6, 2, 4)
    qkv = torch.cat([qkv, qkv, qkv])
    qkv[0, 2, 3], qkv[1, 1, 8 + 1], qkv[2, 4, 16 + 5] = math.nan, math.inf, -math.inf  # in a query, a key, a value
    inputs = (qkv, *weights)
    out = self_attention(*inputs, heads=2, backend=backend)
    check(out, inputs, 2)
    assert out[0].isnan().any(dim=1).tolist() == [False, False, True, False, False, False] and out[1].isnan().all()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_rows_without_variance(eps: float, backend: str | None) -> None:
    qkv, *weights = data(5, 2, 4)
    qkv[:, 1] = 3.0
    got = self_attention(qkv, *weights, heads=2, eps=eps, backend=backend)
    wide = [x.double() for x in (qkv, *weights)]
    check_close(got, spelled_out(qkv, *weights, 2, eps), spelled_out(*wide, 2, eps))


@pytest.mark.parametrize("backend", HERE)
def test_float16_near_overflow(backend: str | None) -> None:
    qkv, *weights = data(20, 2, 72, torch.float16)
    inputs = ((qkv.clamp(-4, 4) * 16000).clamp(-65504, 65504), *weights)
    check(self_attention(*inputs, heads=2, backend=backend), inputs, 2)


def test_many_rows() -> None:
    qkv, *weights = normals(65_537, 1, 6), *(torch.ones(2) for _ in range(4))
    assert torch.equal(self_attention(qkv, *weights, heads=1), qkv[:, :, 4:])  # one token attends to itself


def test_opcheck() -> None:
    inputs = [x.requires_grad_() for x in data(5, 2, 3)]
    torch.library.opcheck(torch.ops.dcar_fast.self_attention.default, (*inputs, 2, EPS, None, None))
    inputs = data(5, 2, 32)
    moments = row_moments(inputs[0])
    torch.library.opcheck(torch.ops.dcar_fast.self_attention.default, (*inputs, 2, EPS, moments, None))


def test_compiles_as_one_graph_and_exports() -> None:
    class Attention(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return self_attention(*inputs, heads=2) + 1

    inputs = data(6, 2, 4)
    want = spelled_out(*inputs, 2) + 1
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Attention(), inputs)
    for call in (compiled, exported.module()):
        assert (call(*inputs) - want).abs().max() < 2e-6
    assert torch.ops.dcar_fast.self_attention.default in [node.target for node in exported.graph.nodes]


def test_launches_are_declared() -> None:
    inputs = data(5, 2, 32)
    assert launches("self_attention", *inputs, 2, EPS, None, None) == 2
    assert launches("self_attention", *inputs, 2, EPS, row_moments(inputs[0]), None) == 1
    assert {b.name: b.launches for b in _ops["cross_attention"]} == {"triton": 1, "reference": None}


QKV, WEIGHT = torch.zeros(2, 3, 24), torch.ones(8)
WIDE, MOMENTS = {"qkv": torch.zeros(2, 3, 192)} | dict.fromkeys(NAMES[1:], torch.ones(64)), torch.zeros(2, 3, 3, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moments": MOMENTS}, "moments is given, allowed is None unless D, 8, is a multiple of 64"),
        ({**WIDE, "moments": MOMENTS[:1]}, r"moments has shape \(1, 3, 3, 2\), allowed is \(2, 3, 3, 2\)"),
        ({**WIDE, "moments": MOMENTS.half()}, "moments is torch.float16, allowed is torch.float32"),
        ({"qkv": QKV[0]}, r"qkv has shape \(3, 24\), allowed is \(B, N, 3D\)"),
        ({"qkv": QKV.long()}, "qkv is torch.int64, allowed are torch.float32"),
        ({"qkv": QKV[..., :23]}, r"qkv has shape \(2, 3, 23\), allowed is \(B, N, 3D\) with D a multiple of heads, 2"),
        ({"qkv": QKV[..., :0]}, r"qkv has shape \(2, 3, 0\)"),
        ({"heads": 3}, "with D a multiple of heads, 3"),
        ({"heads": 0}, "heads is 0, allowed are integers of at least 1"),
        ({"heads": 2.0}, "heads is 2.0, allowed are integers"),
        ({"eps": -1e-5}, "eps is -1e-05, allowed is a finite number >= 0"),
        ({"eps": math.nan}, "eps is nan"),
        ({"q_weight": WEIGHT[:7]}, r"q_weight has shape \(7,\), allowed is \(8\)"),
        ({"q_bias": WEIGHT.int()}, "q_bias is torch.int32, allowed are floating-point types"),
        ({"k_weight": WEIGHT.to("meta")}, "k_weight is on meta, allowed is the device of qkv, cpu"),
        ({"k_bias": None}, r"k_bias is a NoneType, allowed is a tensor \(8\)"),
        ({"backend": "triton"}, "backend is 'triton', which cannot run self_attention on cpu: Triton"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    arguments = {"qkv": QKV, "heads": 2, **dict.fromkeys(NAMES[1:], WEIGHT)}
    with pytest.raises(ValueError, match=message):
        self_attention(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_full_size_on_a_gpu(dtype: torch.dtype, shift: float) -> None:
    """Also far from a mean of zero, which the kernel takes off the scores in 16-bit types."""
    qkv, *weights = data(256, 16, 72, dtype)
    inputs = ((qkv.float() + shift).to(dtype), *weights)
    out = self_attention(*(x.cuda() for x in inputs), heads=16, backend="triton").cpu()
    plain, truth = reference(*inputs, heads=16), reference(*(x.double() for x in inputs), heads=16)
    check_close(out, plain, truth, str(dtype))


def test_reference_normalises_as_pytorch_does() -> None:
    qkv, *weights = data(4, 1, 6, torch.float64)
    q, k, v = qkv.chunk(3, dim=-1)
    q, k = F.layer_norm(q, (6,), *weights[:2]), F.layer_norm(k, (6,), *weights[2:])
    want = F.scaled_dot_product_attention(q, k, v)
    assert (reference(qkv, *weights, heads=1) - want).abs().max() < 1e-13

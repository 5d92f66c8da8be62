"""BatchNorm over two processes against torch's on the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dcar_fast.training.sync_batch_norm import SyncBatchNorm2d, convert_batch_norm
from tests.training.two_processes import in_two_processes

# (rows of the first process, of the second), momentum, affine
CASES = [((2, 2), 0.1, True), ((1, 4), 0.3, False), ((3, 1), None, True)]


def whole(rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Input, far from zero so that sums of squares would lose digits, and a gradient."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(sum(rows), 3, 2, 5, generator=generator) * torch.tensor([1.0, 0.01, 30.0]).view(1, 3, 1, 1) + 50
    return x, torch.randn(x.shape, generator=generator)


def norm(momentum: float | None, affine: bool) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(3, momentum=momentum, affine=affine)
    if affine:
        made.weight.data.copy_(torch.tensor([0.5, -2.0, 1.0]))
        made.bias.data.copy_(torch.tensor([1.0, 0.0, -3.0]))
    return made


def passes(model: nn.BatchNorm2d, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Two steps in training mode, one in eval mode."""
    x = x.clone().requires_grad_()
    first = model(x)
    first.backward(gradient)
    model(x.detach() * 2 + 1)
    found = {"y": first.detach(), "dx": x.grad, "eval": model.eval()(x).detach()}
    found |= {f"d{name}": parameter.grad for name, parameter in model.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def shares() -> list[dict[str, Tensor]]:
    """What one process makes of its rows, for each of the cases."""
    rank, found = torch.distributed.get_rank(), []
    for rows, momentum, affine in CASES:
        x, gradient = (tensor.split(rows)[rank] for tensor in whole(rows))
        found.append(passes(convert_batch_norm(nn.Sequential(norm(momentum, affine)))[0], x, gradient))
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[list[dict[str, Tensor]]]:
    return in_two_processes(shares, tmp_path_factory.mktemp("shares"))


@pytest.mark.parametrize("case", range(len(CASES)))
def test_two_processes_are_one_batch(both, case):
    rows, momentum, affine = CASES[case]
    truth = passes(norm(momentum, affine).double(), *(tensor.double() for tensor in whole(rows)))
    plain = passes(norm(momentum, affine), *whole(rows))
    first, second = both[0][case], both[1][case]
    for name, expected in truth.items():
        if name in ("y", "dx", "eval"):
            got = torch.cat([first[name], second[name]])
        elif name.startswith("d"):
            got = first[name] + second[name]  # a process has the gradient of its own rows, as DDP wants it
        else:
            got = first[name]
            assert torch.equal(got, second[name]), f"{name}: the processes disagree"
        error, baseline = ((value.double() - expected).abs().max() for value in (got, plain[name]))
        assert error <= 2 * baseline + 2**-21 * expected.abs().max(), name


def test_conversion_keeps_the_state():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(norm(0.1, True), nn.GroupNorm(1, 3)))
    before, weight = {k: v.clone() for k, v in model.state_dict().items()}, model[1][0].weight
    assert convert_batch_norm(model.eval()) is model
    assert type(model[1][0]) is SyncBatchNorm2d and type(model[1][1]) is nn.GroupNorm
    assert model[1][0].weight is weight and not model[1][0].training
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_one_process_is_torchs_own():
    x, gradient = whole((2, 2))
    found = passes(convert_batch_norm(nn.Sequential(norm(0.1, True)))[0], x, gradient)
    for name, expected in passes(norm(0.1, True), x, gradient).items():
        assert torch.equal(found[name], expected), name

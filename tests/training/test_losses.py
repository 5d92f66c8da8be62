"""The generator's training losses against recorded values and plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from dcar_fast.models.diffusion_head import DiffusionHead
from dcar_fast.training.losses import (
    diffusion_loss,
    discretized_log_likelihood,
    random_token_mask,
    token_loss,
    variational_bound,
)
from tests.golden_vectors import error, generator, vectors


def recorded_loss(**changes) -> torch.Tensor:
    recorded = vectors("generator")
    options = {"timesteps": recorded["train/timesteps"], "noise": recorded["train/noise"], "scale": 0.107}
    return diffusion_loss(
        generator().head, recorded["train/condition"], recorded["train/target"], **{**options, **changes}
    )


def test_recorded_diffusion_loss():
    expected = vectors("generator")["train/loss"]
    assert error(recorded_loss(), expected) < 1e-5 * max(1.0, expected.item())


def alpha_bars() -> list[float]:
    def curve(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    product, out = 1.0, []
    for i in range(1000):
        product *= 1 - min(1 - curve((i + 1) / 1000) / curve(i / 1000), 0.999)
        out.append(product)
    return out


BARS = alpha_bars()


def cdf(x: float) -> float:
    return (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def plain_likelihood(x: float, mean: float, log_std: float) -> float:
    upper, lower = (cdf((x - mean + side / 255) * math.exp(-log_std)) for side in (1, -1))
    mass = upper if x < -0.999 else 1 - lower if x > 0.999 else upper - lower
    return math.log(max(mass, 1e-12))


def posterior(t: int) -> tuple[float, float, float, float]:
    """beta, posterior variance, and the posterior mean's factors of x_0 and x_t."""
    now, before = BARS[t], BARS[t - 1] if t else 1.0
    beta = 1 - now / before
    from_x0 = beta * math.sqrt(before) / (1 - now)
    return beta, beta * (1 - before) / (1 - now), from_x0, (1 - before) * math.sqrt(1 - beta) / (1 - now)


def plain_bound(x0: float, x: float, epsilon: float, v: float, t: int) -> float:
    """One channel's term, in bits."""
    beta, _, from_x0, from_x = posterior(t)
    log_true = math.log(posterior(max(t, 1))[1])  # the first entry is log 0: the second takes its place
    f = (v + 1) / 2
    log_variance = f * math.log(beta) + (1 - f) * log_true
    predicted = (x - math.sqrt(1 - BARS[t]) * epsilon) / math.sqrt(BARS[t])
    true_mean, mean = from_x0 * x0 + from_x * x, from_x0 * predicted + from_x * x
    if t == 0:
        return -plain_likelihood(x0, mean, log_variance / 2) / math.log(2)
    kl = (log_variance - log_true + math.exp(log_true - log_variance) - 1) / 2
    return (kl + (true_mean - mean) ** 2 * math.exp(-log_variance) / 2) / math.log(2)


TIMES = [0, 0, 1, 2, 50, 499, 500, 998, 999]


def rows(seed: int = 0) -> tuple[torch.Tensor, ...]:
    made = torch.Generator().manual_seed(seed)
    x0, epsilon, variance, noise = (torch.randn(len(TIMES), 5, generator=made) for _ in range(4))
    times = torch.tensor(TIMES)
    bars = torch.tensor([BARS[t] for t in TIMES])[:, None]
    x = bars.sqrt() * x0 + (1 - bars).sqrt() * noise
    return x0, x, epsilon, variance, times


def test_variational_bound_in_python_floats():
    x0, x, epsilon, variance, times = rows()
    x0[0] = torch.tensor([-1.5, 1.5, 0.9985, -0.9985, 0.0])
    found = variational_bound(x0, x, epsilon, variance, times)
    assert found.shape == (len(TIMES),)
    for row, t in enumerate(TIMES):
        terms = zip(x0[row].tolist(), x[row].tolist(), epsilon[row].tolist(), variance[row].tolist(), strict=True)
        expected = sum(plain_bound(*term, t) for term in terms) / 5
        assert found[row].item() == pytest.approx(expected, rel=2e-3, abs=1e-4), t


def test_a_perfect_prediction_costs_nothing_after_the_first_step():
    x0, x, _, _, times = rows()
    bars = torch.tensor([BARS[t] for t in TIMES])[:, None]
    epsilon = (x - bars.sqrt() * x0) / (1 - bars).sqrt()
    found = variational_bound(x0, x, epsilon, torch.full_like(x, -1.0), times)
    assert found[times > 1].abs().max() < 1e-3
    assert (variational_bound(x0, x, epsilon, torch.full_like(x, 1.0), times)[times > 1] > 1e-5).any()


def test_discretised_likelihood():
    values = [-2.0, -0.9991, -0.999, -0.5, 0.0, 0.3, 0.999, 0.9991, 2.0]
    for mean in (-0.7, 0.0, 0.4):
        for log_std in (-4.0, -1.0, 0.5):
            x = torch.tensor(values, dtype=torch.float64)
            found = discretized_log_likelihood(x, torch.full_like(x, mean), torch.full_like(x, log_std))
            # +-0.999 themselves may fall on either side of the comparison in another precision
            expected = [plain_likelihood(v, mean, log_std) for v in values]
            assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    far = discretized_log_likelihood(torch.tensor([0.9]), torch.tensor([-0.9]), torch.tensor([-6.0]))
    assert far.item() == pytest.approx(math.log(1e-12), rel=1e-6)


def plain_diffusion_loss(head, hidden, residual, scale, multiplier, times, noise) -> float:
    flat, conditions = residual.flatten(0, 1) / scale, hidden.flatten(0, 1)
    total, count = 0.0, len(flat)
    for row, t in enumerate(times.tolist()):
        x0, z = flat[row % count].double(), noise[row].double()  # the whole batch is repeated, not each row
        x = math.sqrt(BARS[t]) * x0 + math.sqrt(1 - BARS[t]) * z
        with torch.no_grad():
            out = head(x.float()[None], torch.tensor([t]), conditions[row % count][None])[0].double()
        epsilon, v = out.chunk(2)
        mse = (epsilon - z).square().mean().item()
        terms = zip(x0.tolist(), x.tolist(), epsilon.tolist(), v.tolist(), strict=True)
        total += mse + sum(plain_bound(*term, t) for term in terms) / len(x0)
    return total / len(times)


@pytest.mark.parametrize("multiplier", [1, 3])
def test_diffusion_loss_in_python_floats(multiplier):
    made = torch.Generator().manual_seed(3)
    hidden, residual = torch.randn(2, 3, 48, generator=made), torch.randn(2, 3, 8, generator=made) * 0.107
    times = torch.tensor([0, 1, 7, 300, 777, 999] * multiplier)
    noise = torch.randn(6 * multiplier, 8, generator=made)
    found = diffusion_loss(
        generator().head, hidden, residual, scale=0.107, multiplier=multiplier, timesteps=times, noise=noise
    )
    expected = plain_diffusion_loss(generator().head, hidden, residual, 0.107, multiplier, times, noise)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected, rel=1e-4)


def test_the_bound_leaves_epsilon_alone():
    """Only mse(epsilon) trains epsilon: the bound sees it detached; the variance learns from the bound."""
    made = torch.Generator().manual_seed(1)
    outputs = torch.randn(6, 16, generator=made, requires_grad=True)

    class Fixed(DiffusionHead):
        def forward(self, x, timesteps, condition):
            return outputs

    hidden, residual = torch.randn(1, 6, 4, generator=made), torch.randn(1, 6, 8, generator=made) * 0.1
    noise, times = torch.randn(6, 8, generator=made), torch.tensor([0, 3, 50, 400, 800, 999])
    loss = diffusion_loss(Fixed(8, 4, 8, 1), hidden, residual, scale=0.1, multiplier=1, timesteps=times, noise=noise)
    (gradient,) = torch.autograd.grad(loss, outputs)
    expected = 2 * (outputs[:, :8].detach() - noise) / (6 * 8)
    assert error(gradient[:, :8], expected) < 1e-6
    assert gradient[:, 8:].isfinite().all() and (gradient[:, 8:].abs().sum(dim=1) > 0).all()


def test_the_loss_trains_head_and_trunk():
    recorded = vectors("generator")
    hidden = recorded["train/condition"].clone().requires_grad_(True)
    loss = diffusion_loss(
        generator().head,
        hidden,
        recorded["train/target"],
        scale=0.107,
        timesteps=recorded["train/timesteps"],
        noise=recorded["train/noise"],
    )
    gradients = torch.autograd.grad(loss, [hidden, *generator().head.parameters()])
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


def test_drawn_timesteps_and_noise_come_from_the_generator():
    hidden, residual = torch.randn(3, 5, 48), torch.randn(3, 5, 8)

    def loss(seed: int, **given) -> float:
        made = torch.Generator().manual_seed(seed)
        return diffusion_loss(generator().head, hidden, residual, scale=0.5, generator=made, **given).item()

    assert loss(1) == loss(1) != loss(2)
    made = torch.Generator().manual_seed(1)
    times = torch.randint(1000, (60,), generator=made)
    noise = torch.randn(60, 8, generator=made)
    assert loss(5, timesteps=times, noise=noise) == loss(6, timesteps=times, noise=noise)
    seen = []

    class Spy(DiffusionHead):
        def forward(self, x, timesteps, condition):
            seen.append((x, timesteps))
            return super().forward(x, timesteps, condition)

    made = torch.Generator().manual_seed(0)
    many = torch.zeros(50, 20, 4)
    diffusion_loss(Spy(8, 4, 8, 1), many, torch.zeros(50, 20, 8), scale=1.0, generator=made)
    x, times = seen[0]
    assert times.shape == (4000,) and times.min() == 0 and times.max() == 999
    histogram = times.bincount(minlength=1000).view(10, 100).sum(1).double()
    assert ((histogram - 400).square().sum() / 400).item() < 27.9  # 0.1 % point of chi-squared with 9 degrees
    repeats = x.view(4, 1000, 8)
    assert not torch.equal(repeats[0], repeats[1]), "each repetition draws its own noise"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("residual", {"residual": torch.zeros(2, 15, 8)}),
        ("residual", {"residual": torch.zeros(2, 16, 7)}),
        ("timesteps", {"timesteps": torch.zeros(127, dtype=torch.int64)}),
        ("noise", {"noise": torch.zeros(128, 7)}),
    ],
)
def test_bad_input_of_the_diffusion_loss(name, changes):
    recorded = vectors("generator")
    arguments = {"residual": recorded["train/target"], "scale": 0.107, **changes}
    with pytest.raises(ValueError, match=name):
        diffusion_loss(generator().head, recorded["train/condition"], **arguments)


# Tokens


@pytest.mark.parametrize(("smoothing", "weight"), [(0.0, 0.0), (0.1, 0.1), (0.3, 1.0)])
def test_token_loss_in_python_floats(smoothing, weight):
    made = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 6, 9, generator=made) * 2, torch.randint(0, 9, (2, 6), generator=made)
    masked = torch.rand(2, 6, generator=made) < 0.5
    total = weights = 0.0
    for b in range(2):
        for i in range(6):
            values = logits[b, i].tolist()
            norm = math.log(sum(math.exp(v) for v in values))
            w = 1.0 if masked[b, i] else weight
            cost = (1 - smoothing) * (norm - values[targets[b, i]]) + smoothing * sum(norm - v for v in values) / 9
            total, weights = total + w * cost, weights + w
    found = token_loss(logits, targets, masked, label_smoothing=smoothing, unmasked_weight=weight)
    assert found.item() == pytest.approx(total / weights, rel=1e-5)
    low = token_loss(logits.bfloat16(), targets, masked)
    assert low.dtype == torch.float32
    assert torch.equal(low, token_loss(logits.bfloat16().float(), targets, masked))


def test_known_tokens_do_not_train_the_plain_loss():
    logits = torch.randn(2, 4, 7, requires_grad=True)
    masked = torch.tensor([[True, False, False, True], [False, False, True, False]])
    token_loss(logits, torch.zeros(2, 4, dtype=torch.int64), masked).backward()
    assert (logits.grad[~masked] == 0).all() and (logits.grad[masked] != 0).all()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("targets", (torch.zeros(2, 4, 7), torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 4).bool())),
        ("masked", (torch.zeros(2, 4, 7), torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 3).bool())),
    ],
)
def test_bad_input_of_the_token_loss(name, arguments):
    with pytest.raises(ValueError, match=name):
        token_loss(*arguments)


@pytest.mark.parametrize("tokens", [1, 7, 64, 256])
def test_mask_counts_follow_the_cosine(tokens):
    u = torch.rand(500, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = random_token_mask(500, tokens, torch.Generator().manual_seed(2))
    assert mask.shape == (500, tokens) and mask.dtype == torch.bool
    expected = [max(1, round(tokens * math.acos(v) * 2 / math.pi)) for v in u.tolist()]
    assert mask.sum(dim=1).tolist() == expected


def test_mask_fraction_and_positions_are_uniform():
    """The mean fraction is the mean of arccos(u) 2/pi; positions are exchangeable."""
    mask = random_token_mask(4000, 16, torch.Generator().manual_seed(0)).double()
    # arccos(u) has mean 1 over (0, 1)
    assert mask.mean().item() == pytest.approx(2 / math.pi, abs=0.02)
    spread = math.sqrt(mask.var().item() / 4000)
    assert ((mask.mean(dim=0) - mask.mean()).abs() < 4 * spread).all()
    one = mask[mask.sum(dim=1) == 1]
    assert len(one) > 30 and len(set(one.argmax(dim=1).tolist())) > 12


def test_masks_are_reproducible():
    a, b, c = (random_token_mask(8, 30, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)

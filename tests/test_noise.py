"""Counter noise against Random123's known answers and against the formulas in plain Python integers."""

from __future__ import annotations

import math

import pytest
import torch

from dcar_fast.noise import (
    STREAM_CHOICE,
    CounterNoise,
    LatentNoise,
    Noise,
    NoiseShape,
    RecordedNoise,
    TokenNoise,
    TorchNoise,
    make_noise,
    normal,
    philox4x32,
    uniform,
    words_to_uniform,
)

TOKEN, CONFIDENCE, LATENT_INIT, LATENT = range(4)
SEEDS = (0, 1, 12345, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63 - 1)
SIZES = {"num_tokens": 6, "codebook_size": 10, "latent_channels": 5}
SHAPE = NoiseShape(batch=3, steps=4, denoising_steps=2, **SIZES)


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second % 2**32, first >> 32 ^ c[3] ^ k[1], first % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def expected_uniform(seed: int, token: int, element: int, step: int, stream: int) -> float:
    word = philox((element // 4, token, step, stream), (seed % 2**32, seed // 2**32))[element % 4]
    return (2 * (word >> 9) + 1) / 2**24


def expected_normal(seed: int, token: int, element: int, step: int, stream: int) -> float:
    pair = element // 2 * 2
    a, b = (expected_uniform(seed, token, pair + i, step, stream) for i in range(2))
    return math.sqrt(-2 * math.log(a)) * (math.sin, math.cos)[element % 2 == 0](2 * math.pi * b)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, answer):
    assert tuple(philox(counter, key)) == answer  # the oracle of this file
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in words) == answer


def test_philox_broadcasts_and_takes_tensor_keys():
    counters = torch.arange(3)[:, None], torch.arange(4)[None], torch.tensor(7), torch.tensor(2)
    key = torch.tensor([[5], [2**32 - 1], [77]]), torch.tensor(9)
    words = [word.expand(3, 4) for word in philox4x32(counters, key)]
    for i in range(3):
        for j in range(4):
            assert [int(word[i, j]) for word in words] == philox((i, j, 7, 2), (int(key[0][i]), 9))


def test_words_become_uniforms_exactly_and_strictly_inside():
    words = torch.tensor([0, 511, 512, 2**31, 2**32 - 512, 2**32 - 1])
    u = words_to_uniform(words)
    assert u.dtype == torch.float32
    assert u.tolist() == [(2 * (word >> 9) + 1) / 2**24 for word in words.tolist()]
    assert 0 < u.min() and u.max() < 1
    gumbel = -torch.log(-torch.log(u))
    assert gumbel.isfinite().all(), "no guard is needed around the logarithms"


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [TOKEN, LATENT])
def test_uniform_layout(seed, stream):
    tokens = torch.tensor([0, 3, 2**32 - 1, 9])
    u = uniform(seed, tokens, 7, 11, stream)  # 7: the last quad is cut
    assert u.shape == (4, 7)
    for row, token in enumerate(tokens.tolist()):
        assert u[row].tolist() == [expected_uniform(seed, token, e, 11, stream) for e in range(7)]


@pytest.mark.usefixtures("poisoned_empty")
def test_uniform_over_several_blocks_of_work():
    u = uniform(42, torch.arange(37), 16384, 3, TOKEN)
    assert u.shape == (37, 16384)
    for token in (0, 15, 16, 17, 31, 32, 36):
        for element in (0, 1, 4097, 16383):
            assert u[token, element].item() == expected_uniform(42, token, element, 3, TOKEN)
    wide = uniform(42, torch.arange(2), 4 * (1 << 16) + 5, 0, TOKEN)  # one row is more than a block
    for element in (0, 4 * (1 << 16) - 1, 4 * (1 << 16) + 4):
        assert wide[1, element].item() == expected_uniform(42, 1, element, 0, TOKEN)


@pytest.mark.parametrize("elements", [0, 1, 2, 3, 4, 5])
def test_prefix_of_any_width(elements):
    tokens = torch.arange(3)
    assert torch.equal(uniform(8, tokens, elements, 1, TOKEN), uniform(8, tokens, 8, 1, TOKEN)[:, :elements])
    assert torch.equal(normal(8, tokens, elements, 1, LATENT), normal(8, tokens, 8, 1, LATENT)[:, :elements])


@pytest.mark.parametrize("seed", SEEDS)
def test_normal_is_box_muller_on_word_pairs(seed):
    z = normal(seed, torch.tensor([0, 5]), 6, 4, LATENT)
    expected = torch.tensor(
        [[expected_normal(seed, token, e, 4, LATENT) for e in range(6)] for token in (0, 5)],
        dtype=torch.float64,
    )
    assert z.dtype == torch.float32
    assert (z.double() - expected).abs().max() < 4e-6


def test_every_draw_has_its_own_stream():
    noise = CounterNoise([7, 2**40 + 1], **SIZES)
    for row, seed in enumerate((7, 2**40 + 1)):
        for token in range(6):
            for step in (0, 3):
                u = [expected_uniform(seed, token, e, step, TOKEN) for e in range(10)]
                assert noise.token(step)[row, token].tolist() == u
                assert noise.confidence(step)[row, token].item() == expected_uniform(seed, token, 0, step, CONFIDENCE)
                z = [expected_normal(seed, token, e, step, LATENT) for e in range(5)]
                assert noise.latent(step)[row, token].tolist() == pytest.approx(z, abs=4e-6)
            z = [expected_normal(seed, token, e, 0, LATENT_INIT) for e in range(5)]
            assert noise.latent_init()[row, token].tolist() == pytest.approx(z, abs=4e-6)


def test_repainting_has_a_stream_of_its_own():
    assert STREAM_CHOICE == 4 and STREAM_CHOICE not in (TOKEN, CONFIDENCE, LATENT_INIT, LATENT)


def draws(noise: Noise) -> list[torch.Tensor]:
    return [noise.token(2), noise.confidence(2), noise.latent_init(), noise.latent(2)]


def test_shapes_and_dtypes():
    batch = [draw.shape for draw in draws(CounterNoise([1, 2, 3], **SIZES))]
    assert batch == [(3, 6, 10), (3, 6), (3, 6, 5), (3, 6, 5)]
    assert all(draw.dtype == torch.float32 for draw in draws(CounterNoise([1, 2, 3], **SIZES)))


def test_noise_depends_on_the_seed_alone():
    together = draws(CounterNoise([5, 9, 5, 2**62], **SIZES))
    for row, seed in enumerate([5, 9, 5, 2**62]):
        for batch, alone in zip(together, draws(CounterNoise([seed], **SIZES)), strict=True):
            assert torch.equal(batch[row], alone[0])
    larger = draws(CounterNoise([5], num_tokens=9, codebook_size=11, latent_channels=6))
    assert torch.equal(larger[0][:, :6, :10], together[0][:1])
    assert torch.equal(larger[3][:, :6, :5], together[3][:1])


def test_seeds_steps_and_the_high_word_change_everything():
    base = draws(CounterNoise([3], **SIZES))
    for other in (CounterNoise([4], **SIZES), CounterNoise([3 + 2**32], **SIZES)):
        for a, b in zip(base, draws(other), strict=True):
            assert (a != b).all()
    noise = CounterNoise([3], **SIZES)
    assert (noise.token(0) != noise.token(1)).all() and (noise.latent(0) != noise.latent(1)).all()


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 1.0, "1", None, True, torch.tensor(1)])
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match="seed"):
        CounterNoise([seed], **SIZES)


@pytest.mark.usefixtures("poisoned_empty")
def test_token_noise_gives_the_rows_of_counter_noise():
    seeds, noise = [11, 2**45 + 3, 12], CounterNoise([11, 2**45 + 3, 12], **SIZES)
    for step in (0, 5):
        images, positions = torch.tensor([2, 0, 1, 1, 0]), torch.tensor([5, 0, 3, 1, 4])
        rows = TokenNoise(torch.tensor(seeds)[images], positions, step).uniform(10)
        assert torch.equal(rows, noise.token(step)[images, positions])
    empty = TokenNoise(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 0).uniform(10)
    assert empty.shape == (0, 10)


@pytest.mark.usefixtures("poisoned_empty")
def test_latent_noise_gives_the_rows_of_counter_noise():
    seeds = [0, 2**45 + 3, 2**63 - 1]
    noise = CounterNoise(seeds, **SIZES)
    for step in (0, 31):
        images, positions = torch.tensor([2, 0, 1, 1, 0]), torch.tensor([5, 0, 3, 1, 4])
        rows = LatentNoise(torch.tensor(seeds)[images], positions, step).normal(5)
        assert torch.equal(rows, noise.latent(step)[images, positions])
    empty = LatentNoise(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 0).normal(5)
    assert empty.shape == (0, 5)


def test_seeds_of_many_rows_are_used_block_by_block():
    """More rows than are worked on at a time: each block must take its own seeds."""
    seeds, tokens = torch.arange(70_000) * 977, torch.arange(70_000) % 256
    rows = LatentNoise(seeds, tokens, 2).normal(4)
    for row in (0, 65_535, 65_536, 69_999):
        assert torch.equal(rows[row], normal(int(seeds[row]), tokens[row : row + 1], 4, 2, LATENT)[0])


def test_make_noise():
    same = (
        make_noise(40, SHAPE, "cpu"),
        make_noise([40, 41, 42], SHAPE, "cpu"),
        make_noise((40, 41, 42), SHAPE, "cpu"),
    )
    for a, b, c in zip(*map(draws, same), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    counter = CounterNoise([1, 2, 3], **SIZES)
    assert make_noise(counter, SHAPE, "cpu") is counter
    recorded = recording()
    assert make_noise(recorded, SHAPE, "cpu") is recorded


def recording(**changes) -> RecordedNoise:
    draws = {
        "token": [torch.rand(3, 6, 10)] * 4,
        "confidence": [torch.rand(3, 6)] * 3,  # none for the last step, which masks nothing
        "latent_init": torch.randn(3, 6, 5),
        "latent": [torch.randn(3, 6, 5)] * 2,
    }
    return RecordedNoise(**{**draws, **changes})


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (recording(token=[torch.rand(3, 6, 10)] * 3), "3 draws of token, the run needs 4"),
        (recording(confidence=[torch.rand(3, 6)] * 2), "2 draws of confidence, the run needs 3"),
        (recording(latent=[torch.rand(3, 6, 5)]), "1 draws of latent, the run needs 2"),
        (recording(token=[torch.rand(3, 6, 11)] * 4), r"token draw 0 must be \(3, 6, 10\)"),
        (recording(token=[torch.rand(3, 6, 10)] * 3 + [torch.rand(6, 10)]), "token draw 3"),
        (recording(confidence=[torch.rand(3, 6, 1)] * 3), "confidence draw 0"),
        (recording(latent=[torch.zeros(3, 6, 5, dtype=torch.int64)] * 2), "latent draw 0.*floating"),
        (recording(latent_init=torch.rand(2, 6, 5)), "latent_init"),
        (recording(latent_init=None), "latent_init.*NoneType"),
        (CounterNoise([1, 2], **SIZES), r"\(2, 6, 10, 5\).*\(3, 6, 10, 5\)"),
        (CounterNoise([1, 2, 3], **{**SIZES, "num_tokens": 7}), "7"),
        (CounterNoise([1, 2, 3], **{**SIZES, "codebook_size": 9}), "9"),
        (CounterNoise([1, 2, 3], **{**SIZES, "latent_channels": 4}), "4"),
    ],
    ids=range(13),
)
def test_noise_that_cannot_serve_the_run(noise, message):
    with pytest.raises(ValueError, match=f"noise.*{message}"):
        make_noise(noise, SHAPE, "cpu")


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ([1, 2], "2 seeds .* batch of 3"),
        ([1, 2, 3, 4], "4 seeds .* batch of 3"),
        ([], "0 seeds"),
        (-1, "got -1"),
        (2**63 - 2, "got 9223372036854775808"),  # the third image's seed leaves the range
        ("123", "noise must be"),
        (1.5, "noise must be"),
        (True, "noise must be"),
        (None, "noise must be"),
        ([1, 2.0, 3], "got 2.0"),
    ],
)
def test_make_noise_refuses(noise, message):
    with pytest.raises(ValueError, match=message):
        make_noise(noise, SHAPE, "cpu")


def test_recorded_noise_plays_back_in_order():
    token, confidence = [torch.rand(1, 6, 10) for _ in range(2)], [torch.rand(1, 6) for _ in range(2)]
    first, latent = torch.randn(1, 6, 5), [torch.randn(1, 6, 5) for _ in range(3)]
    noise = RecordedNoise(token=token, confidence=confidence, latent_init=first, latent=latent)
    for step in range(2):
        assert noise.token(step) is token[step] and noise.confidence(step) is confidence[step]
    assert noise.latent_init() is first and all(noise.latent(i) is latent[i] for i in range(3))
    for name, draw in (("token", noise.token), ("confidence", noise.confidence)):
        with pytest.raises(ValueError, match=f"2 draws of {name}, number 2"):
            draw(2)
    with pytest.raises(ValueError, match="3 draws of latent, number 3"):
        noise.latent(3)


def test_torch_noise_follows_its_generator():
    def four(seed: int) -> list[torch.Tensor]:
        return draws(TorchNoise(2, **SIZES, generator=torch.Generator().manual_seed(seed)))

    generator = torch.Generator().manual_seed(3)
    expected = [torch.rand(2, 6, 10, generator=generator), torch.rand(2, 6, generator=generator)]
    expected += [torch.randn(2, 6, 5, generator=generator) for _ in range(2)]
    for a, b, c in zip(four(3), expected, four(4), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def kolmogorov(sample: torch.Tensor, cdf) -> float:
    """sqrt(n) times the largest distance between the empirical and the given distribution function."""
    x = cdf(sample.double().flatten().sort().values)
    n = len(x)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((steps[1:] - x).max().item(), (x - steps[:-1]).max().item())


@pytest.mark.parametrize("seed", [0, 1, 2**50])
def test_uniforms_and_normals_are_distributed_as_named(seed):
    noise = CounterNoise([seed, seed + 1], num_tokens=256, codebook_size=512, latent_channels=32)
    u, z = noise.token(0), torch.stack([noise.latent(i) for i in range(8)])
    # 1.95 is the 0.1 % point of the Kolmogorov distribution; the seeds are fixed, so this cannot flake
    assert kolmogorov(u, lambda x: x) < 1.95
    assert kolmogorov(noise.confidence(0), lambda x: x) < 1.95
    assert kolmogorov(z, lambda x: (1 + torch.erf(x / math.sqrt(2))) / 2) < 1.95
    assert kolmogorov(noise.latent_init(), lambda x: (1 + torch.erf(x / math.sqrt(2))) / 2) < 1.95
    count = z.numel()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        spread = math.sqrt({1: 1, 2: 2, 3: 15, 4: 96}[power] / count)
        assert abs(z.double().pow(power).mean().item() - moment) < 4 * spread


def test_draws_are_uncorrelated():
    noise = CounterNoise([21, 22], num_tokens=256, codebook_size=512, latent_channels=32)
    u = noise.token(0).double() - 0.5
    pairs = {
        "elements": (u[..., 1:], u[..., :-1]),
        "quads": (u[..., 4:], u[..., :-4]),
        "tokens": (u[:, 1:], u[:, :-1]),
        "images": (u[0], u[1]),
        "steps": (u, noise.token(1).double() - 0.5),
        "streams": (u[..., 0], noise.confidence(0).double() - 0.5),
    }
    z = noise.latent(0).double()
    pairs["sine and cosine"] = (z[..., ::2], z[..., 1::2])
    pairs["start and step"] = (noise.latent_init().double(), z)
    for name, (a, b) in pairs.items():
        correlation = ((a * b).mean() / (a.std() * b.std())).item()
        assert abs(correlation) < 4 / math.sqrt(a.numel()), name

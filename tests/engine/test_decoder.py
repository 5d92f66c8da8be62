"""The fast decoder gives the decoder's images, in every type, for every shape, whatever happens to the weights."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dcar_fast.config import preset
from dcar_fast.engine import decoder_conv
from dcar_fast.engine.decoder import FastDecoder
from dcar_fast.engine.decoder_winograd import transformed, winograd
from dcar_fast.models.autoencoder import ResBlock
from dcar_fast.models.tokenizer import DCHT
from tests.engine.decoder_cases import CONFIGS, eager, latents, tokenizer, truth
from tests.tolerance import check_close

SHAPES = [(1, 1, 1), (1, 2, 2), (3, 1, 5), (2, 4, 3), (1, 8, 8), (5, 7, 1)]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> DCHT:
    return tokenizer(request.param)


@pytest.fixture
def small() -> DCHT:
    """One that a test may change."""
    return tokenizer("shapes")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_decoder(model: DCHT, shape: tuple[int, int, int]) -> None:
    x = latents(model, *shape)
    got = FastDecoder(model).decode(x)
    # Twice the batch: with one small image on one thread PyTorch leaves oneDNN for loops that round less.
    check_close(got, model.decode(torch.cat([x, x]))[: len(x)], truth(model, x))
    assert got.is_contiguous(memory_format=torch.channels_last) and not got.requires_grad


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 5, 8)], ids=str)
def test_half_precision(model: DCHT, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = latents(model, *shape)
    check_close(FastDecoder(model, dtype).decode(x), eager(model, x, dtype), truth(model, x))


def test_the_modules_own_type(small: DCHT) -> None:
    small.decoder.bfloat16()
    assert FastDecoder(small).decode(latents(small, 1, 2, 2)).dtype == torch.bfloat16
    small.decoder.double()
    x = latents(small, 2, 3, 2).double()
    assert (FastDecoder(small).decode(x) - small.decode(x)).abs().max() < 1e-12


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens(model: DCHT, with_residual: bool, dtype: torch.dtype) -> None:
    config = model.config
    ids = torch.randint(config.codebook_size, (2, 3, 4), generator=torch.Generator().manual_seed(1))
    residual = torch.randn(2, 12, config.latent_channels) if with_residual else None
    plain = copy.deepcopy(model)
    plain.decoder.to(dtype)
    exact = copy.deepcopy(model)
    exact.decoder.double()
    got = FastDecoder(model, dtype).decode_tokens(ids, residual)
    check_close(got, plain.decode_tokens(ids, residual), exact.decode_tokens(ids, residual))


def test_a_square_of_tokens_in_a_row(small: DCHT) -> None:
    ids = torch.randint(small.config.codebook_size, (2, 9))
    decoder = FastDecoder(small)
    assert torch.equal(decoder.decode_tokens(ids), decoder.decode_tokens(ids.view(2, 3, 3)))


def test_strange_layouts(small: DCHT) -> None:
    x = latents(small, 2, 6, 5)
    expected = FastDecoder(small).decode(x)
    for same in (
        x.contiguous(memory_format=torch.channels_last),
        x.mT.contiguous().mT,
        torch.stack([x, x], -1)[..., 0],
    ):
        assert (FastDecoder(small).decode(same) - expected).abs().max() < 1e-5


def test_under_autocast_and_with_gradients_wanted(small: DCHT) -> None:
    x = latents(small, 1, 3, 3).requires_grad_()
    small.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        got = FastDecoder(small).decode(x)
    assert got.dtype == torch.float32 and torch.equal(got, FastDecoder(small).decode(x)) and not got.requires_grad


# What happens to the weights


def _changes() -> dict:
    def step(model: DCHT) -> None:
        model.decoder.stages[1][0].conv.weight.mul_(1.5)

    def statistics(model: DCHT) -> None:
        next(m for m in model.decoder.modules() if isinstance(m, nn.BatchNorm2d)).running_mean.add_(1.0)

    def swap(model: DCHT) -> None:
        conv = model.decoder.project_in.conv
        conv.weight = nn.Parameter(conv.weight * -1, requires_grad=False)

    def storage(model: DCHT) -> None:
        model.decoder.project_in.conv.weight.data = -model.decoder.project_in.conv.weight.data

    def codes(model: DCHT) -> None:
        model.quantizer.embedding.weight.neg_()

    def load(model: DCHT) -> None:
        model.load_state_dict(tokenizer("shapes", seed=5).state_dict())

    return {f.__name__: f for f in (step, statistics, swap, storage, codes, load)}


@pytest.mark.parametrize("change", sorted(_changes()))
def test_follows_the_module(small: DCHT, change: str) -> None:
    ids = torch.randint(small.config.codebook_size, (1, 3, 3))
    decoder = FastDecoder(small)
    before = decoder.decode_tokens(ids)
    _changes()[change](small)
    after, expected = decoder.decode_tokens(ids), small.decode_tokens(ids)
    assert (after - before).abs().max() > 1e-3
    assert (after - expected).abs().max() < 1e-4 * max(1, expected.abs().max())


def test_follows_the_module_to_another_type(small: DCHT) -> None:
    x, decoder = latents(small, 1, 2, 2), FastDecoder(small)
    full = decoder.decode(x)
    small.to(torch.bfloat16)
    half = decoder.decode(x)
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert 0 < (half - full).abs().max() < 0.1 * full.abs().max()


def test_the_module_is_untouched_and_packed_once(small: DCHT, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: value.clone() for name, value in small.state_dict().items()}
    made = []
    original = decoder_conv.Conv.__init__
    monkeypatch.setattr(
        decoder_conv.Conv, "__init__", lambda self, *a, **k: (made.append(1), original(self, *a, **k))[1]
    )
    x = latents(small, 1, 2, 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16):
        FastDecoder(small, dtype).decode(x)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in small.decoder.modules())
    assert len(made) == 2 * convolutions
    after = small.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_training_mode_module_decodes_as_in_eval_mode(small: DCHT) -> None:
    x = latents(small, 2, 2, 2)
    expected = small.decode(x)
    small.train()
    assert (FastDecoder(small).decode(x) - expected).abs().max() < 1e-4


def test_threads(small: DCHT) -> None:
    x = [latents(small, 1 + i % 3, 2 + i, 3, seed=i) for i in range(6)]
    expected = [FastDecoder(small).decode(each) for each in x]
    small = copy.deepcopy(small)  # nothing is packed yet
    decoder, got = FastDecoder(small), {}
    workers = [threading.Thread(target=lambda i=i: got.__setitem__(i, decoder.decode(x[i]))) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(got[i], expected[i]) for i in range(6))


# Ways to run a convolution


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (5, 8, 8), (2, 33, 18), (1, 3, 300)], ids=str)
@pytest.mark.parametrize("channels", [(3, 5), (64, 32)], ids=str)
@pytest.mark.parametrize("relu", [True, False])
def test_winograd(shape: tuple[int, int, int], channels: tuple[int, int], relu: bool) -> None:
    torch.manual_seed(0)
    (inputs, outputs), (batch, height, width) = channels, shape
    x, weight = torch.randn(batch, inputs, height, width), torch.randn(outputs, inputs, 3, 3)
    bias, add = torch.randn(outputs), torch.randn(batch, outputs, height, width)

    def plain(*tensors: torch.Tensor) -> torch.Tensor:
        x, weight, bias, add = tensors
        y = nn.functional.conv2d(x, weight, bias, padding=1)
        return (y.relu() if relu else y) + add

    got = winograd(x.contiguous(memory_format=torch.channels_last), transformed(weight), bias, relu, add)
    exact = plain(x.double(), weight.double(), bias.double(), add.double())
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert (got - exact).abs().max() < 2e-6 * (9 * inputs) ** 0.5 * 4
    without = winograd(x.contiguous(memory_format=torch.channels_last), transformed(weight), None)
    assert (without - nn.functional.conv2d(x, weight, padding=1)).abs().max() < 1e-4


@pytest.mark.parametrize("missing", ["winograd", "onednn", "both"])
def test_without_what_some_machines_lack(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing != "onednn":
        monkeypatch.setattr(decoder_conv, "_takes_winograd", lambda *_: False)
    if missing != "winograd":
        monkeypatch.setattr(decoder_conv, "_onednn_packs", lambda *_: False)
    model = tokenizer("wide", seed=3)
    x = latents(model, 2, 3, 4)
    check_close(FastDecoder(model).decode(x), model.decode(x), truth(model, x))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_convolutions_of_a_gpu(model: DCHT, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their biases, and one op for what follows; only where that op was chosen."""
    monkeypatch.setattr(decoder_conv, "_takes_winograd", lambda *_: False)
    monkeypatch.setattr(decoder_conv, "_onednn_packs", lambda *_: False)
    calls, original = [], decoder_conv.ops.bias_residual

    def spy(x: torch.Tensor, bias: torch.Tensor, **options) -> torch.Tensor:
        calls.append((options["activation"], options["residual"] is not None))
        return original(x, bias, **options)

    monkeypatch.setattr(decoder_conv.ops, "bias_residual", spy)
    model = copy.deepcopy(model)  # nothing is packed yet
    x = latents(model, 2, 3, 2)
    got = FastDecoder(model, dtype, backend="reference").decode(x)
    check_close(got, eager(model, x, dtype), truth(model, x))

    blocks = [m for m in model.decoder.modules() if isinstance(m, ResBlock)]
    acts = ["relu" if isinstance(block.act, nn.ReLU) else "silu" for block in blocks]
    folded = sum(isinstance(m, nn.BatchNorm2d) for m in model.decoder.modules())
    assert sorted(calls) == sorted([(act, False) for act in acts] + [("none", True)] * (folded + 1))
    calls.clear()
    FastDecoder(model, dtype).decode(x)
    assert not calls


def test_the_convolutions_have_every_end() -> None:
    """What the test above relies on."""
    blocks = [m for name in CONFIGS for m in tokenizer(name).decoder.modules() if isinstance(m, ResBlock)]
    assert {type(block.act) for block in blocks} == {nn.ReLU, nn.SiLU}
    assert {type(block.norm) for block in blocks} >= {nn.BatchNorm2d}


def test_the_wide_model_takes_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = []
    for name in ("_winograd", "_packed"):
        original = getattr(decoder_conv.Conv, name)
        monkeypatch.setattr(decoder_conv.Conv, name, lambda *a, _n=name, _o=original: (ways.append(_n), _o(*a))[1])
    FastDecoder(model := tokenizer("wide")).decode(latents(model, 1, 2, 2))
    assert "_winograd" in ways and ("_packed" in ways) == torch.backends.mkldnn.is_available()


def test_the_benchmark_setting_of_cudnn_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    device = torch.device("cuda")
    for before in (False, True):
        torch.backends.cudnn.benchmark = before
        with pytest.raises(KeyError), decoder_conv.fastest_cudnn(device):
            first = decoder_conv.fastest_cudnn(device)
            first.__enter__()
            assert torch.backends.cudnn.benchmark
            first.__exit__(None, None, None)
            assert torch.backends.cudnn.benchmark
            raise KeyError
        assert torch.backends.cudnn.benchmark is before
    torch.backends.cudnn.benchmark = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with decoder_conv.fastest_cudnn(device):
        assert not torch.backends.cudnn.benchmark


# Counting, refusing


def test_flops_are_those_of_the_model() -> None:
    with torch.device("meta"):
        model = DCHT(preset("dc-ar-512").tokenizer).eval()
        x = torch.empty(1, 32, 16, 16)
        ids, residual = torch.empty(1, 16, 16, dtype=torch.int64), torch.empty(1, 256, 32)
    counts = []
    for decode in (model.decode, FastDecoder(model).decode, FastDecoder(model, torch.bfloat16).decode):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            assert decode(x).shape == (1, 3, 512, 512)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2] > 2.5e12
    assert FastDecoder(model).decode_tokens(ids, residual).shape == (1, 3, 512, 512)


def test_bad_arguments(small: DCHT) -> None:
    decoder, channels = FastDecoder(small), small.config.latent_channels
    ids = torch.zeros(1, 2, 2, dtype=torch.int64)
    for match, call in {
        "tokenizer must be a DCHT": lambda: FastDecoder(small.decoder),
        "dtype must be None or one of": lambda: FastDecoder(small, torch.int8),
        "backend must be one of": lambda: FastDecoder(small, backend="fast"),
        "tile must be None or an integer": lambda: FastDecoder(small, tile=0),
        "overlap must be None or an integer": lambda: FastDecoder(small, overlap=-1),
        "latents must have shape": lambda: decoder.decode(torch.zeros(1, channels + 1, 2, 2)),
        "latents must not be empty": lambda: decoder.decode(torch.zeros(0, channels, 2, 2)),
        "latents must be floating": lambda: decoder.decode(torch.zeros(1, channels, 2, 2, dtype=torch.int64)),
        "latents must be on": lambda: decoder.decode(torch.zeros(1, channels, 2, 2, device="meta")),
        "ids must be on": lambda: decoder.decode_tokens(ids.to("meta")),
        "residual must be on": lambda: decoder.decode_tokens(ids, torch.zeros(1, 4, channels, device="meta")),
        "needs a square": lambda: decoder.decode_tokens(torch.zeros(1, 3, dtype=torch.int64)),
        "ids must lie in": lambda: decoder.decode_tokens(ids + small.config.codebook_size),
        "ids must be int64": lambda: decoder.decode_tokens(ids.int()),
        "ids must not be empty": lambda: decoder.decode_tokens(ids[:0]),
        "residual must have shape": lambda: decoder.decode_tokens(ids, torch.zeros(1, 5, channels)),
        "residual must be floating": lambda: decoder.decode_tokens(ids, torch.zeros(1, 4, channels).long()),
        "cannot run": lambda: FastDecoder(small, backend="triton").decode_tokens(ids),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_the_reference_backend(small: DCHT) -> None:
    x = latents(small, 2, 3, 3)
    check_close(FastDecoder(small, backend="reference").decode(x), small.decode(x), truth(small, x))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 5), (1, 8, 8)], ids=str)
def test_on_a_gpu(model: DCHT, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    model = copy.deepcopy(model).cuda()
    x = latents(model, *shape).cuda()
    got = FastDecoder(model, dtype).decode(x)
    check_close(got, eager(model, x, dtype), truth(model, x))
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [None, 3])
def test_nothing_waits_for_the_gpu(tile: int | None) -> None:
    model = tokenizer("wide").cuda()
    ids = torch.randint(model.config.codebook_size, (2, 5, 4), device="cuda")
    residual = torch.randn(2, 20, model.config.latent_channels, device="cuda")
    decoder = FastDecoder(model, torch.bfloat16, tile=tile)
    expected = decoder.decode_tokens(ids, residual)  # packs, compiles, lets cuDNN try
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = decoder.decode_tokens(ids, residual)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, expected)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    model = tokenizer("wide").cuda()
    decoder = FastDecoder(model, torch.bfloat16)
    ids = torch.randint(model.config.codebook_size, (2, 4, 4), device="cuda")
    residual = torch.randn(2, 16, model.config.latent_channels, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        decoder.decode_tokens(ids, residual)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        images = decoder.decode_tokens(ids, residual)
    for seed in range(3):
        torch.manual_seed(seed)
        ids.copy_(torch.randint_like(ids, model.config.codebook_size))
        residual.normal_()
        graph.replay()
        expected = decoder.decode_tokens(ids, residual)
        assert (images - expected).abs().max() <= 0.02 * expected.abs().max()

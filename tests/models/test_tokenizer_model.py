"""The tokenizer against recorded images, its layers against written-out formulas, and its training losses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from dcar_fast.config import DCHTConfig
from dcar_fast.models.autoencoder import (
    Downsample,
    EfficientViTBlock,
    GLUMBConv,
    LiteMLA,
    ResBlock,
    Upsample,
    channel_mean,
    relu_linear_attention,
)
from dcar_fast.models.quantizer import Quantizer
from dcar_fast.models.tokenizer import DCHT
from tests.golden_vectors import error, settings, tokenizer, vectors

CASES = sorted(settings("tokenizer")["cases"])
LOSSES = ("commitment_loss", "codebook_loss", "quantizer_loss")


def span(images: torch.Tensor) -> float:
    """The image's range, which errors are measured against."""
    return (images.max() - images.min()).item()


@pytest.fixture(scope="module")
def encoded():
    with torch.no_grad():
        return {case: tokenizer().encode(vectors("tokenizer")[f"case/{case}/image"]) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_recorded_encoding(case, encoded):
    tokens, recorded = encoded[case], vectors("tokenizer")
    with torch.no_grad():
        output = tokenizer().encoder(recorded[f"case/{case}/image"])
    assert error(output, recorded[f"case/{case}/encoder_output"]) < 1e-4 * span(output)
    assert torch.equal(tokens.ids, recorded[f"case/{case}/indices"])
    for name in ("features", "quantized", "residual"):
        assert error(getattr(tokens, name), recorded[f"case/{case}/{name}"]) < 1e-5, name
        assert getattr(tokens, name).dtype == torch.float32
    for name in LOSSES:
        assert error(tokens.losses[name], recorded[f"case/{case}/{name}"]) < 1e-5, name


@pytest.mark.parametrize("case", CASES)
def test_recorded_decoding(case):
    recorded = vectors("tokenizer")
    ids, residual = recorded[f"case/{case}/indices"], recorded[f"case/{case}/residual"]
    expected = {name: recorded[f"case/{case}/decoded_{name}"] for name in ("discrete", "hybrid")}
    with torch.no_grad():
        found = {
            "discrete": [
                tokenizer().decode(recorded[f"case/{case}/quantized"]),
                tokenizer().decode_tokens(ids),
            ],
            "hybrid": [
                tokenizer().decode(recorded[f"case/{case}/features"]),
                tokenizer().decode_tokens(ids, residual),
                tokenizer().decode_tokens(ids, residual.transpose(1, 2).contiguous().transpose(1, 2)),
                tokenizer()(recorded[f"case/{case}/image"])[0],
            ],
        }
    for name, images in found.items():
        for image in images:
            assert error(image, expected[name]) < 1e-4 * span(expected[name]), name
    assert error(expected["discrete"], expected["hybrid"]) > 1e-2, "the two paths differ"


def test_flat_ids_are_a_square_grid():
    recorded = vectors("tokenizer")
    ids, residual = recorded["case/2/indices"], recorded["case/2/residual"]
    with torch.no_grad():
        expected = tokenizer().decode_tokens(ids, residual)
        assert torch.equal(tokenizer().decode_tokens(ids.flatten(1), residual), expected)
        for flat in (ids.flatten(1)[:, :35], ids.flatten(1)[:, :6]):
            with pytest.raises(ValueError, match=r"ids.*square"):
                tokenizer().decode_tokens(flat)


def test_images_of_a_batch_do_not_see_each_other():
    images = torch.cat([vectors("tokenizer")["case/0/image"], torch.zeros(1, 3, 64, 64)])
    with torch.no_grad():
        together, alone = tokenizer().encode(images), tokenizer().encode(images[1:2])
    assert torch.equal(together.ids[1:2], alone.ids)
    assert error(together.features[1:2], alone.features) < 1e-5


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 96), (160, 64), (64, 352)])
def test_any_multiple_of_the_compression(height, width):
    torch.manual_seed(0)
    images = torch.rand(1, 3, height, width) * 2 - 1
    with torch.no_grad():
        tokens = tokenizer().encode(images)
        cells = height // 32 * (width // 32)
        assert tokens.ids.shape == (1, height // 32, width // 32) and tokens.residual.shape == (1, cells, 8)
        hybrid = tokenizer().decode_tokens(tokens.ids, tokens.residual)
        assert hybrid.shape == images.shape
        assert error(hybrid, tokenizer().decode(tokens.features)) < 1e-4 * span(hybrid)
        flipped = tokenizer().encode(images.transpose(2, 3))  # height and width are not mixed up
    assert flipped.ids.shape == (1, width // 32, height // 32)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 500, 512), "images.*multiples of 32.*500 x 512"),
        (torch.zeros(1, 3, 64, 33), "images.*multiples of 32.*64 x 33"),
        (torch.zeros(1, 3, 0, 64), "images.*0 x 64"),
        (torch.zeros(1, 1, 64, 64), r"images.*\(1, 1, 64, 64\)"),
        (torch.zeros(3, 64, 64), r"images.*\(3, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "images.*uint8"),
        (torch.zeros(1, 3, 64, 64).numpy(), "images.*ndarray"),
        (torch.zeros(0, 3, 64, 64), r"images.*0"),
    ],
    ids=range(8),
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        tokenizer().encode(images)


IDS = torch.zeros(1, 2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("ids", "residual", "message"),
    [
        (IDS + 64, None, r"ids.*0\.\.63"),  # MASK is no code
        (IDS - 1, None, "ids"),
        (IDS.int(), None, "ids.*int64.*int32"),
        (IDS[0, 0], None, "ids"),
        (IDS[..., None], None, "ids"),
        (IDS.tolist(), None, "ids.*list"),
        (IDS[:, :0], None, "ids"),
        (IDS, torch.zeros(1, 5, 8), r"residual.*\(1, 6, 8\).*\(1, 5, 8\)"),
        (IDS, torch.zeros(1, 8, 2, 3), "residual"),
        (IDS, torch.zeros(2, 6, 8), "residual"),
        (IDS, torch.zeros(1, 6, 8, dtype=torch.int64), "residual.*floating"),
    ],
    ids=range(11),
)
def test_bad_tokens(ids, residual, message):
    with pytest.raises(ValueError, match=message):
        tokenizer().decode_tokens(ids, residual)


@pytest.mark.parametrize(
    "latents",
    [
        torch.zeros(1, 7, 2, 2),
        torch.zeros(8, 2, 2),
        torch.zeros(1, 8, 2, 2, dtype=torch.int32),
        torch.zeros(1, 8, 0, 2),
    ],
    ids=range(4),
)
def test_bad_latents(latents):
    with pytest.raises(ValueError, match="latents"):
        tokenizer().decode(latents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    image = vectors("tokenizer")["case/1/image"]
    model = copy.deepcopy(tokenizer()).to(dtype)
    with torch.no_grad():
        tokens, expected = model.encode(image), tokenizer().encode(image)
        decoded = model.decode(expected.features)
        exact = tokenizer().decode(expected.features)
    assert decoded.dtype == dtype
    assert tokens.features.dtype == tokens.quantized.dtype == tokens.residual.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in tokens.losses.values())
    size = (decoded - exact).square().mean().sqrt().item() / exact.square().mean().sqrt().item()
    assert size < (0.05 if dtype == torch.bfloat16 else 0.01)
    assert (tokens.features - expected.features).square().mean().sqrt() < 0.05


def test_autocast_keeps_the_quantizer_and_the_attention_in_float32():
    torch.manual_seed(0)
    quantizer, z = Quantizer(1024, 8), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        expected = quantizer(z)
        with torch.autocast("cpu", torch.bfloat16):
            found = quantizer(z)
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.quantized, expected.quantized)


def test_batch_norm_uses_the_batch_in_training_and_its_record_otherwise():
    model = copy.deepcopy(tokenizer())
    latents = vectors("tokenizer")["case/0/features"]
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 2 and not [m for m in model.encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(m.eps == 1e-5 for m in norms)
    with torch.no_grad():
        expected = model.decode(latents)
        before = [m.running_mean.clone() for m in norms]
        trained = model.train().decode(latents)
        assert all(not torch.equal(m.running_mean, b) for m, b in zip(norms, before, strict=True))
        assert error(trained, expected) > 1e-3
        after = model.eval().decode(latents)
    assert error(after, expected) > 1e-6, "the record has moved"


def test_epsilon_of_every_norm():
    norms = [m for m in tokenizer().modules() if isinstance(m, (torch.nn.LayerNorm, torch.nn.BatchNorm2d))]
    assert len(norms) == 17 and {m.eps for m in norms} == {1e-5}


# Layers, written out


def random_(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(4)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double()


def channel_norm(x, module):
    """LayerNorm over the channels of each pixel."""
    centred = x - x.mean(1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(1, keepdim=True) + 1e-5)
    return scaled * module.weight[:, None, None] + module.bias[:, None, None]


def conv(x, module, **options):
    return F.conv2d(x, module.weight, module.bias, **options)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_res_block_is_the_formula(act):
    block, x = random_(ResBlock(6, "layer_norm", act)), torch.randn(2, 6, 5, 4).double()
    inner = getattr(F, act)(conv(x, block.conv1, padding=1))
    assert block.conv2.bias is None
    assert error(block(x), x + channel_norm(F.conv2d(inner, block.conv2.weight, padding=1), block.norm)) < 1e-10


def written_out_attention(qkv: torch.Tensor) -> torch.Tensor:
    """sum_k relu(k) . relu(q) v / (sum_k relu(k) . relu(q) + 1e-15), query by query, float64."""
    batch, channels, height, width = qkv.shape
    flat, out = qkv.double().flatten(2), []
    for head in range(channels // 96):
        q, k, v = flat[:, 96 * head : 96 * head + 96].split(32, dim=1)
        weights = torch.einsum("bdk,bdq->bkq", k.clamp(min=0), q.clamp(min=0))
        out.append(torch.einsum("bdk,bkq->bdq", v, weights) / (weights.sum(1, keepdim=True) + 1e-15))
    return torch.cat(out, dim=1).view(batch, channels // 3, height, width)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 8), (8, 4), (3, 11), (6, 6), (1, 32), (1, 33)])
def test_linear_attention_is_the_formula_on_both_sides_of_32_cells(height, width):
    torch.manual_seed(0)
    qkv = torch.randn(2, 3 * 64, height, width)
    assert error(relu_linear_attention(qkv.double()), written_out_attention(qkv)) < 1e-10
    assert error(relu_linear_attention(qkv), written_out_attention(qkv)) < 1e-4
    non_contiguous = qkv.to(memory_format=torch.channels_last)
    assert error(relu_linear_attention(non_contiguous), written_out_attention(qkv)) < 1e-4


@pytest.mark.parametrize(("height", "width"), [(4, 8), (3, 11)])
def test_attention_without_any_positive_key_is_zero(height, width):
    qkv = -torch.rand(1, 96, height, width) - 0.1
    out = relu_linear_attention(qkv)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize(("height", "width"), [(4, 8), (8, 8)])
def test_float16_attention_is_computed_in_float32(height, width):
    torch.manual_seed(1)
    qkv = (torch.randn(1, 96, height, width) * 60).half()  # the sums leave float16's range
    out = relu_linear_attention(qkv)
    assert out.dtype == torch.float16 and out.isfinite().all()
    assert error(out, written_out_attention(qkv)) < 2e-3 * written_out_attention(qkv).abs().max().item()


@pytest.mark.parametrize(("height", "width"), [(4, 8), (8, 8)])
def test_bfloat16_attention_multiplies_in_bfloat16_and_divides_in_float32(height, width):
    torch.manual_seed(2)
    qkv = torch.randn(1, 96, height, width).bfloat16()
    q, k, v = qkv.flatten(2).view(1, 3, 32, -1).unbind(1)
    q, k = q.relu(), k.relu()
    if height * width > 32:
        v = torch.cat([v, torch.ones_like(v[:, :1])], dim=1)
        sums = ((v @ k.transpose(1, 2)) @ q).float()
        expected = sums[:, :-1] / (sums[:, -1:] + 1e-15)
    else:
        weights = (k.transpose(1, 2) @ q).float()
        expected = v @ (weights / (weights.sum(1, keepdim=True) + 1e-15)).bfloat16()
    out = relu_linear_attention(qkv)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16().view_as(out))


def test_efficientvit_block_is_the_formula():
    block = random_(EfficientViTBlock(64, "layer_norm", "silu"))
    x = torch.randn(2, 64, 7, 5).double()
    attention, mlp = block.attention, block.mlp
    assert attention.qkv.bias is None and attention.proj.bias is None and mlp.pointwise.bias is None
    inner = written_out_attention(F.conv2d(x, attention.qkv.weight))
    y = x + channel_norm(F.conv2d(inner, attention.proj.weight), attention.norm)
    h = F.silu(conv(y, mlp.inverted))
    assert h.shape[1] == 8 * 64
    value, gate = conv(h, mlp.depthwise, padding=1, groups=512).split(256, dim=1)
    expected = y + channel_norm(F.conv2d(value * F.silu(gate), mlp.pointwise.weight), mlp.norm)
    assert error(block(x), expected) < 1e-8
    assert isinstance(attention, LiteMLA) and isinstance(mlp, GLUMBConv)


def unshuffled(x):
    """pixel_unshuffle(2): channel c, row offset i, column offset j -> 4c + 2i + j."""
    parts = [x[:, :, i::2, j::2] for i in range(2) for j in range(2)]
    return torch.stack(parts, dim=2).flatten(1, 2)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (8, 16), (8, 32), (16, 8)])
def test_downsample_and_upsample_shortcuts(inputs, outputs):
    down, x = random_(Downsample(inputs, outputs)), torch.randn(1, inputs, 4, 6).double()
    cells = unshuffled(x)
    shortcut = torch.stack([group.mean(1) for group in cells.split(4 * inputs // outputs, dim=1)], dim=1)
    assert error(down(x), unshuffled(conv(x, down.conv, padding=1)) + shortcut) < 1e-10
    assert error(channel_mean(cells, outputs), shortcut) < 1e-12
    up, y = random_(Upsample(outputs, inputs)), torch.randn(1, outputs, 2, 3).double()
    repeated = torch.stack([y[:, c * outputs // (4 * inputs)] for c in range(4 * inputs)], dim=1)
    assert error(unshuffled(up(y)), conv(y, up.conv, padding=1) + repeated) < 1e-10


def test_stage_zero_with_blocks():
    """Depth > 0 in stage 0: a plain convolution at full resolution on both ends, with one more resampling."""
    config = DCHTConfig(
        codebook_size=16,
        latent_channels=4,
        widths=(8, 16, 32),
        encoder_depths=(1, 1, 1),
        decoder_depths=(2, 1, 1),
        blocks=("res", "res", "efficientvit"),
        encoder_norm="layer_norm",
        decoder_norms=("batch_norm", "batch_norm", "layer_norm"),
        decoder_acts=("relu", "relu", "silu"),
    )
    assert config.compression == 4
    torch.manual_seed(0)
    model = DCHT(config).eval()
    image = torch.rand(2, 3, 12, 20) * 2 - 1
    encoder, decoder = model.encoder, model.decoder
    x = conv(image, encoder.project_in, padding=1)
    assert x.shape == (2, 8, 12, 20)
    x = encoder.stages[0][1](encoder.stages[0][0](x))
    x = encoder.stages[1][1](encoder.stages[1][0](x))
    x = encoder.stages[2][0](x)
    last = encoder.project_out
    z = conv(x, last.conv, padding=1) + torch.stack([g.mean(1) for g in x.split(8, dim=1)], dim=1)
    with torch.no_grad():
        tokens = model.encode(image)
        assert tokens.ids.shape == (2, 3, 5)
        assert error(tokens.features, F.normalize(z, dim=1)) < 1e-5
        y = tokens.features
        y = conv(y, decoder.project_in.conv, padding=1) + y.repeat_interleave(8, dim=1)
        for i in (2, 1, 0):
            for layer in decoder.stages[i]:
                y = layer(y)
        assert [type(layer).__name__ for layer in decoder.stages[0]] == ["Upsample", "ResBlock", "ResBlock"]
        y = conv(F.relu(channel_norm(y, decoder.norm)), decoder.project_out, padding=1)
        assert y.shape == image.shape
        assert error(model.decode(tokens.features), y) < 1e-5
    only_decoder = DCHT(DCHTConfig(**{**config.to_dict(), "encoder_depths": (0, 1, 1)})).eval()
    assert only_decoder.encode(image).ids.shape == (2, 3, 5)


# The quantiser


def quantizer(codes: int = 24, channels: int = 5, seed: int = 0) -> Quantizer:
    torch.manual_seed(seed)
    return Quantizer(codes, channels)


def test_codes_start_uniform():
    weight = quantizer(512, 64).embedding.weight
    assert weight.abs().max() <= 1 / 512 and weight.abs().max() > 0.99 / 512
    assert abs(weight.std().item() * 512 * math.sqrt(3) - 1) < 0.02


def test_nearest_code_by_brute_force():
    model, z = quantizer(), torch.randn(2, 5, 3, 4)
    tokens = model(z)
    codes = [w / w.norm() for w in model.embedding.weight.detach().double()]
    for b in range(2):
        for i in range(3):
            for j in range(4):
                feature = z[b, :, i, j].double() / z[b, :, i, j].double().norm()
                scores = [(feature @ code).item() for code in codes]
                best = scores.index(max(scores))
                assert tokens.ids[b, i, j] == best
                assert error(tokens.features[b, :, i, j], feature) < 1e-6
                assert error(tokens.quantized[b, :, i, j], codes[best]) < 1e-6
                assert error(tokens.residual[b, 4 * i + j], feature - codes[best]) < 1e-6


def test_ties_take_the_lowest_index_and_lengths_do_not_matter():
    model = quantizer(6, 4)
    direction = torch.tensor([0.5, -1.0, 2.0, 0.25])
    with torch.no_grad():
        model.embedding.weight[[1, 3, 5]] = direction * torch.tensor([[4.0], [1.0], [0.5]])
    tokens = model((direction * 1e3)[None, :, None, None])
    assert tokens.ids.item() == 1
    assert error(tokens.residual, torch.zeros(1, 1, 4)) < 1e-6


def test_losses_are_the_formulas():
    model, z = quantizer(), torch.randn(2, 5, 3, 4)
    tokens = model(z)
    squared = (F.normalize(z, dim=1).double() - tokens.quantized.double()).square().mean().item()
    assert tokens.losses["commitment_loss"].item() == pytest.approx(0.25 * squared, rel=1e-5)
    assert tokens.losses["codebook_loss"].item() == pytest.approx(squared, rel=1e-5)
    assert tokens.losses["quantizer_loss"].item() == pytest.approx(1.25 * squared, rel=1e-5)
    assert set(tokens.losses) == set(LOSSES)


def test_straight_through_gradient():
    model, z = quantizer(), torch.randn(2, 5, 3, 4, requires_grad=True)
    tokens = model(z)
    seen = torch.randn_like(tokens.quantized)
    through, weight = torch.autograd.grad(
        (tokens.quantized * seen).sum(), (z, model.embedding.weight), retain_graph=True, allow_unused=True
    )
    direct = torch.autograd.grad((tokens.features * seen).sum(), z, retain_graph=True)[0]
    assert torch.equal(through, direct) and direct.abs().max() > 0, "d quantized / d features is the identity"
    assert weight is None, "the codebook learns from its own loss alone"
    with torch.no_grad():
        values = F.normalize(model.embedding.weight, dim=1)[tokens.ids].permute(0, 3, 1, 2)
    assert torch.equal(tokens.quantized.detach(), values), "the values are the codes, exactly"
    assert not tokens.residual.requires_grad


def test_gradients_of_the_losses():
    model, z = quantizer(), torch.randn(2, 5, 3, 4, requires_grad=True)
    losses = model(z).losses
    weight = model.embedding.weight

    def gradient(loss, of):
        return torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)[0]

    assert gradient(losses["codebook_loss"], z) is None, "codebook loss leaves the encoder alone"
    assert gradient(losses["commitment_loss"], weight) is None, "commitment loss leaves the codebook alone"
    tokens = model(z)

    def by_hand(features, codes):
        return (features - codes).square().mean()

    codes = F.normalize(weight, dim=1)[tokens.ids].permute(0, 3, 1, 2)
    features = F.normalize(z, dim=1)
    expected = gradient(by_hand(features.detach(), codes), weight)
    assert expected.abs().max() > 0
    assert error(gradient(losses["codebook_loss"], weight), expected) < 1e-7
    expected = gradient(0.25 * by_hand(features, codes.detach()), z)
    assert expected.abs().max() > 0
    assert error(gradient(losses["commitment_loss"], z), expected) < 1e-7
    both = losses["commitment_loss"] + losses["codebook_loss"]
    for of in (z, weight):
        assert error(gradient(losses["quantizer_loss"], of), gradient(both, of)) == 0


def test_a_frozen_codebook_still_trains_the_encoder():
    model, z = quantizer(), torch.randn(1, 5, 2, 2, requires_grad=True)
    model.requires_grad_(False)
    tokens = model(z)
    tokens.losses["quantizer_loss"].backward()
    assert z.grad.abs().max() > 0 and model.embedding.weight.grad is None


def test_the_lookup_is_an_argument():
    calls = []

    def lookup(z, codebook):
        calls.append((z, codebook))
        assert not z.requires_grad and not codebook.requires_grad
        ids = torch.full((len(z),), 7)
        codes = F.normalize(codebook, dim=1)[ids]
        return ids, codes, F.normalize(z, dim=1) - codes

    config = DCHTConfig(**{**settings("tokenizer")["config"]})
    model = DCHT(config, lookup=lookup).eval()
    tokens = model.encode(torch.rand(2, 3, 64, 96).double())
    assert tokens.ids.tolist() == [[[7] * 3] * 2] * 2
    assert len(calls) == 1 and calls[0][0].shape == (12, 8) and calls[0][1].shape == (64, 8)
    assert calls[0][0].dtype == calls[0][1].dtype == torch.float32


def test_training_step_reaches_every_parameter():
    model = copy.deepcopy(tokenizer()).train()
    tokens = model.encode(vectors("tokenizer")["case/0/image"])
    loss = model.decode(tokens.quantized).square().mean() + tokens.losses["quantizer_loss"]
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name

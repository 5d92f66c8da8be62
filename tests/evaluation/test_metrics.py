"""PSNR, SSIM, FID and the evaluation of reconstructions, against formulas spelled out, and Inception's structure."""

import json
import logging
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dcar_fast import DCHT, DCARPipeline
from dcar_fast.config import preset
from dcar_fast.evaluation import metrics
from dcar_fast.evaluation.inception import Inception, _resize_tensorflow, load_inception
from dcar_fast.evaluation.metrics import Fid, evaluate_reconstruction, fid, psnr, ssim
from dcar_fast.evaluation.pictures import PictureFolder, held_out_shapes
from dcar_fast.evaluation.settings import FidEvaluation, ReconstructionEvaluation


class Features(nn.Module):
    """A small network in Inception's place: average colours of the quarters."""

    num_features = 12

    def forward(self, images):
        return F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def _pictures(count, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def _frechet(a, b):
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), the root by the symmetric form A^(1/2) B A^(1/2)."""
    a, b = a.double().numpy(), b.double().numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    middle = np.linalg.eigvalsh(root @ second @ root)
    offset = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return offset + np.trace(first) + np.trace(second) - 2 * np.sqrt(np.clip(middle, 0, None)).sum()


def test_psnr_of_each_picture():
    images = _pictures(3)
    others = images.clone()
    others[1] = 255 - others[1]
    others[2, :, :16] = others[2, :, :16] ^ 1
    error = ((images.double() - others.double()) / 255).square().mean((1, 2, 3))
    found = psnr(others, images)
    assert math.isinf(found[0]) and torch.allclose(found[1:].double(), -10 * error[1:].log10())
    assert found[2] == pytest.approx(10 * math.log10(2 * 255**2), abs=1e-3)


def test_ssim_of_each_picture():
    """The definition, with a Gaussian window of sigma 1.5 and the constants 0.01^2 and 0.03^2, at one pixel."""
    images, others = _pictures(2, 11), _pictures(2, 11, seed=1)
    others[0] = images[0]
    found = ssim(others, images)
    assert found[0] == pytest.approx(1, abs=1e-6) and found[1] < 0.5 and found.shape == (2,)
    flat = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    expected = (2 * 100 * 150 / 255**2 + 1e-4) / ((100**2 + 150**2) / 255**2 + 1e-4)  # no variance
    assert float(ssim(flat, flat + 50)) == pytest.approx(expected, abs=1e-5)
    assert ssim(flat, flat).shape == (1,)


@pytest.mark.parametrize("score", [psnr, ssim])
def test_pairs_that_do_not_fit(score):
    with pytest.raises(ValueError, match="equally large"):
        score(_pictures(2), _pictures(3))
    with pytest.raises(ValueError, match="uint8"):
        score(_pictures(2).float(), _pictures(2))


def test_fid_is_the_frechet_distance_of_features():
    network, real, made = Features(), _pictures(60), _pictures(40, seed=1) // 2 + 20
    found = fid(real.split(7), made.split(9), network)
    assert found["fid"] == pytest.approx(_frechet(network(real), network(made)), rel=1e-4)
    assert (found["real_pictures"], found["generated_pictures"]) == (60, 40)
    assert fid(real.split(8), real.split(60), network)["fid"] == pytest.approx(0, abs=1e-6)


def test_fid_of_several_sets_and_too_few_pictures():
    meter = Fid(Features(), ("a", "b"))
    meter.add(_pictures(20), "real")
    meter.add(_pictures(20), "a")
    meter.add(_pictures(1), "b")
    with pytest.raises(ValueError, match="at least 2 b pictures, got 1"):
        meter.compute()
    meter.add(_pictures(20, seed=2), "b")
    found = meter.compute()
    assert found["a"] == pytest.approx(0, abs=1e-6) and found["b"] > 1e-3
    with pytest.raises(ValueError, match="num_features"):
        Fid(nn.Identity())


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return DCHT(preset("shapes").tokenizer)


def test_reconstructions(tokenizer):
    """Against the definition, batch sizes that do not matter, modes and statistics left as they were."""
    tokenizer.train()
    images = _pictures(5)
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    seen = []
    found = evaluate_reconstruction(tokenizer, images.split(2), Features(), seen.append)
    assert all(module.training for module in tokenizer.modules()) and seen == [2, 2, 1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tokenizer.state_dict().items())
    tokenizer.eval()
    with torch.no_grad():
        tokens = tokenizer.encode(images / 127.5 - 1)
        for path, latents in (("hybrid", tokens.features), ("discrete", tokens.quantized)):
            result = ((tokenizer.decode(latents) * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            assert found[path]["psnr"] == pytest.approx(float(psnr(result, images).mean()), abs=1e-3)
            assert found[path]["ssim"] == pytest.approx(float(ssim(result, images).mean()), abs=1e-3)
            assert found[path]["rfid"] == pytest.approx(
                _frechet(Features()(images), Features()(result)), rel=1e-2, abs=1e-4
            )
    counts = tokens.ids.flatten().bincount()
    shares = counts[counts > 0] / counts.sum()
    assert found["codebook"]["usage"] == len(shares) / tokenizer.config.codebook_size
    assert found["codebook"]["perplexity"] == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-5)
    assert found["pictures"] == 5 and "rfid" not in evaluate_reconstruction(tokenizer, [images])["hybrid"]
    with pytest.raises(ValueError, match="at least one picture"):
        evaluate_reconstruction(tokenizer, [])


def test_a_picture_that_comes_back_to_the_last_bit_counts_with_100_db(tokenizer, monkeypatch):
    images = _pictures(4)
    monkeypatch.setattr(metrics, "tensor_to_pixels", lambda _: images.permute(0, 2, 3, 1))
    found = evaluate_reconstruction(tokenizer, [images])
    assert found["hybrid"] == found["discrete"] == {"psnr": 100, "ssim": pytest.approx(1)}


@pytest.mark.parametrize("trained", [False, True])
def test_untrained_presets_say_so(trained, monkeypatch, caplog):
    made = DCARPipeline.from_preset("shapes", seed=0)
    made.trained = trained
    monkeypatch.setattr(DCARPipeline, "from_preset", lambda name: made)
    with caplog.at_level(logging.WARNING):
        ReconstructionEvaluation(count=1, size=32).run()
    assert ("shapes has untrained weights" in caplog.text) is not trained


def test_without_torchmetrics_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.functional.image", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[train\]'"):
        metrics.Fid(Features())


# ---- Inception


@pytest.fixture(scope="module")
def inception():
    """Random weights and statistics that keep the activations' size."""
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    return network


def test_inception_has_the_published_number_of_parameters(inception):
    """23,834,568 with 1000 classes, 2,049,000 of them in the last layer, which is not needed."""
    assert sum(p.numel() for p in inception.parameters()) == 23_834_568 - 2_049_000


def test_inceptions_blocks_and_pools(inception):
    """Widths as published; average pools leave the padding out, and the last block's pool is a maximum."""
    widths = {"5b": 256, "5c": 288, "5d": 288, "6a": 768, "6b": 768, "6e": 768, "7a": 1280, "7b": 2048, "7c": 2048}
    blocks = {name: getattr(inception, f"Mixed_{name}") for name in widths}
    image = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 255
    found = {}
    hooks = [
        block.register_forward_hook(lambda _, x, y, name=name: found.update({name: (x[0], y)}))
        for name, block in blocks.items()
    ]
    features = inception(image.to(torch.uint8))
    for hook in hooks:
        hook.remove()
    assert {name: y.shape[1] for name, (_, y) in found.items()} == widths
    assert [found[name][1].shape[2] for name in ("5b", "6a", "7a")] == [35, 17, 8]
    torch.testing.assert_close(features, found["7c"][1].mean(dim=(2, 3)))
    for name, (x, y) in found.items():
        block = blocks[name]
        if block.pool == "stride":
            expected = F.max_pool2d(x, 3, 2)
        elif name == "7c":
            expected = block.branch_pool(F.max_pool2d(x, 3, 1, 1))
        else:  # the sum of the pixels there are, over their number
            sums, counts = (F.avg_pool2d(t, 3, 1, 1, divisor_override=1) for t in (x, torch.ones_like(x)))
            expected = block.branch_pool(sums / counts)
        torch.testing.assert_close(y[:, -expected.shape[1] :], expected)


@pytest.mark.parametrize("resize", ["antialias", "tensorflow"])
def test_inception_sees_pixels_from_minus_one_to_one(inception, monkeypatch, resize):
    monkeypatch.setattr(inception, "resize", resize)
    seen = []
    hook = inception.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    inception(torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 80, 80).contiguous())
    lines = torch.arange(897).remainder(3).eq(1).mul(255).to(torch.uint8).expand(1, 3, 897, 897)
    inception(lines)
    hook.remove()
    for values, expected in zip(seen[0], (-1.0, 0.0, 127 / 128), strict=True):
        torch.testing.assert_close(values, torch.full((3, 299, 299), expected), rtol=0, atol=1e-5)
    # at a third of the size, every third line white: a third of the light, or without anti-aliasing the lines between
    inside = seen[1][..., 2:-2, 2:-2]
    torch.testing.assert_close(inside, torch.full_like(inside, 85 / 128 - 1 if resize == "antialias" else -1.0))


def test_inception_is_torchvisions_with_other_pools(inception, monkeypatch):
    """The same tensors; average pools leave the padding out and the last block takes a maximum."""
    models = pytest.importorskip("torchvision").models
    theirs = models.inception_v3(weights=None, aux_logits=False, init_weights=False, num_classes=1008).eval()
    theirs.fc = nn.Identity()
    assert theirs.state_dict().keys() == inception.state_dict().keys()
    theirs.load_state_dict(inception.state_dict())

    def average(x, kernel_size, stride, padding):
        if x.shape[1] == 2048:
            return F.max_pool2d(x, kernel_size, stride, padding)
        return F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)

    pools = types.SimpleNamespace(relu=F.relu, max_pool2d=F.max_pool2d, avg_pool2d=average)
    monkeypatch.setattr(models.inception, "F", pools)
    images = _pictures(2, 299)
    with torch.no_grad():
        expected = theirs((images.float() - 128) / 128)
    found = inception(images)
    assert found.shape == (2, 2048) and not inception.train().training
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    average_everywhere = types.SimpleNamespace(relu=F.relu, max_pool2d=F.max_pool2d, avg_pool2d=F.avg_pool2d)
    monkeypatch.setattr(models.inception, "F", average_everywhere)
    with torch.no_grad():  # the comparison can tell the two networks apart
        assert not torch.allclose(found, theirs((images.float() - 128) / 128), rtol=1e-3)


def test_tensorflows_resizing():
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    found = _resize_tensorflow(ramp)
    expected = torch.arange(299, dtype=torch.float64) * 64 / 299
    assert torch.allclose(found[0, 0, 7].double(), expected.clamp(max=63), atol=1e-4)
    assert torch.allclose(_resize_tensorflow(ramp.transpose(2, 3)), found.transpose(2, 3), atol=1e-5)
    same = torch.rand(1, 3, 299, 299)
    assert torch.equal(_resize_tensorflow(same), same)


def test_weights_come_from_a_local_file(inception, tmp_path):
    state = {name: t for name, t in inception.state_dict().items() if not name.endswith("num_batches_tracked")}
    path = tmp_path / "inception.pth"
    torch.save({**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    loaded = load_inception(path, "tensorflow")
    assert loaded.resize == "tensorflow"
    assert torch.equal(loaded.Mixed_7c.branch_pool.conv.weight, inception.Mixed_7c.branch_pool.conv.weight)
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(ValueError, match="torchvision"):
        load_inception(path)
    state.pop("Mixed_5b.branch1x1.conv.weight")
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"1 missing: Mixed_5b\.branch1x1\.conv\.weight"):
        load_inception(path)
    path.write_bytes(b"no checkpoint")
    for file in (path, tmp_path / "absent.pth", tmp_path / "absent.safetensors"):
        with pytest.raises(ValueError, match=file.name):
            load_inception(file)
    with pytest.raises(ValueError, match="resize"):
        load_inception(path, "bicubic")
    with pytest.raises(ValueError, match="uint8"):
        inception(torch.zeros(1, 3, 64, 64))


# ---- pictures and the commands


@pytest.fixture
def folder(tmp_path):
    """Five pictures of two sizes, one in a subfolder, and what is none."""
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    for i, (name, size) in enumerate([("a", (40, 32)), ("b", (40, 32)), ("more/c", (40, 32)), ("d", (64, 64))]):
        Image.fromarray(np.full((size[1], size[0], 3), 10 * i, np.uint8)).save(root / f"{name}.png")
    Image.fromarray(np.full((50, 70), 200, np.uint8)).save(root / "grey.jpg")
    (root / "broken.png").write_bytes(b"\x89PNG broken")
    (root / "notes.txt").write_text("no picture")
    return root


def test_folders_of_pictures(folder, caplog):
    pictures = PictureFolder(folder, batch_size=2)
    with caplog.at_level(logging.WARNING):
        batches = list(pictures)
    assert [tuple(b.shape) for b in batches] == [(2, 3, 32, 40), (1, 3, 64, 64), (1, 3, 50, 70), (1, 3, 32, 40)]
    assert [int(b[0, 0, 0, 0]) for b in batches] == [0, 30, 200, 20]
    assert [file.name for file in pictures.skipped] == ["broken.png"] and "broken.png is left out" in caplog.text
    assert [len(b) for b in PictureFolder(folder, 16, batch_size=3)] == [3, 2]
    assert sum(len(b) for b in PictureFolder(folder, 16, batch_size=3, count=4)) == 4
    with pytest.raises(ValueError, match="holds no pictures"):
        PictureFolder(_empty(folder))
    with pytest.raises(ValueError, match="must be a folder"):
        PictureFolder(folder / "a.png")


def _empty(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


def test_held_out_shapes_come_in_batches():
    batches = list(held_out_shapes(32, 3, 7, seed=5))
    assert [tuple(b.shape) for b in batches] == [(3, 3, 32, 32), (3, 3, 32, 32), (1, 3, 32, 32)]
    assert torch.equal(torch.cat(batches), torch.cat(list(held_out_shapes(32, 7, 7, seed=5))))


def test_the_command_for_reconstructions(folder, tmp_path, capsys, monkeypatch):
    found = ReconstructionEvaluation(data=str(folder), size=32, batch_size=2, output=tmp_path / "r.json").run()
    assert found["pictures"] == 5 and json.loads((tmp_path / "r.json").read_text()) == found
    with pytest.raises(ValueError, match="nowhere"):
        ReconstructionEvaluation(inception="nowhere.pth").run()
    output = capsys.readouterr().out
    assert "rFID is left out" in output and "PSNR" in output
    monkeypatch.setattr("dcar_fast.evaluation.inception.load_inception", lambda path, resize: Features())
    found = ReconstructionEvaluation(count=4, size=32, inception="weights.pth").run()
    assert found["hybrid"]["rfid"] > 0 and "far too high" in capsys.readouterr().out
    DCARPipeline.from_preset("shapes").save_pretrained(tmp_path / "model")
    assert ReconstructionEvaluation(tokenizer=str(tmp_path / "model"), count=2, size=32).run()["pictures"] == 2
    with pytest.raises(ValueError, match="size must be a multiple of 8"):
        ReconstructionEvaluation(size=60).run()
    with pytest.raises(ValueError, match=r"ReconstructionEvaluation\.count"):
        ReconstructionEvaluation(count=0)


def test_the_command_for_fid(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dcar_fast.evaluation.inception.load_inception", lambda path, resize: Features())
    settings = {"real": str(folder), "generated": str(folder), "inception": "weights.pth"}
    found = FidEvaluation(**settings, output=tmp_path / "fid.json").run()
    assert found["fid"] == pytest.approx(0, abs=1e-6) and found["real_pictures"] == 5
    assert [name.rpartition("/")[2] for name in found["left_out"]] == ["broken.png"] * 2
    assert json.loads((tmp_path / "fid.json").read_text()) == found and "FID 0.000" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"FidEvaluation\.inception must be a path"):
        FidEvaluation(**{**settings, "inception": ""})

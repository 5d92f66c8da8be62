"""Prompt to image, reconstruction, inpainting and variation, on the small preset with random weights."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from dcar_fast import DCARPipeline, FastSampler
from dcar_fast._progress import SamplingBar
from dcar_fast.config import SamplingConfig
from dcar_fast.ops.vq_lookup import vq_lookup

KNOWN = SamplingConfig().to_dict()


@pytest.fixture(scope="module")
def pipeline():
    return DCARPipeline.from_preset("shapes", seed=1)


@pytest.fixture(scope="module")
def lively(pipeline):
    """The same with a diffusion head that does something: its output layer starts at zero."""
    torch.manual_seed(0)
    for module in (pipeline.generator.head.final_layer, *pipeline.generator.head.res_blocks):
        torch.nn.init.normal_(module.adaLN_modulation[1].weight, std=0.05)
    torch.nn.init.normal_(pipeline.generator.head.final_layer.linear.weight, std=0.05)
    return pipeline


@pytest.fixture
def photo():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))


def _pixels(image):
    return np.array(image)


def test_images_depend_on_prompt_and_seed_alone(lively):
    prompts = [f"picture {i}" for i in range(5)]
    together = lively(prompts, seed=11, progress=False)
    batches = lively(prompts, seed=11, progress=False, batch_size=2)
    alone = lively(prompts[3], seed=14, progress=False)[0]
    for a, b in zip(together, batches, strict=True):
        assert np.abs(_pixels(a).astype(int) - _pixels(b)).max() <= 1  # equal tokens; rounding of one level
    assert np.abs(_pixels(together[3]).astype(int) - _pixels(alone)).max() <= 1
    assert np.abs(_pixels(together[0]).astype(int) - _pixels(together[1])).max() > 16
    other = lively(prompts[0], seed=12, progress=False)[0]
    assert np.abs(_pixels(together[0]).astype(int) - _pixels(other)).max() > 16


def test_seeds_are_recorded_and_reproduce(lively):
    first = lively("x", progress=False)[0]
    again = lively("x", seed=int(first.info["seed"]), progress=False)[0]
    assert np.array_equal(_pixels(first), _pixels(again))
    assert lively("x", progress=False)[0].info["seed"] != first.info["seed"]
    settings = json.loads(lively(["a", "b"], seed=[5, 9], num_steps=3, progress=False)[1].info["settings"])
    assert settings["num_steps"] == 3 and settings["guidance_scale"] == 4.5 and settings["dtype"] == "float32"


def test_the_pipelines_own_settings_hold_where_a_call_does_not_say(tmp_path, lively, photo):
    """They are saved along; a folder without them has the released sampler's."""

    def settings(image) -> SamplingConfig:
        return SamplingConfig.from_dict({k: v for k, v in json.loads(image.info["settings"]).items() if k in KNOWN})

    own = SamplingConfig(num_steps=3, guidance_scale=1.5, temperature=0.25, final_forward=True)
    DCARPipeline(*lively._models(), sampling=own).save_pretrained(tmp_path)
    loaded = DCARPipeline.from_pretrained(tmp_path)
    assert loaded.sampling == own and lively.sampling == SamplingConfig()
    image = loaded("x", seed=1, progress=False)[0]
    assert settings(image) == own
    given = own.to_dict()
    assert np.array_equal(_pixels(image), _pixels(lively("x", seed=1, progress=False, **given)[0]))
    mask = Image.new("L", photo.size, 255)
    for changed in (
        loaded("x", seed=1, progress=False, guidance_scale=4.5, final_forward=False)[0],
        loaded.inpaint(photo, mask, "x", progress=False, guidance_scale=4.5, final_forward=False),
        loaded.variation(photo, "x", progress=False, guidance_scale=4.5, final_forward=False),
    ):
        assert settings(changed) == SamplingConfig(num_steps=3, temperature=0.25)
    loaded.sampling = SamplingConfig(num_steps=2)
    assert settings(loaded("x", seed=1, progress=False)[0]) == SamplingConfig(num_steps=2)
    with pytest.raises(ValueError, match=r"PipelineConfig\.sampling must be a SamplingConfig, got \{'num_steps': 3\}"):
        loaded.sampling = {"num_steps": 3}
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sampling"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert DCARPipeline.from_pretrained(tmp_path).sampling == SamplingConfig()


def test_sizes(lively):
    image = lively("wide", seed=0, height=32, width=104, num_steps=2, progress=False)[0]
    assert image.size == (104, 32)
    assert lively("square", seed=0, num_steps=1, progress=False)[0].size == (64, 64)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"height": 500, "width": 512}, "height must be a multiple of 8 in 8..4096 pixels, got 500"),
        ({"width": 0}, "width must be a multiple of 8"),
        ({"width": 8192}, "width must be a multiple of 8"),
        ({"height": 64.0}, "height must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number >= 0, got nan"),
        ({"guidance_scale": -1}, "guidance_scale must be"),
        ({"num_steps": 0}, "num_steps must be 1..256, got 0"),
        ({"num_steps": 300}, "num_steps must be 1..256, got 300"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule must be one of"),
        ({"seed": -1}, "0 <= seed < 2\\^63, got -1"),
        ({"seed": 2**63}, "0 <= seed < 2\\^63"),
        ({"seed": [1, 2]}, "2 seeds came for 1 prompts"),
        ({"seed": "7"}, "seed must be an integer"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
    ],
)
def test_bad_options(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(["a prompt"], progress=False, **options)


@pytest.mark.parametrize(
    "prompts, message",
    [([], "got an empty list"), (["ok", 3], r"prompts\[1\] must be a string, got int"), (None, "list of strings")],
)
def test_bad_prompts(pipeline, prompts, message):
    with pytest.raises(ValueError, match=message):
        pipeline(prompts, progress=False)


def test_long_prompts_are_cut_with_one_warning(pipeline, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(pipeline("a" * 10_000, seed=0, num_steps=1, progress=False)) == 1
    cut = [r for r in caplog.records if "is cut to 128" in r.getMessage()]
    assert len(cut) == 1 and "10001 tokens" in cut[0].getMessage()


def test_untrained_weights_announce_themselves_once(caplog):
    fresh = DCARPipeline.from_preset("shapes", seed=0)
    with caplog.at_level(logging.WARNING):
        fresh("a", seed=0, num_steps=1, progress=False)
        fresh("a", seed=0, num_steps=1, progress=False)
    assert [r.getMessage() for r in caplog.records].count(
        "untrained weights: the images are noise, good for timing and tests only"
    ) == 1


def test_the_tokenizer_uses_the_ops_layer(pipeline):
    assert pipeline.tokenizer.quantizer.lookup is vq_lookup


def test_presets_are_reproducible_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b = DCARPipeline.from_preset("shapes", seed=3), DCARPipeline.from_preset("shapes", seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    again = DCARPipeline.from_preset("shapes", seed=3)
    assert torch.equal(a.generator.null_text, again.generator.null_text)
    assert torch.equal(a.text_encoder.t5.shared.weight, again.text_encoder.t5.shared.weight)
    assert not torch.equal(a.generator.null_text, b.generator.null_text)
    with pytest.raises(ValueError, match="preset must be one of"):
        DCARPipeline.from_preset("huge")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named():
    with pytest.raises(ValueError, match="device cuda cannot be used"):
        DCARPipeline.from_preset("shapes", device="cuda")
    with pytest.raises(ValueError, match="device gpu0 cannot be used"):
        DCARPipeline.from_preset("shapes", device="gpu0")


# ---- engines


@pytest.fixture
def both(lively):
    """Calls something with the fast engine and with the reference, and returns both results."""

    def call(function):
        results = []
        for engine in ("fast", "reference"):
            lively.engine = engine
            results.append(function(lively))
        return results

    yield call
    lively.engine = "fast"


def _close(a, b):
    return a.size == b.size and np.abs(_pixels(a).astype(int) - _pixels(b)).max() <= 1


def test_engines_draw_the_same(both):
    prompts = ["a red circle", "a much longer prompt about a blue square", "x"]
    fast, reference = both(lambda p: p.generate(p.encode_text(prompts), 3))
    assert torch.equal(fast.ids, reference.ids) and fast.ids.unique().numel() > 10
    assert (fast.residual - reference.residual).abs().max() < 1e-4
    fast, reference = both(lambda p: p(prompts, seed=3, progress=False))
    assert all(_close(a, b) for a, b in zip(fast, reference, strict=True))
    assert fast[0].info["software"].endswith(", fast engine")
    assert reference[0].info["software"].endswith(", reference engine")
    assert fast[0].info["settings"] == reference[0].info["settings"]


@pytest.mark.gpu
def test_engines_draw_the_same_on_a_gpu(lively):
    gpu = copy.deepcopy(lively).to("cuda")
    prompts = ["a red circle", "a much longer prompt about a blue square", "x"]
    samples, images = [], []
    for gpu.engine in ("fast", "reference"):
        samples.append(gpu.generate(gpu.encode_text(prompts), 3))
        images.append(gpu(prompts, seed=3, progress=False))
    assert torch.equal(samples[0].ids, samples[1].ids)
    for a, b in zip(*images, strict=True):
        assert np.abs(_pixels(a).astype(int) - _pixels(b)).mean() < 1  # convolutions may round to TF32


def test_engines_edit_the_same(both, photo):
    mask = Image.new("L", photo.size)
    mask.paste(255, (40, 16, 56, 32))
    options = {"seed": 2, "num_steps": 3, "progress": False}
    for call in (
        lambda p: p.reconstruct(photo),
        lambda p: p.reconstruct(photo, mode="discrete"),
        lambda p: p.inpaint(photo, mask, "a hole", **options),
        lambda p: p.variation(photo, "another", 0.5, **options),
    ):
        assert _close(*both(call))


def test_the_engine_is_what_runs(lively, photo, both, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the other engine")

    with monkeypatch.context() as patch:
        patch.setattr("dcar_fast._stages.ReferenceSampler.__call__", refuse)
        patch.setattr("dcar_fast.models.tokenizer.DCHT.decode_tokens", refuse)
        patch.setattr("dcar_fast.models.tokenizer.DCHT.decode", refuse)
        lively("x", seed=0, num_steps=1, progress=False)
        lively.reconstruct(photo)
    lively.engine = "reference"
    for name in ("FastSampler", "FastDecoder"):
        monkeypatch.setattr(f"dcar_fast._stages.{name}", refuse)
    lively("x", seed=0, num_steps=1, progress=False)
    lively.reconstruct(photo)


def test_the_sampler_is_told_the_lengths(lively, monkeypatch):
    seen = []
    call = FastSampler.__call__

    def spy(self, *args, **options):
        seen.append(options["lengths"])
        return call(self, *args, **options)

    monkeypatch.setattr(FastSampler, "__call__", spy)
    lively(["ab", "abcd"], seed=0, num_steps=1, progress=False)
    assert seen == [(3, 5)]


def test_choosing_an_engine(lively, tmp_path):
    parts = (lively.tokenizer, lively.generator, lively.text_encoder)
    assert DCARPipeline(*parts).engine == "fast" and DCARPipeline(*parts, engine="reference").engine == "reference"
    assert DCARPipeline.from_preset("shapes", engine="reference").engine == "reference"
    lively.save_pretrained(tmp_path)
    assert DCARPipeline.from_pretrained(tmp_path, engine="reference").engine == "reference"
    message = r"engine must be one of \('fast', 'reference'\), got 'slow'"
    for make in (
        lambda: DCARPipeline(*parts, engine="slow"),
        lambda: DCARPipeline.from_preset("shapes", engine="slow"),
        lambda: DCARPipeline.from_pretrained("/no/such/folder", engine="slow"),
        lambda: DCARPipeline.from_official("/no/a", "/no/b", engine="slow"),
        lambda: setattr(lively, "engine", "slow"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert lively.engine == "fast"


def test_the_bar_counts_steps_however_they_are_reported(capsys):
    for reports in ([1, 2, 3], [3]):
        with SamplingBar(True, 2, 3 + 2) as bar:
            for _ in range(2):
                for done in reports:
                    bar.step("unmask", done, 3)
                bar.step("head", 2, 2)
                bar.decoded()
        assert "12/12" in capsys.readouterr().err


# ---- reconstruction, inpainting, variation


def test_reconstruct_both_paths(lively, photo):
    hybrid, discrete = lively.reconstruct(photo), lively.reconstruct(photo, mode="discrete")
    assert hybrid.size == discrete.size == photo.size
    tokens = lively.tokenizer.encode(torch.from_numpy(_pixels(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1)
    for image, latents in ((hybrid, tokens.features), (discrete, tokens.quantized)):
        expected = ((lively.tokenizer.decode(latents)[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        assert np.abs(_pixels(image).astype(int) - expected.permute(1, 2, 0).numpy()).max() <= 1
    assert not np.array_equal(_pixels(hybrid), _pixels(discrete))
    with pytest.raises(ValueError, match="mode must be 'hybrid' or 'discrete', got 'both'"):
        lively.reconstruct(photo, mode="both")


def test_reconstruct_odd_sizes(lively):
    odd = Image.new("RGB", (61, 43), "red")
    assert lively.reconstruct(odd, pad=True).size == (61, 43)
    with pytest.raises(ValueError, match="multiples of 8, got 61 x 43; crop to 56 x 40 or pad"):
        lively.reconstruct(odd)
    with pytest.raises(ValueError, match="image must be a PIL image, got ndarray"):
        lively.reconstruct(_pixels(odd))


def test_inpaint_changes_only_what_the_mask_reaches(lively, photo, monkeypatch):
    mask = Image.new("L", photo.size)
    mask.paste(255, (40, 16, 56, 32))
    seen = {}
    generate = DCARPipeline.generate

    def spy(self, text, noise, sampling=None, grid=None, known=None, progress=None):
        seen["known"] = known
        seen["sample"] = generate(self, text, noise, sampling, grid, known, progress)
        return seen["sample"]

    monkeypatch.setattr(DCARPipeline, "generate", spy)
    result = lively.inpaint(photo, mask, "a hole", seed=4, progress=False)
    known, sample = seen["known"], seen["sample"]
    is_open = (known.ids == lively.config.generator.mask_id).view(8, 12)
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[1:5, 4:8] = True  # tokens 2..3 x 5..6 are overlapped, one more around
    assert torch.equal(is_open, expected)
    closed = ~is_open.flatten()
    assert torch.equal(sample.ids[0, closed], known.ids[0, closed])
    assert torch.equal(sample.residual[0, closed], known.residual[0, closed])
    assert not torch.equal(sample.residual[0, ~closed], known.residual[0, ~closed])
    zeroed = _pixels(photo).copy()
    zeroed[16:32, 40:56] = 0
    tensor = torch.from_numpy(zeroed).permute(2, 0, 1)[None].float() / 127.5 - 1
    tensor[:, :, 16:32, 40:56] = 0  # zero in [-1, 1], not black
    assert torch.equal(lively.tokenizer.encode(tensor).ids.flatten()[closed], known.ids[0, closed])
    assert result.size == photo.size and result.info["prompt"] == "a hole" and result.info["seed"] == "4"

    pasted = lively.inpaint(photo, mask, "a hole", seed=4, progress=False, paste=True)
    inside = _pixels(mask) > 0
    assert np.array_equal(_pixels(pasted)[~inside], _pixels(photo)[~inside])
    assert np.array_equal(_pixels(pasted)[inside], _pixels(result)[inside])


def test_inpaint_with_everything_kept_or_everything_open(lively, photo):
    kept = lively.inpaint(photo, Image.new("L", photo.size), "x", seed=0, progress=False)
    difference = _pixels(kept).astype(int) - _pixels(lively.reconstruct(photo))
    assert np.abs(difference).max() <= 1  # codes + residual instead of the features they came from
    everything = lively.inpaint(photo, Image.new("L", photo.size, 255), "x", seed=0, progress=False)
    new = lively("x", seed=0, height=64, width=96, progress=False)[0]
    assert np.array_equal(_pixels(everything), _pixels(new))


def test_inpaint_bad_input(lively, photo):
    with pytest.raises(ValueError, match=r"mask must be as large as the image .* \(96, 64\), got \(64, 64\)"):
        lively.inpaint(photo, Image.new("L", (64, 64)), "x", progress=False)
    with pytest.raises(ValueError, match="must be a string"):
        lively.inpaint(photo, Image.new("L", photo.size), None, progress=False)


@pytest.mark.parametrize("strength, opened", [(0.0, 0), (0.25, 24), (1.0, 96)])
def test_variation_opens_the_share_it_is_told(lively, photo, monkeypatch, strength, opened):
    seen = []
    generate = DCARPipeline.generate

    def spy(self, text, noise, sampling=None, grid=None, known=None, progress=None):
        seen.append(known.ids == self.config.generator.mask_id)
        return generate(self, text, noise, sampling, grid, known, progress)

    monkeypatch.setattr(DCARPipeline, "generate", spy)
    for seed in (0, 0, 1):
        lively.variation(photo, "x", strength, seed=seed, num_steps=2, progress=False)
    assert [int(mask.sum()) for mask in seen] == [opened] * 3
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2]) == (opened in (0, 96)), "the choice follows the seed"


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), "half"])
def test_variation_bad_strength(lively, photo, strength):
    with pytest.raises(ValueError, match="strength must be a number in 0..1"):
        lively.variation(photo, "x", strength, progress=False)


# ---- folders


def test_save_and_load_give_the_same_images(lively, tmp_path):
    lively.save_pretrained(tmp_path / "model")
    loaded = DCARPipeline.from_pretrained(tmp_path / "model")
    assert loaded.config == lively.config and loaded.trained is False
    a, b = lively("same", seed=2, progress=False)[0], loaded("same", seed=2, progress=False)[0]
    assert np.array_equal(_pixels(a), _pixels(b))


def test_a_folder_that_is_not_there(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="neither a folder nor a reachable hub repository"):
        DCARPipeline.from_pretrained("no-such-owner/no-such-model")
    with pytest.raises(ValueError, match="neither a folder nor a reachable hub repository"):
        DCARPipeline.from_pretrained("/no/such/folder/at/all")


def test_bfloat16_pipeline(lively):
    low = copy.deepcopy(lively).to(dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    image = low("x", seed=3, progress=False)[0]
    assert image.size == (64, 64) and json.loads(image.info["settings"])["dtype"] == "bfloat16"
    # the residual head and the quantiser's arithmetic are float32 or rounded once; compare what both must agree on
    tokens = low.tokenizer.encode(torch.zeros(1, 3, 64, 64))
    assert tokens.features.dtype == torch.float32
    assert torch.allclose(tokens.features.norm(dim=1), torch.ones(1, 8, 8), atol=1e-5)

"""The generator's training task: losses, what is trained and what is not, splits of a batch, exports, previews."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from PIL import Image
from torch.multiprocessing.spawn import spawn

from dcar_fast import DCARPipeline
from dcar_fast.config import SamplingConfig
from dcar_fast.sampling import ReferenceSampler
from dcar_fast.training.continuation import load_text_encoder
from dcar_fast.training.data.examples import Batch
from dcar_fast.training.generator import GeneratorTask, residual_scale
from dcar_fast.training.generator_loss import diffusion_draws
from dcar_fast.training.losses import diffusion_loss, random_token_mask, token_loss, token_weight
from dcar_fast.training.optimizers import decay_groups
from dcar_fast.training.previews import prompt_grid
from dcar_fast.training.task import Draws
from tests import tiny_t5
from tests.training.tiny_generator import (
    CAPTIONS,
    PlainRun,
    batch,
    models,
    settings,
    task,
)


def close(a, b, rtol=1e-5) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name] == pytest.approx(y[name], rel=rtol), name


def test_the_losses_are_the_formulas():
    """One step against the loss functions called by hand on the whole batch, with the draws made anew."""
    made = task(text_dropout=0.5)
    tokenizer, generator, encoder = made.tokenizer, made.trained.generator, made.text_encoder
    draws = Draws(3, 0, 8, 0, 8)
    with torch.no_grad():
        found = tokenizer.encode(batch().images.float() / 127.5 - 1)
        ids = found.ids.flatten(1)
        masked = random_token_mask(8, 16, draws.generator("mask"))
        dropped = torch.rand(8, generator=draws.generator("text_dropout")) < 0.5
        assert 0 < dropped.sum() < 8
        text = encoder(CAPTIONS)
        out = generator(torch.where(masked, 64, ids), text.states, text.mask, dropped)
        tokens = token_loss(out.logits, ids, masked, label_smoothing=0.1, unmasked_weight=0.1)
        timesteps, noise = diffusion_draws(draws, 2, 16, 8)
        diffusion = diffusion_loss(
            generator.head, out.hidden, found.residual, scale=0.2, multiplier=2, timesteps=timesteps, noise=noise
        )
    values = PlainRun(made, seed=3).train(1)[0]
    assert values["token_loss"] == pytest.approx(tokens.item(), rel=1e-5)
    assert values["diffusion_loss"] == pytest.approx(diffusion.item(), rel=1e-5)
    assert values["loss"] == pytest.approx(tokens.item() + diffusion.item(), rel=1e-5)
    right = (out.logits.argmax(-1) == ids) & masked
    assert values["masked_accuracy"] == pytest.approx((right.sum() / masked.sum()).item(), rel=1e-5)


def test_the_weights_of_the_losses_count():
    plain = PlainRun(task()).train(1)[0]
    changed = PlainRun(task(diffusion_weight=0.25, label_smoothing=0.0, unmasked_weight=0.0)).train(1)[0]
    assert changed["loss"] == pytest.approx(changed["token_loss"] + 0.25 * changed["diffusion_loss"], rel=1e-6)
    assert changed["diffusion_loss"] == plain["diffusion_loss"] and changed["token_loss"] != plain["token_loss"]


def test_parts_add_up_to_the_whole_token_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, 5, generator=generator)
    targets = torch.randint(5, (6, 9), generator=generator)
    masked = random_token_mask(6, 9, generator)
    options = {"label_smoothing": 0.1, "unmasked_weight": 0.3}
    total = token_weight(masked, 0.3)
    parts = [
        token_loss(logits[rows], targets[rows], masked[rows], total_weight=total, **options)
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts), token_loss(logits, targets, masked, **options))


def gradients(accumulation: int) -> dict[str, torch.Tensor]:
    """Of the first step; weights would not tell, as Adam makes full steps of gradients that are mere rounding."""
    run = PlainRun(task(), accumulation=accumulation)
    run.update = lambda name: torch.zeros(())
    run.train(1)
    return {name: p.grad for name, p in run.task.trained.named_parameters()}


def test_accumulation_changes_nothing():
    history, whole = PlainRun(task()).train(3), gradients(1)
    for accumulation in (2, 8):
        close(PlainRun(task(), accumulation=accumulation).train(3), history)
        parts = gradients(accumulation)
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    made = task(residual_scale=None, calibration=lambda: [batch()])
    run = PlainRun(made, world=2, rank=rank, accumulation=2)
    history = run.train(3)
    torch.save((history, made.state_dict()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_losses_of_one(tmp_path):
    spawn(_process, (str(tmp_path),), nprocs=2)
    (first, state), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    mean = [{name: (a[name] + b[name]) / 2 for name in a} for a, b in zip(first, second, strict=True)]
    alone = PlainRun(task(residual_scale=None, calibration=lambda: [batch()]))
    close(mean, alone.train(3))
    assert state == other == alone.task.state_dict()


def test_a_step_depends_on_the_seed_and_its_number_alone():
    run = PlainRun(task())
    run.step = 7
    skipped = run.train(1)[0]
    again = PlainRun(task())
    torch.rand(5)  # the global generator is not looked at
    again.step = 7
    assert again.train(1)[0] == skipped
    other = PlainRun(task(), seed=1)
    other.step = 7
    assert other.train(1)[0]["loss"] != skipped["loss"]


def test_diffusion_draws_are_tiled_and_belong_to_rows():
    whole = diffusion_draws(Draws(0, 4, 6, 0, 6), 3, 5, 2)
    assert whole[0].shape == (90,) and whole[0].dtype == torch.int64 and whole[1].shape == (90, 2)
    part = diffusion_draws(Draws(0, 4, 6, 2, 3), 3, 5, 2)
    assert torch.equal(part[0].view(3, 3, 5), whole[0].view(3, 6, 5)[:, 2:5])
    assert torch.equal(part[1].view(3, 3, 5, 2), whole[1].view(3, 6, 5, 2)[:, 2:5])
    many = diffusion_draws(Draws(0, 0, 64, 0, 64), 4, 64, 2)
    assert many[0].min() < 20 and many[0].max() > 979 and abs(many[0].float().mean() - 499.5) < 10
    assert abs(many[1].mean()) < 0.02 and abs(many[1].std() - 1) < 0.02
    assert len(many[0].view(4, -1).unique(dim=0)) == 4, "repetitions have draws of their own"


def test_share_of_dropped_texts_and_of_masked_tokens():
    dropped, shares = [], []
    for step in range(400):
        draws = Draws(0, step, 8, 0, 8)
        made_here = torch.rand(8, generator=draws.generator("text_dropout")) < 0.1
        dropped.append(made_here)
        shares.append(random_token_mask(8, 64, draws.generator("mask")).float().mean(dim=1))
    assert abs(torch.cat(dropped).float().mean() - 0.1) < 0.02  # 3.8 standard deviations
    # arccos(u) 2/pi has mean 2/pi and cumulative distribution 1 - cos(pi x / 2)
    shares = torch.cat(shares).sort().values
    expected = 1 - torch.cos(math.pi / 2 * shares)
    empirical = (torch.arange(len(shares)) + 0.5) / len(shares)
    assert (expected - empirical).abs().max() < 0.04  # 1/64 from rounding, 1.63 / sqrt(3200) at the 1 % level
    assert shares.min() >= 1 / 64


def test_all_texts_dropped_or_none(monkeypatch):
    seen = []
    for share in (0.0, 1.0):
        made = task(text_dropout=share)
        made.trained.generator.register_forward_pre_hook(lambda module, args: seen.append(args[3]))
        PlainRun(made).train(1)
    assert not seen[0].any() and seen[1].all()


def test_what_is_trained_and_what_is_not():
    made = task()
    before = {name: copy.deepcopy(module.state_dict()) for name, module in (("t", made.tokenizer), ("g", made.trained))}
    PlainRun(made).train(2)
    for name, tensor in made.tokenizer.state_dict().items():
        assert torch.equal(tensor, before["t"][name]), f"tokenizer.{name} changed"
    same = [n for n, tensor in made.trained.state_dict().items() if torch.equal(tensor, before["g"][n])]
    assert set(same) == {"generator.position", "generator.null_text"}
    assert not made.tokenizer.training and made.trained.training and not made.text_encoder.training


def test_the_byte_encoder_learns_only_from_rows_that_see_it():
    made = task(text_dropout=0.0)
    run = PlainRun(made)
    run.update = lambda name: torch.zeros(())
    run.train(1)
    gradients = [p.grad for p in made.text_encoder.parameters()]
    assert all(g is not None and g.any() for g in gradients)
    made = task(text_dropout=1.0)
    run = PlainRun(made)
    run.update = lambda name: torch.zeros(())
    run.train(1)
    assert not any(p.grad.any() for p in made.text_encoder.parameters())


def test_a_frozen_t5_stays_bit_equal(tmp_path):
    tiny_t5.save(tmp_path / "t5", d_model=16)
    tokenizer, generator, _ = models()
    encoder = load_text_encoder(tmp_path / "t5", max_length=24)
    made = GeneratorTask(settings(), tokenizer, generator, encoder, joint=False)
    before = copy.deepcopy(encoder.state_dict())
    first, second = PlainRun(made).train(2)
    assert first["loss"] != second["loss"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert made.frozen["text_encoder"] is encoder and not any(p.requires_grad for p in encoder.parameters())
    assert not any(name.startswith("text_encoder") for name, _ in made.trained.named_parameters())
    made.export(tmp_path / "out")
    loaded = DCARPipeline.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.text_encoder.state_dict().items())


def test_weight_decay_spares_embeddings_biases_and_norms():
    made = task()
    names = {id(p): name for name, p in made.trained.named_parameters()}
    decayed, others = decay_groups(made.trained)
    assert {id(p) for p in (*decayed, *others)} == set(names) and len(decayed) + len(others) == len(names)
    spared = {names[id(p)] for p in others}
    for part in (
        "token_embedding.weight",
        "to_logits.bias",
        "shared.weight",
        "relative_attention_bias",
        "in_ln.weight",
    ):
        assert any(part in name for name in spared), part
    assert all(p.ndim == 2 for p in decayed)
    assert {"generator.to_logits.weight", "generator.head.input_proj.weight"} <= {names[id(p)] for p in decayed}
    groups = made.optimizers()["generator"].param_groups
    assert [g["weight_decay"] for g in groups] == [0.03, 0.0] and groups[0]["betas"] == (0.9, 0.95)


def test_the_residual_scale_is_measured_once():
    calls = []

    def calibration():
        calls.append(1)
        return [batch(range(4)), batch(range(4, 8))]

    made = task(residual_scale=None, calibration=calibration)
    assert made.state_dict() == {}
    run = PlainRun(made)
    run.train(2)
    with torch.no_grad():
        expected = made.tokenizer.encode(batch().images.float() / 127.5 - 1).residual.double().std(correction=0)
    assert made.trained.generator.config.head_scale == pytest.approx(expected.item(), rel=1e-6) and calls == [1]
    resumed = task(residual_scale=None, calibration=calibration)
    resumed.load_state_dict(made.state_dict())
    PlainRun(resumed).train(1)
    assert resumed.trained.generator.config == made.trained.generator.config and calls == [1]


@pytest.mark.parametrize("values", [[], [torch.ones(2, 3)]])
def test_residuals_without_spread(values):
    with pytest.raises(ValueError, match="residual_scale: . residual values have no spread"):
        residual_scale(values)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="calibration must give batches"):
        task(residual_scale=None)
    tokenizer, generator, encoder = models(num_tokens=16, text_dim=20)
    with pytest.raises(ValueError, match="generator's text width is 20, its partner's is 16"):
        GeneratorTask(settings(), tokenizer, generator, encoder, joint=True)
    run = PlainRun(task())
    large = batch()
    large.images = large.images.repeat(1, 1, 2, 2)
    with pytest.raises(ValueError, match="64 tokens, the model is for num_tokens = 16"):
        run.task.train_step(run, [large])
    with pytest.raises(ValueError, match="a batch has 3 rows instead of 8"):
        run.task.train_step(run, [batch(range(3))])
    empty = batch()
    empty.images = None
    with pytest.raises(ValueError, match="neither pictures nor cached tokens"):
        run.task.train_step(run, [empty])


def test_it_overfits_a_batch_and_samples_it(tmp_path):
    """The eight pictures come back from their captions, through the sampler and an exported folder."""
    made = task(text_dropout=0.1, label_smoothing=0.0)
    for group in (run := PlainRun(made)).optimizers["generator"].param_groups:
        group["lr"] = 4e-3
    history = run.train(400)
    assert history[0]["token_loss"] > 4.0 and sum(v["token_loss"] for v in history[-20:]) / 20 < 0.2
    assert sum(v["diffusion_loss"] for v in history[-20:]) < 0.7 * sum(v["diffusion_loss"] for v in history[:20])
    made.export(tmp_path)
    pipeline = DCARPipeline.from_pretrained(tmp_path)
    assert pipeline.trained and pipeline.generator.config.head_scale == 0.2
    text = pipeline.encode_text(list(CAPTIONS))
    sample = ReferenceSampler(pipeline.generator, SamplingConfig(guidance_scale=1.0))(text.states, text.mask, noise=0)
    wanted = made.tokenizer.encode(batch().images.float() / 127.5 - 1).ids.flatten(1)
    assert (sample.ids == wanted).float().mean() > 0.95


def test_exports_in_half_precision(tmp_path):
    made = task(export_dtype="float16")
    made.export(tmp_path)
    loaded = DCARPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    for name, tensor in made.trained.generator.state_dict().items():
        torch.testing.assert_close(loaded.generator.state_dict()[name], tensor.half().float(), rtol=0, atol=0)
    assert torch.equal(loaded.tokenizer.quantizer.embedding.weight, made.tokenizer.quantizer.embedding.weight)
    assert made.trained.generator.to_logits.weight.dtype == torch.float32, "the trained one is left alone"
    assert loaded.text_encoder.t5.shared.weight.dtype == torch.float32
    sizes = (tmp_path / "generator.safetensors").stat().st_size
    made.settings = settings()
    made.export(tmp_path)
    assert (tmp_path / "generator.safetensors").stat().st_size > 1.8 * sizes
    images = DCARPipeline.from_pretrained(tmp_path)(["x"], seed=0, num_steps=2, progress=False)
    assert images[0].size == (16, 16)


def test_previews_are_samples_of_the_prompts_and_change_nothing():
    made = task()
    run = PlainRun(made)
    first = made.preview(run)["samples"]
    assert made.preview(run)["samples"].tobytes() == first.tobytes(), "seeds are fixed"
    assert made.trained.training and made.trained.generator.training and not made.trained.text_encoder.training
    before = PlainRun(task()).train(1)
    assert run.train(1) == before
    assert first.tobytes() != made.preview(run)["samples"].tobytes()
    assert task(preview_prompts=()).preview(run) == {}


def test_prompt_grid_has_pictures_and_prompts():
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    grid = prompt_grid(images, ["a", "long words " * 20, "unbreakable" * 30])
    pixels = grid.load()
    width = 128 + 12
    assert grid.size == (2 * width, 2 * (width + 64))
    assert pixels[70, 70] == (255, 0, 0) and pixels[width + 70, 70] == (0, 128, 0)
    assert pixels[70, width + 64 + 70] == (0, 0, 255) and pixels[width + 70, width + 64 + 70] == (255, 255, 255)
    below = grid.crop((6, 134, 134, width + 60)).convert("L")
    assert below.getextrema()[0] < 100, "the prompt is written"
    with pytest.raises(ValueError, match="got 3 and 1 prompts"):
        prompt_grid(images, ["a"])
    with pytest.raises(ValueError, match="at least one"):
        prompt_grid([], [])


def test_cut_captions_are_announced_once(caplog):
    made = task()
    with caplog.at_level("WARNING"):
        for _ in range(3):
            made.text(Batch(["a", "b"], ["long " * 20, "longer " * 20]), torch.device("cpu"))
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1 and "is cut to 24" in said[0] and "without a word" in said[0]
        made.text_encoder(["long " * 20])
    assert len(caplog.records) == 2, "elsewhere every one is still announced"

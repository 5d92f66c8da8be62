"""A step of the tokenizer's training: stages, paths, losses, codes, and the same losses however a batch is split."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dcar_fast.checkpoints import read_tokenizer
from dcar_fast.training.codebook import codebook_statistics
from dcar_fast.training.data.examples import Batch
from dcar_fast.training.discriminator import adversarial_loss, hinge_loss
from dcar_fast.training.task import Draws
from dcar_fast.training.tokenizer_model import StagedTokenizer, psnr
from tests.training.tokenizer_cases import GLOBAL_BATCH, PlainRun, config, dcht, pictures, task
from tests.training.two_processes import in_two_processes

GAN = {"gan_weight": 0.5}


def images(seed: int = 0) -> torch.Tensor:
    return pictures(seed=seed).float() / 127.5 - 1


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- what each stage reconstructs and trains


def test_continuous_stage_never_calls_the_quantizer():
    made = task("continuous")
    before = state_of(made.dcht.quantizer)
    made.dcht.quantizer.lookup = None
    run = PlainRun(made)
    metrics = run.take(pictures())
    assert not any("code" in name or name == "quantizer" for name in metrics)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.dcht.quantizer.state_dict().items())


def test_continuous_stage_decodes_the_normalised_features():
    staged = StagedTokenizer(dcht(), "continuous").eval()
    expected, _ = staged.dcht(images())
    got = staged(images(), torch.zeros(GLOBAL_BATCH, dtype=torch.bool))
    torch.testing.assert_close(got["reconstruction"], expected, rtol=0, atol=1e-6)


def test_each_picture_takes_its_own_path():
    staged = StagedTokenizer(dcht(), "alternate").eval()
    hybrid, tokens = staged.dcht(images())
    discrete = staged.dcht.decode_tokens(tokens.ids)
    assert (hybrid - discrete).abs().amin(dim=0).max() > 1e-3
    continuous = torch.tensor([True, False, False, True])
    got = staged(images(), continuous)["reconstruction"]
    torch.testing.assert_close(got[continuous], hybrid[continuous], rtol=0, atol=1e-6)
    torch.testing.assert_close(got[~continuous], discrete[~continuous], rtol=0, atol=1e-6)


def test_paths_are_fair_and_a_function_of_the_row():
    made = task("alternate")
    whole = made._paths(Draws(3, 7, 4096, 0, 4096), filling=False)
    assert abs(whole.float().mean().item() - 0.5) < 0.03  # 4 standard deviations
    assert torch.equal(made._paths(Draws(3, 7, 4096, 1000, 50), filling=False), whole[1000:1050])
    assert not torch.equal(made._paths(Draws(3, 8, 4096, 0, 4096), filling=False), whole)
    assert not task("discrete")._paths(Draws(3, 7, 8, 0, 8), filling=False).any()
    assert task("continuous")._paths(Draws(3, 7, 8, 0, 8), filling=False).all()


def test_alternate_stage_trains_the_decoder_alone():
    made = task("alternate", **GAN)
    parts = {"encoder": made.dcht.encoder, "quantizer": made.dcht.quantizer, "decoder": made.dcht.decoder}
    before = {name: state_of(part) for name, part in parts.items()}
    run = PlainRun(made)
    trained = {id(p) for group in run.optimizers["tokenizer"].param_groups for p in group["params"]}
    assert trained == {id(p) for p in made.dcht.decoder.parameters()}
    made.staged.train()
    assert not made.dcht.encoder.training and not made.dcht.quantizer.training and made.dcht.decoder.training
    for step in range(3):
        run.take(pictures(seed=step))
    for name in ("encoder", "quantizer"):
        assert all(torch.equal(before[name][key], value) for key, value in parts[name].state_dict().items())
        assert not any(p.requires_grad for p in parts[name].parameters())
    after = parts["decoder"].state_dict()
    assert not any(torch.equal(before["decoder"][key], value) for key, value in after.items() if "weight" in key)
    assert "decoder.stages.0.0.norm.running_mean" not in after  # the names are the model's own
    running = [key for key in after if key.endswith("running_mean")]
    assert running and not any(torch.equal(before["decoder"][key], after[key]) for key in running)


def test_discrete_stage_trains_everything():
    made = task("discrete")
    before = state_of(made.dcht)
    PlainRun(made).take(pictures())
    after = made.dcht.state_dict()
    same = [n for n, p in made.dcht.named_parameters() if torch.equal(before[n], p)]
    assert same == [] and not torch.equal(before["quantizer.embedding.weight"], after["quantizer.embedding.weight"])


def test_weight_decay_spares_biases_norms_and_codes():
    made = task("discrete")
    decayed, others = made.optimizers()["tokenizer"].param_groups
    assert decayed["weight_decay"] == 0.01 and others["weight_decay"] == 0
    assert all(p.ndim == 4 for p in decayed["params"])
    assert any(p is made.dcht.quantizer.embedding.weight for p in others["params"])
    assert sum(p.ndim == 4 for p in made.dcht.parameters()) == len(decayed["params"])


def test_straight_through_gradient():
    """The encoder receives the gradient at the codes as if it were that at its normalised outputs."""
    staged = StagedTokenizer(dcht(), "discrete")
    through_codes = staged.dcht.encode(images())
    weight = staged.dcht.encoder.project_in.conv.weight
    (got,) = torch.autograd.grad((through_codes.quantized**3).sum(), weight)
    features = F.normalize(staged.dcht.encoder(images()), dim=1)
    (expected,) = torch.autograd.grad((3 * through_codes.quantized.detach() ** 2 * features).sum(), weight)
    torch.testing.assert_close(got, expected)


def test_a_step_on_the_whole_graph_gives_the_same_gradients():
    """Handing the losses' gradients on at the pictures is the ordinary backward pass of their sum."""
    made = task("discrete", **GAN)
    run = PlainRun(made)
    kept = {}

    def update(name: str) -> torch.Tensor:
        kept[name] = [p.grad.clone() for p in made.modules[name].parameters()]
        return torch.zeros(())

    run.update = update
    values = made.train_step(run, [Batch([""] * GLOBAL_BATCH, [""] * GLOBAL_BATCH, pictures())])
    adaptive = values["adaptive_weight"]

    other = task("discrete", **GAN)
    judge = other.modules["discriminator"]
    found = other.staged(images(), torch.zeros(GLOBAL_BATCH, dtype=torch.bool))
    loss = F.mse_loss(found["reconstruction"], images()) + found["quantizer_loss"]
    loss = loss + 0.5 * adaptive * adversarial_loss(judge(found["reconstruction"]))
    torch.testing.assert_close(values["loss"], loss.detach(), rtol=1e-5, atol=1e-7)
    expected = torch.autograd.grad(loss, list(other.staged.parameters()))
    for got, wanted in zip(kept["tokenizer"], expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)
    loss = hinge_loss(judge(images()), judge(found["reconstruction"].detach()))
    for got, wanted in zip(kept["discriminator"], torch.autograd.grad(loss, list(judge.parameters())), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


# ---- losses


def test_reconstruction_is_mse_or_l1():
    for name, function in (("mse", F.mse_loss), ("l1", F.l1_loss)):
        made = task("continuous", reconstruction=name)
        wanted = function(made.staged(images(), torch.ones(GLOBAL_BATCH, dtype=torch.bool))["reconstruction"], images())
        metrics = PlainRun(task("continuous", reconstruction=name)).take(pictures())
        assert metrics["reconstruction"] == metrics["loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_the_discriminator_starts_when_it_is_told_to():
    made = task("discrete", gan_weight=0.5, gan_start=2)
    before = state_of(made.modules["discriminator"])
    run = PlainRun(made)
    for _ in range(2):
        assert not {"adversarial", "discriminator", "adaptive_weight"} & run.take(pictures()).keys()
    assert all(torch.equal(before[name], value) for name, value in made.modules["discriminator"].state_dict().items())
    metrics = run.take(pictures())
    assert {"adversarial", "discriminator", "adaptive_weight", "discriminator_gradient_norm"} <= metrics.keys()
    assert metrics["loss"] == pytest.approx(
        metrics["reconstruction"] + metrics["quantizer"] + 0.5 * metrics["adaptive_weight"] * metrics["adversarial"],
        rel=1e-5,
    )


def test_perceptual_loss_without_weights_is_announced_as_off(caplog):
    with caplog.at_level(logging.WARNING):
        made = task("continuous", lpips_weight=1.0)
    assert "LPIPS" in caplog.text and "off" in caplog.text and made.frozen == {}
    caplog.clear()
    task("continuous", lpips_weight=0.0)
    assert caplog.text == ""


def test_perceptual_loss_counts_and_reaches_the_decoder():
    made = task("continuous")
    object.__setattr__(made.settings, "lpips_weight", 2.0)
    made.perceptual = lambda mine, theirs: (mine - theirs).abs().mean()
    without = PlainRun(task("continuous")).take(pictures())
    metrics = PlainRun(made).take(pictures())
    assert metrics["loss"] == pytest.approx(metrics["reconstruction"] + 2 * metrics["perceptual"], rel=1e-6)
    assert metrics["gradient_norm"] > 1.2 * without["gradient_norm"]


def test_psnr():
    reference = torch.zeros(2, 3, 4, 4)
    off = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 5.0)])  # the second is cut off at 1
    torch.testing.assert_close(psnr(off, reference), torch.tensor([20.0, 10 * torch.log10(torch.tensor(4.0))]))
    assert psnr(reference, reference).tolist() == pytest.approx([100.0, 100.0])


# ---- codes


def test_codes_are_counted():
    made = task("discrete")
    used = made.dcht.encode(images()).ids.unique().numel()
    metrics = PlainRun(made).take(pictures())
    assert metrics["codebook_usage"] == pytest.approx(used / 24) and metrics["dead_codes"] == 24 - used
    assert 1 < metrics["codebook_perplexity"] <= used


def test_dead_codes_are_restarted_from_encoder_outputs():
    model = dcht()
    model.quantizer.embedding.weight.data[5:] = -model.quantizer.embedding.weight.data[:1]  # 5 is ahead of its twins
    made = task("discrete", model, restart_dead_codes_after=2)
    run = PlainRun(made)
    assert run.take(pictures())["restarted_codes"] == 0
    outputs = F.normalize(model.encoder(images()), dim=1).permute(0, 2, 3, 1).flatten(0, 2).detach()
    assert run.take(pictures())["restarted_codes"] >= 18
    codes = made.dcht.quantizer.embedding.weight.detach()
    restarted = codes[6:]  # never chosen, being later in the order
    assert (F.normalize(restarted, dim=1) @ outputs.T).amax(dim=1).min() > 1 - 1e-6
    moments = run.optimizers["tokenizer"].state[made.dcht.quantizer.embedding.weight]
    assert (moments["exp_avg"][6:] == 0).all()
    fresh = (moments["exp_avg"] == 0).all(dim=1)  # they are as long as the others: a step turns them as far
    length = codes[~fresh].norm(dim=1).mean()
    assert length > 1.5 and (~fresh).sum() >= 2
    torch.testing.assert_close(codes[fresh].norm(dim=1), length.expand(int(fresh.sum())))
    assert PlainRun(task("discrete", dcht())).take(pictures()).get("restarted_codes") is None


def test_a_codebook_is_filled_with_encoder_outputs_over_the_first_steps():
    model = dcht(codebook_size=100)  # 64 cells a batch
    made = task("discrete", model, fill_codebook=True)
    run = PlainRun(made)
    found = []
    for seed in range(2):
        outputs = F.normalize(model.encoder(images(seed)), dim=1).permute(0, 2, 3, 1).flatten(0, 2).detach()
        before = model.quantizer.embedding.weight.detach().clone()
        metrics = run.take(pictures(seed=seed))
        rows = model.quantizer.embedding.weight.detach()[64 * seed : 64 * seed + 64]
        torch.testing.assert_close((rows @ outputs.T).amax(dim=1), torch.ones(len(rows)))
        assert len(rows.unique(dim=0)) == len(rows) == (64, 36)[seed]
        assert metrics["loss"] == pytest.approx(metrics["reconstruction"])  # steps of the continuous stage
        found.append(before)
    assert torch.equal(found[1][64:], found[0][64:])
    metrics = run.take(pictures())
    assert metrics["loss"] == pytest.approx(metrics["reconstruction"] + metrics["quantizer"])
    assert not task("alternate", fill_codebook=True).fill_codebook


# ---- the same step however it is split

SLOW = {"discriminator": {"learning_rate": 1e-5}}  # the mean of its logits is near 0, its rounding is not
SPLIT = {
    "continuous": {"stage": "continuous"},
    "discrete": {"stage": "discrete", "gan_weight": 0.5, "gan_start": 1, "restart_dead_codes_after": 2, **SLOW},
    "filled": {"stage": "discrete", "fill_codebook": True},
    "alternate": {"stage": "alternate", "gan_weight": 0.5, "reconstruction": "l1", **SLOW},
}
PLAIN = {"decoder_norms": ("layer_norm",) * 3}
"""Without BatchNorm, whose statistics are those of a micro-batch."""


def three_steps(name: str, micro_batches: int, changes: dict) -> list:
    """Metrics of three steps, and all tensors of the models after them."""
    made = task(model=dcht(**changes), **SPLIT[name])
    run = PlainRun(made, micro_batches)
    steps = [run.take(pictures(seed=seed)) for seed in range(3)]
    state = state_of(made.dcht)
    return [steps, state | made.state_dict()]


def all_cases() -> dict[str, list]:
    return {name: three_steps(name, 1, {}) for name in SPLIT} | {"accumulated": three_steps("filled", 2, PLAIN)}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict[str, list]]:
    return in_two_processes(all_cases, tmp_path_factory.mktemp("shares"))


def compare(got: list, expected: list) -> None:
    for mine, theirs in zip(got[0], expected[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    for name, tensor in expected[1].items():
        torch.testing.assert_close(got[1][name], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", SPLIT)
def test_two_processes_take_the_step_of_one(two_processes, name):
    expected = three_steps(name, 1, {})
    for found in two_processes:
        compare(found[name], expected)


def test_the_processes_agree_to_the_last_bit(two_processes):
    first, second = two_processes
    for name in SPLIT:
        for key, tensor in first[name][1].items():
            assert torch.equal(tensor, second[name][1][key]), (name, key)


@pytest.mark.parametrize("name", ["continuous", "filled"])
def test_micro_batches_take_the_step_of_one_batch(name):
    compare(three_steps(name, 2, PLAIN), three_steps(name, 1, PLAIN))


def test_micro_batches_in_two_processes(two_processes):
    compare(two_processes[0]["accumulated"], three_steps("filled", 1, PLAIN))


# ---- preview, export, refusals


def test_preview_shows_three_rows_and_changes_nothing():
    made = task("alternate")
    run = PlainRun(made)
    before = state_of(made.dcht)
    grid = made.preview(run)["reconstructions"]
    assert grid.size == (2 * 18 + 2, 3 * (14 + 16 + 2) + 2)
    assert made.dcht.decoder.training and not made.dcht.encoder.training
    assert all(torch.equal(before[name], tensor) for name, tensor in made.dcht.state_dict().items())
    original = torch.from_numpy(np.array(grid))[14:30, 2:18].permute(2, 0, 1)
    assert torch.equal(original, pictures(2, seed=9)[0])


def test_export_is_a_folder_with_what_was_measured(tmp_path):
    made = task("discrete")
    PlainRun(made).take(pictures())
    made.export(tmp_path)
    loaded, details = read_tokenizer(tmp_path)
    assert loaded.config == config() and not loaded.training and made.dcht.training
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in made.dcht.state_dict().items())
    measured = [pictures(2, seed=7), pictures(1, seed=8)]
    expected = codebook_statistics(loaded, [images.float() / 127.5 - 1 for images in measured])
    assert details == {"stage": "discrete"} | {name: pytest.approx(value) for name, value in expected.items()}
    assert details["residual_std"] > 0.01


def test_export_of_the_continuous_stage_measures_no_codes(tmp_path):
    task("continuous").export(tmp_path)
    assert read_tokenizer(tmp_path)[1] == {"stage": "continuous"}


def test_batches_without_pictures_or_of_the_wrong_size_are_refused():
    made = task("continuous")
    run = PlainRun(made)
    with pytest.raises(ValueError, match="cache of tokens has none"):
        made.train_step(run, [Batch(["a"] * 4, [""] * 4)])
    with pytest.raises(ValueError, match="3 rows instead of 4"):
        made.train_step(run, [Batch(["a"] * 3, [""] * 3, pictures(3))])


def test_unknown_stages_are_refused():
    with pytest.raises(ValueError, match="stage must be one of .*'alternate'.*, got 'warm'"):
        StagedTokenizer(dcht(), "warm")

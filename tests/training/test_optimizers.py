"""Muon and AdamW as one optimiser, and which parameters each has."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dcar_fast.training.checkpoint import load_optimizer_state, optimizer_state
from dcar_fast.training.optimizers import MuonAdamW, make_optimizer
from dcar_fast.training.settings import OptimizerSettings
from tests.training.tiny_generator import PlainRun, task

SETTINGS = OptimizerSettings(method="muon", learning_rate=1e-2, betas=(0.8, 0.9), weight_decay=0.1)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 20))


def gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def muon_on_first(module: nn.Sequential) -> MuonAdamW:
    return make_optimizer(module, SETTINGS, muon=[module[0].weight])


def train(module: nn.Sequential, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        gradients(module, step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()


def test_an_update_is_an_orthogonal_matrix_of_the_stated_size():
    """Without momentum: the nearest orthogonal matrix by an SVD, times 0.2 sqrt(the longer side) and the rate. The
    iteration leaves singular values between about 0.7 and 1.2."""
    module = network()
    optimizer = MuonAdamW([{"params": [module[2].weight], "method": "muon"}], lr=0.5, betas=(0.9, 0.95))
    before = module[2].weight.detach().clone()
    gradients(module, 0)
    gradient = module[2].weight.grad.clone()
    optimizer.step()
    update = (before - module[2].weight.detach()) / (0.5 * 0.2 * 20**0.5)
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(update.flatten(), (u @ v).flatten(), dim=0) > 0.97
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.6 and values.max() < 1.3


def test_each_parameter_gets_the_update_of_its_optimiser():
    module, expected = network(), network()
    train(module, muon_on_first(module), range(4))
    matrix, others = expected[0].weight, [expected[0].bias, *expected[1].parameters(), expected[2].bias]
    parts = [
        torch.optim.Muon([matrix], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([expected[2].weight], betas=(0.8, 0.9), weight_decay=0.1),
        torch.optim.AdamW(others, betas=(0.8, 0.9), weight_decay=0.0),
    ]
    for step in range(4):
        gradients(expected, step)
        for part in parts:
            part.param_groups[0]["lr"] = 1e-2 / (1 + step)
            part.step()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
    assert not torch.equal(module[0].weight, network()[0].weight)


def test_training_continues_from_a_stored_state():
    whole, first = network(), network()
    train(whole, muon_on_first(whole), range(5))
    train(first, optimizer := muon_on_first(first), range(3))
    state, weights = copy.deepcopy(optimizer_state(first, optimizer)), copy.deepcopy(first.state_dict())
    second = network(1)
    optimizer = muon_on_first(second)
    load_optimizer_state(second, optimizer, state)
    second.load_state_dict(weights)
    train(second, optimizer, range(3, 5))
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_a_closure_is_called_with_gradients():
    module = network()
    optimizer = muon_on_first(module)

    def closure() -> torch.Tensor:
        loss = module(torch.ones(1, 12)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0 and module[0].weight.grad is not None


def test_bad_groups_are_refused():
    module = network()
    with pytest.raises(ValueError, match=r"two dimensions, got shapes \[\(8,\)\]"):
        MuonAdamW([{"params": module[0].parameters(), "method": "muon"}], 1e-3, (0.9, 0.95))
    with pytest.raises(ValueError, match="method must be one of .*, got None"):
        MuonAdamW([{"params": module.parameters()}], 1e-3, (0.9, 0.95))


def test_the_generators_hidden_matrices_get_muon():
    made = task(optimizer={"method": "muon", "learning_rate": 1e-3, "weight_decay": 0.03})
    names = {id(p): name for name, p in made.trained.named_parameters()}
    optimizer = made.optimizers()["generator"]
    found = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(names) == sum(len(group["params"]) for group in optimizer.param_groups)
    muon = {name for name, group in found.items() if group["method"] == "muon"}
    for name in (
        "generator.blocks.0.self_attn.qkv.weight",
        "generator.blocks.1.mlp.fc2.weight",
        "generator.text_proj.fc1.weight",
        "generator.head.res_blocks.0.mlp.0.weight",
        "text_encoder.t5.encoder.block.0.layer.0.SelfAttention.q.weight",
    ):
        assert name in muon
    adamw = {name for name in found if name not in muon}
    for name in (
        "generator.token_embedding.weight",
        "generator.to_logits.weight",
        "generator.head.input_proj.weight",
        "generator.head.final_layer.linear.weight",
        "text_encoder.t5.shared.weight",
    ):
        assert name in adamw
    assert all(made.trained.get_parameter(name).ndim == 2 for name in muon)
    assert all(found[name]["weight_decay"] == 0.03 for name in muon)
    losses = [PlainRun(made).train(2)[-1]["loss"] for _ in range(8)]
    assert losses[-1] < losses[0]

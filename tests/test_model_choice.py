"""What a preset's name stands for in every command: the weights that come with the package, where there are some."""

from __future__ import annotations

import pytest
import torch

from dcar_fast import DCARPipeline, checkpoints
from dcar_fast._model_choice import ModelChoice, choose_device
from dcar_fast.bulk.ranks import Rank
from dcar_fast.evaluation.settings import GenevalImages, MjhqImages, ReconstructionEvaluation, ShapesEvaluation


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Weights in half precision as those that are shipped."""
    made = DCARPipeline.from_preset("shapes", seed=5)
    models = dict(zip(checkpoints.PARTS, made._models(), strict=True))
    checkpoints.save_folder(tmp_path, {name: m.half() for name, m in models.items()}, made.config, trained=True)
    monkeypatch.setattr(checkpoints, "shipped_folder", lambda name: tmp_path if name == "shapes" else None)
    return models


def same(found, wanted) -> bool:
    return all(torch.equal(tensor, wanted.state_dict()[name].float()) for name, tensor in found.state_dict().items())


def test_a_preset_has_its_shipped_weights(shipped):
    for made in (DCARPipeline.from_preset("shapes"), ModelChoice().pipeline(), ShapesEvaluation().pipeline()):
        assert made.trained and made.generator.to_logits.weight.dtype == torch.float32
        assert all(same(found, wanted) for found, wanted in zip(made._models(), shipped.values(), strict=True))
    assert same(ReconstructionEvaluation()._load(), shipped["tokenizer"])
    low = ModelChoice(dtype="bfloat16", engine="reference").pipeline()
    assert low.generator.to_logits.weight.dtype == torch.bfloat16 and low.engine == "reference"


def test_a_seed_asks_for_random_weights(shipped):
    made = DCARPipeline.from_preset("shapes", seed=5)
    assert not made.trained and not same(made.generator, shipped["generator"])  # which were rounded
    assert not same(DCARPipeline.from_preset("shapes", seed=6).tokenizer, shipped["tokenizer"])


def test_without_shipped_weights_they_are_those_of_seed_0(monkeypatch):
    monkeypatch.setattr(checkpoints, "shipped_folder", lambda name: None)
    made, wanted = DCARPipeline.from_preset("shapes"), DCARPipeline.from_preset("shapes", seed=0)
    assert not made.trained and same(made.generator, wanted.generator)


def test_folders_are_loaded(shipped, tmp_path):
    assert same(ModelChoice(model=str(tmp_path)).pipeline().generator, shipped["generator"])
    with pytest.raises(ValueError, match="nowhere"):
        ModelChoice(model=str(tmp_path / "nowhere")).pipeline()


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu", Rank(1, 2, 1)) == torch.device("cpu")
    with pytest.raises(ValueError, match="cuda"):
        choose_device("cuda")


@pytest.mark.parametrize("kind", [ShapesEvaluation, MjhqImages, GenevalImages])
@pytest.mark.parametrize("wrong", [{"model": ""}, {"device": ""}, {"dtype": "int8"}, {"engine": "turbo"}])
def test_values_that_name_nothing(kind, wrong):
    files = {} if kind is ShapesEvaluation else {"prompts": "p", "output": "o"}
    with pytest.raises(ValueError, match=f"{kind.__name__}.{next(iter(wrong))} must be"):
        kind(**files, **wrong)

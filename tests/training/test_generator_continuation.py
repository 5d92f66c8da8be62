"""Initial weights from another resolution's run and from converted released checkpoints."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from dcar_fast import DCARPipeline
from dcar_fast.config import DCARConfig
from dcar_fast.models.text_encoder import TextEncoder
from dcar_fast.reference.positions import sincos_positions
from dcar_fast.training.continuation import check_byte_encoder, load_initial, load_text_encoder
from dcar_fast.training.generator import GeneratorTask
from tests import tiny_t5
from tests.golden_vectors import generator as golden_generator
from tests.golden_vectors import tokenizer as golden_tokenizer
from tests.training.tiny_generator import GENERATOR, TEXT, PlainRun, batch, models, settings, task

LARGER = dataclasses.replace(GENERATOR, num_tokens=64)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A folder exported after some steps, and the task that wrote it."""
    made = task()
    PlainRun(made).train(2)
    folder = tmp_path_factory.mktemp("export")
    made.export(folder)
    return folder, made


def test_another_resolution_takes_all_weights_and_new_positions(export):
    folder, made = export
    generator, encoder = load_initial(folder, LARGER)
    trained = made.trained.generator.state_dict()
    for name, tensor in generator.state_dict().items():
        if name == "position":
            assert torch.equal(tensor, sincos_positions(32, 8, 8))
        else:
            assert torch.equal(tensor, trained[name]), name
    assert generator.config == LARGER and generator.config.grid == (8, 8)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, made.text_encoder.state_dict()[name]), name


def test_the_continued_generator_trains_on_larger_pictures(export, tmp_path):
    generator, encoder = load_initial(export[0], LARGER)
    continued = GeneratorTask(settings(), models()[0], generator, encoder, joint=True)
    larger = batch(range(8))
    larger.images = larger.images.repeat_interleave(2, 2).repeat_interleave(2, 3)  # 32 px, 8 x 8 tokens
    run = PlainRun(continued)
    before = generator.to_logits.weight.clone()
    values = continued.train_step(run, [larger])
    assert torch.isfinite(values["loss"]) and not torch.equal(generator.to_logits.weight, before)
    continued.export(tmp_path)
    assert DCARPipeline.from_pretrained(tmp_path)(["x"], seed=0, num_steps=2, progress=False)[0].size == (32, 32)


def test_the_same_resolution_keeps_the_stored_table(tmp_path):
    made = task()
    table = torch.randn_like(made.trained.generator.position)
    made.trained.generator.position.copy_(table)
    made.export(tmp_path)
    generator, _ = load_initial(tmp_path, dataclasses.replace(GENERATOR, head_scale=0.5, head_steps=4))
    assert torch.equal(generator.position, table) and generator.config.head_scale == 0.5


def test_half_precision_exports_become_float32(tmp_path):
    made = task(export_dtype="float16")
    made.export(tmp_path)
    generator, encoder = load_initial(tmp_path, GENERATOR)
    for module in (generator, encoder):
        assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}


def test_converted_released_checkpoints(tmp_path):
    """The golden generator, 8 x 8 tokens with a random stored table, at another resolution."""
    released = golden_generator()
    text = tiny_t5.save(tmp_path / "t5", d_model=released.config.text_dim)
    encoder = TextEncoder.from_t5(tmp_path / "t5", max_length=released.config.text_length)
    DCARPipeline(golden_tokenizer(), released, encoder).save_pretrained(tmp_path / "model")
    side = released.config.grid[0]
    wanted = dataclasses.replace(released.config, num_tokens=4 * side * side)
    generator, loaded = load_initial(tmp_path / "model", wanted)
    assert torch.equal(generator.position, sincos_positions(wanted.hidden_size, 2 * side, 2 * side))
    same, _ = load_initial(tmp_path / "model", released.config)
    assert torch.equal(same.position, released.position), "the released table is kept for its own grid"
    for name, tensor in released.state_dict().items():
        assert name == "position" or torch.equal(generator.state_dict()[name], tensor), name
    assert torch.equal(loaded.t5.shared.weight, text.shared.weight)
    with pytest.raises(ValueError, match="text_encoder must name a folder or hub id: .* has a T5 vocabulary"):
        check_byte_encoder(loaded.config, "the folder")


def test_the_frozen_encoder_of_a_pipeline_folder(export):
    folder, made = export
    encoder = load_text_encoder(folder, max_length=24)
    assert torch.equal(encoder.t5.shared.weight, made.text_encoder.t5.shared.weight)
    with pytest.raises(ValueError, match="is for 24 tokens, not 300"):
        load_text_encoder(folder, max_length=300)
    check_byte_encoder(TEXT, "x")


def test_what_does_not_fit_is_named(export, tmp_path):
    folder, _ = export
    other = dataclasses.replace(GENERATOR, hidden_size=64, num_layers=3)
    with pytest.raises(ValueError, match="another generator: hidden_size 32 instead of 64, num_layers 2 instead of 3"):
        load_initial(folder, other)
    with pytest.raises(ValueError, match="neither a folder nor a reachable hub repository"):
        load_initial(str(tmp_path / "none"), GENERATOR)
    with pytest.raises(ValueError, match="config.json does not exist"):
        load_initial(tmp_path, GENERATOR)
    DCARPipeline.from_preset("shapes", seed=0).save_pretrained(tmp_path / "untrained")
    config = DCARConfig.from_dict(json.loads((tmp_path / "untrained" / "config.json").read_text())["generator"])
    with pytest.raises(ValueError, match="holds untrained weights"):
        load_initial(tmp_path / "untrained", config)

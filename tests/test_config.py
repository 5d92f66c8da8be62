"""Configs: released defaults, JSON round trips, presets, and every field's own error."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from dcar_fast.config import (
    PRESETS,
    DCARConfig,
    DCHTConfig,
    PipelineConfig,
    SamplingConfig,
    TextEncoderConfig,
    preset,
)

RES = {
    "codebook_size": 8,
    "latent_channels": 2,
    "widths": (8, 8),
    "encoder_depths": (1, 1),
    "decoder_depths": (1, 1),
    "blocks": ("res", "res"),
    "decoder_norms": ("batch_norm",) * 2,
    "decoder_acts": ("relu",) * 2,
}


def test_defaults_are_the_released_models():
    tokenizer, generator, text, sampling = DCHTConfig(), DCARConfig(), TextEncoderConfig(), SamplingConfig()
    assert (tokenizer.codebook_size, tokenizer.latent_channels, tokenizer.compression) == (16384, 32, 32)
    assert tokenizer.widths == (128, 256, 512, 512, 1024, 1024)
    assert tokenizer.encoder_depths == (0, 4, 8, 2, 2, 2) and tokenizer.decoder_depths == (0, 5, 10, 2, 2, 2)
    assert (generator.hidden_size, generator.num_layers, generator.num_heads) == (1152, 28, 16)
    assert (generator.mlp_hidden_size, generator.num_tokens, generator.mask_id) == (4608, 256, 16384)
    assert (generator.head_width, generator.head_depth, generator.head_steps) == (1024, 6, 32)
    assert (generator.head_scale, generator.head_batch_multiplier, generator.grid) == (0.107, 4, (16, 16))
    assert (text.max_length, text.d_model, text.attend_pads, text.tokenizer) == (300, 768, True, "t5")
    assert (sampling.num_steps, sampling.guidance_scale, sampling.guidance_schedule) == (12, 4.5, "constant")
    assert (sampling.guidance_power, sampling.temperature, sampling.anneal_softmax) == (2.5, 1.5, True)
    assert (sampling.schedule_tokens, sampling.final_forward) == ("open", False)


@pytest.mark.parametrize("config", [DCHTConfig(), DCARConfig(), TextEncoderConfig(), SamplingConfig()])
def test_json_round_trip(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(values) == config
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"):
        type(config).from_dict({**values, "colour": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, next(iter(values)), None)


@pytest.mark.parametrize(
    ("name", "side"), [("shapes", 64), ("dc-ar-256", 256), ("dc-ar-512", 512), ("dc-ar-1024", 1024)]
)
def test_presets(name, side):
    config = preset(name)
    assert name in PRESETS and config.image_size == side
    assert config.generator.num_tokens == (side // config.tokenizer.compression) ** 2
    assert config.text.tokenizer == "bytes", "a preset needs no download"
    assert PipelineConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    if name != "shapes":
        assert config.tokenizer == DCHTConfig()
        assert dataclasses.replace(config.generator, num_tokens=256) == DCARConfig()


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="preset.*shapes.*dc-ar-512.*'huge'"):
        preset("huge")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("codebook_size", 0),
        ("codebook_size", 1.5),
        ("codebook_size", True),
        ("latent_channels", -1),
        ("latent_channels", 3),  # does not divide the last width
        ("widths", (8,)),
        ("widths", (8, 0)),
        ("widths", (8, "8")),
        ("widths", 8),
        ("encoder_depths", (1,)),
        ("encoder_depths", (1, 0)),
        ("encoder_depths", (-1, 1)),
        ("decoder_depths", (1, 1, 1)),
        ("blocks", ("res", "conv")),
        ("blocks", ("res", ["res"])),
        ("blocks", None),
        ("encoder_norm", "rms_norm"),
        ("encoder_act", "gelu"),
        ("decoder_norms", ("batch_norm", "none")),
        ("decoder_acts", ("relu",)),
        ("l2_normalize", False),
        ("l2_normalize", 1),
    ],
)
def test_tokenizer_fields(field, value):
    DCHTConfig(**RES)
    with pytest.raises(ValueError, match=field):
        DCHTConfig(**{**RES, field: value})


@pytest.mark.parametrize("widths", [(4, 6), (8, 2), (2, 2), (8, 6), (4, 32)])
def test_widths_that_the_shortcuts_cannot_join(widths):
    # pixel (un)shuffling needs a quarter of the next width, the shortcuts whole groups of channels
    with pytest.raises(ValueError, match="widths"):
        DCHTConfig(**{**RES, "widths": widths, "latent_channels": 2})


def test_efficientvit_width_is_whole_heads():
    with pytest.raises(ValueError, match=r"widths\[1\].*32.*16"):
        DCHTConfig(**{**RES, "widths": (8, 16), "blocks": ("res", "efficientvit")})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("codebook_size", 0),
        ("latent_channels", None),
        ("num_tokens", 15),
        ("num_tokens", 0),
        ("hidden_size", 1150),
        ("num_heads", 5),
        ("num_layers", 0),
        ("mlp_hidden_size", -4),
        ("qk_norm", 1),
        ("text_length", 0),
        ("text_dim", 2.0),
        ("head_width", 0),
        ("head_depth", False),
        ("head_steps", 0),
        ("head_steps", 1001),
        ("head_steps", 2.0),
        ("head_steps", ""),
        ("head_steps", "0"),
        ("head_steps", "ten"),
        ("head_steps", "10,"),
        ("head_steps", "-1,2"),
        ("head_steps", "²"),
        ("head_steps", "2000"),
        ("head_steps", "501,10"),  # 501 of the first 500 timesteps
        ("head_scale", 0),
        ("head_scale", math.nan),
        ("head_scale", math.inf),
        ("head_batch_multiplier", 0),
    ],
)
def test_generator_fields(field, value):
    with pytest.raises(ValueError, match=field if field != "num_heads" else "heads"):
        DCARConfig(**{field: value})


@pytest.mark.parametrize("steps", [1, 1000, "10", "10,0", "0,10", "500,500", " 4 , 4"])
def test_head_steps_that_are_allowed(steps):
    assert DCARConfig(head_steps=steps).head_steps == steps


def test_hidden_size_of_odd_heads():
    with pytest.raises(ValueError, match="multiple of 4"):
        DCARConfig(hidden_size=18, num_heads=2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokenizer", "sentencepiece"),
        ("max_length", 0),
        ("attend_pads", "yes"),
        ("vocab_size", -1),
        ("d_model", 1.0),
        ("feed_forward_proj", "gated-silu"),
    ],
)
def test_text_fields(field, value):
    with pytest.raises(ValueError, match=f"TextEncoderConfig.{field}"):
        TextEncoderConfig(**{field: value})


def test_bytes_need_their_vocabulary():
    TextEncoderConfig(tokenizer="bytes", vocab_size=384)
    with pytest.raises(ValueError, match="vocab_size.*384"):
        TextEncoderConfig(tokenizer="bytes", vocab_size=383)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_steps", 0),
        ("num_steps", 300),
        ("num_steps", 257),
        ("num_steps", -1),
        ("num_steps", 12.0),
        ("num_steps", True),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("guidance_scale", -0.5),
        ("guidance_scale", "4.5"),
        ("guidance_scale", None),
        pytest.param("guidance_scale", 10**400, id="guidance_scale-huge"),
        ("guidance_power", 0),
        ("guidance_power", math.nan),
        ("guidance_schedule", "cosine"),
        ("guidance_schedule", None),
        ("temperature", -1),
        ("temperature", math.nan),
        ("anneal_softmax", 1),
        ("schedule_tokens", "some"),
        ("final_forward", None),
    ],
)
def test_sampling_fields(field, value):
    with pytest.raises(ValueError, match=f"SamplingConfig.{field}"):
        SamplingConfig(**{field: value})


@pytest.mark.parametrize("steps", [1, 256])
def test_step_limits_are_allowed(steps):
    assert SamplingConfig(num_steps=steps, guidance_scale=0, temperature=0).num_steps == steps


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("generator", {"codebook_size": 256}, "codebook_size.*256.*512"),
        ("generator", {"latent_channels": 8}, "latent_channels.*8.*16"),
        ("text", {"d_model": 64}, "text width.*128.*64"),
        ("text", {"max_length": 127}, "text length.*128.*127"),
    ],
)
def test_parts_of_a_pipeline_must_fit(part, change, message):
    config = preset("shapes")
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **change)})


@pytest.mark.parametrize(
    "broken", [{}, {"generator": None}, {"text": [1]}, {"extra": {}}, {"sampling": 5}, {"sampling": {"steps": 2}}]
)
def test_pipeline_config_from_broken_json(broken):
    values = preset("shapes").to_dict()
    with pytest.raises(ValueError, match="Config"):
        PipelineConfig.from_dict({**values, **broken} if broken else {})


@pytest.mark.parametrize("values", [None, 5, [1]])
def test_from_dict_of_something_else(values):
    with pytest.raises(ValueError, match="DCARConfig"):
        DCARConfig.from_dict(values)

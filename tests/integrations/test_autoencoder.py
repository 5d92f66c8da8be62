"""A DC-AE decoder whose forward is replaced gives the same images, follows its module, and is refused where unknown."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from dcar_fast.integrations import accelerate_autoencoder, unpatch
from tests.golden_vectors import error
from tests.integrations.dc_ae_family import CHANNELS, DCAE, AutoencoderDC, LayerNorm2d, TritonRMSNorm2d, trained

KINDS = {
    "diffusers": AutoencoderDC,
    "diffusers, no stage 0": lambda: AutoencoderDC(stage0=0),
    "efficientvit": DCAE,
    "efficientvit, no stage 0": lambda: DCAE(stage0=0),
    "efficientvit, LayerNorm": lambda: DCAE(LayerNorm2d),
}


def make(kind: str = "diffusers") -> nn.Module:
    torch.manual_seed(0)
    return trained(KINDS[kind]())


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def decode(module: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    return module.decode(latents(2, CHANNELS, 5, 8) if x is None else x)


@pytest.mark.parametrize("kind", KINDS)
def test_the_images_are_the_same(kind):
    module = make(kind)
    for shape in ((1, CHANNELS, 1, 1), (3, CHANNELS, 4, 9), (2, CHANNELS, 8, 8)):
        x = latents(*shape)
        before = decode(module, x)
        with accelerate_autoencoder(module):
            assert "forward" in vars(module.decoder)
            assert error(decode(module, x), before) < 1e-4 * before.abs().max()
        assert torch.equal(decode(module, x), before) and "forward" not in vars(module.decoder)


def test_low_precision_gives_the_originals_type():
    module = make()
    exact = decode(module)
    with torch.autocast("cpu", torch.bfloat16):
        plain = decode(module)
    accelerate_autoencoder(module)
    with torch.autocast("cpu", torch.bfloat16):
        found = decode(module)
    assert found.dtype == plain.dtype == torch.bfloat16
    assert error(found.float(), exact) < 2 * error(plain.float(), exact) + 2**-8
    half = make().to(torch.bfloat16)
    accelerate_autoencoder(half)
    assert decode(half, latents(1, CHANNELS, 4, 4).bfloat16()).dtype == torch.bfloat16


def test_the_module_stays_what_it_was():
    module = make()
    state, training = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    patch = accelerate_autoencoder(module.decoder)
    decode(module)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert [m.training for m in module.modules()] == training
    other = copy.deepcopy(module)
    nn.init.zeros_(other.decoder.conv_out.weight)
    assert other.decoder.forward.decoder is other.decoder
    assert not torch.equal(decode(other), decode(module))
    assert patch.unpatch() and not patch.unpatch()


def test_unpatch_knows_autoencoders_too():
    module = make()
    assert not unpatch(module)
    before = decode(module)
    accelerate_autoencoder(module)
    assert unpatch(module) and not unpatch(module) and torch.equal(decode(module), before)
    with pytest.raises(ValueError, match="holds no diffusion head"):
        unpatch(nn.Linear(2, 2))


def _data(module):
    module.decoder.conv_in.weight.data.mul_(2)


def _statistics(module):
    next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d)).running_mean.add_(1)


def _swapped(module):
    module.decoder.conv_out.weight = nn.Parameter(module.decoder.conv_out.weight.detach().flip(0))


def _norm(module):
    module.decoder.norm_out.weight.data.mul_(0.5)


@pytest.mark.parametrize("change", [_data, _statistics, _swapped, _norm])
def test_changes_are_followed(change):
    module = make()
    accelerate_autoencoder(module)
    before = decode(module)
    change(module)
    found = decode(module)
    with torch.no_grad():
        expected = type(module.decoder).forward(module.decoder, latents(2, CHANNELS, 5, 8))
    assert not torch.equal(found, before) and error(found, expected) < 1e-4 * expected.abs().max()


def test_what_cannot_be_served_runs_the_original_and_says_so_once(caplog):
    module = make()
    accelerate_autoencoder(module)
    x = latents(1, CHANNELS, 2, 2)
    with caplog.at_level(logging.WARNING, "dcar_fast"):
        assert module.decode(x).requires_grad and module.decode(x).requires_grad
    assert len(caplog.records) == 1 and "gradients are asked for" in caplog.text
    module.train()
    with torch.no_grad():
        module.decode(x)
    assert "training mode" in caplog.text and module.decoder.up_blocks[0][1].norm.num_batches_tracked == 1
    with pytest.raises(RuntimeError):
        module.eval().decode(latents(1, CHANNELS + 1, 2, 2))


def _scales(module):
    module.decoder.up_blocks[2][0].attn.to_qkv_multiscale.append(nn.Identity())


def _interpolate(module):
    module.decoder.up_blocks[1][0].interpolate = True


def _hook(module):
    module.decoder.up_blocks[1][1].register_forward_hook(lambda *given: None)


def _act(module):
    module.decoder.up_blocks[1][1].nonlinearity = nn.GELU()


def _stride(module):
    module.decoder.conv_in.dilation = (2, 2)


def _more(module):
    module.decoder.up_blocks[1].append(nn.Identity())


def _training(module):
    module.train()


def _other(module):
    module.decoder.conv_act = nn.SiLU()


class Brighter(type(AutoencoderDC().decoder)):
    def forward(self, x):
        return super().forward(x) * 1.1


def _computes(module):
    module.decoder.__class__ = Brighter


REFUSED = {
    "scales": (_scales, "has several scales"),
    "interpolate": (_interpolate, "interpolates"),
    "hook": (_hook, "has a forward hook"),
    "activation": (_act, "has a GELU where ReLU or SiLU fits"),
    "output": (_other, "has a SiLU where ReLU fits"),
    "convolution": (_stride, "not a 1x1 or 3x3 convolution"),
    "block": (_more, r"decoder.up_blocks.1.3 is a Identity"),
    "training": (_training, "is in training mode"),
    "values": (_computes, "computes something else"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_decoders_are_refused(what):
    change, reason = REFUSED[what]
    module = make()
    change(module)
    with pytest.raises(ValueError, match=reason):
        accelerate_autoencoder(module)
    assert "forward" not in vars(module.decoder)


@pytest.mark.parametrize(
    ("module", "given", "reason"),
    [
        ("x", {}, "module is a str"),
        (nn.Linear(2, 2), {}, "has no first convolution"),
        (make(), {"dtype": torch.int8}, "dtype must be"),
        (make(), {"backend": "fast"}, "backend must be"),
        (make(), {"backend": "triton"}, "cannot run"),
    ],
)
def test_bad_input_is_named(module, given, reason):
    with pytest.raises(ValueError, match=reason):
        accelerate_autoencoder(module, **given)


def test_a_forward_that_somebody_replaced_is_left_alone():
    module = make()
    module.decoder.forward = lambda x: x
    with pytest.raises(ValueError, match="was already replaced on this instance"):
        accelerate_autoencoder(module)


def test_efficientvit_parts_are_named():
    module = trained(DCAE(TritonRMSNorm2d))
    module.decoder.stages[1].op_list[1].shortcut = nn.Identity()
    with pytest.raises(ValueError, match=r"decoder.stages.1.op_list.1 has no identity shortcut"):
        accelerate_autoencoder(module)

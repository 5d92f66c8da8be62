"""The formulas of dcar_fast.flops against torch's counter, which watches the real modules under FakeTensorMode.

FLOPs are counted on fake CUDA tensors where torch is built with CUDA (a CPU-only build cannot slice them), and always
on fake CPU tensors, where attention is the one operation whose formula torch's counter lacks; it is given here. Bytes
are counted on the CPU alone: elsewhere fake attention writes its scores to memory.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dcar_fast import flops
from dcar_fast.config import DCARConfig, DCHTConfig, PipelineConfig, SamplingConfig, TextEncoderConfig, preset
from dcar_fast.models import dcar, tokenizer
from dcar_fast.models.text_encoder import TextEncoder
from dcar_fast.noise import TorchNoise
from dcar_fast.sampling import ReferenceSampler

DEVICES = ["cpu", "cuda"] if torch.backends.cuda.is_built() else ["cpu"]
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
COUNTED = ("mm", "addmm", "bmm", "baddbmm", "convolution", CPU_ATTENTION.__name__.split(".")[-1])
PRODUCT_LIKE = ("mm", "matmul", "linear", "conv", "attention", "einsum", "dot")


def attention_flops(q, k, v, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


class Products(TorchDispatchMode):
    """Bytes per element moved by the counted operations, and the names of product-like operations nobody counts."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in COUNTED:
            operands = [a for a in args if isinstance(a, torch.Tensor) and a.dim() > 1]  # biases are not counted
            results = [out] if isinstance(out, torch.Tensor) else [out[0]]  # attention's second result is a statistic
            self.elements += sum(t.numel() for t in (*operands[:3], *results))
        elif any(part in name.removeprefix("_") for part in PRODUCT_LIKE) and not name.startswith("_unsafe_view"):
            self.uncounted.add(name)
        return out


@contextmanager
def counting():
    counter = FlopCounterMode(display=False, depth=16, custom_mapping={CPU_ATTENTION: attention_flops})
    with torch.no_grad(), FakeTensorMode(), Products() as products, counter:
        yield counter, products
    assert not products.uncounted, f"operations without a registered formula: {sorted(products.uncounted)}"


@pytest.fixture(autouse=True)
def no_value_checks(monkeypatch):
    """Fake tensors have no values to look at."""
    for module in (dcar, tokenizer):
        monkeypatch.setattr(module, "check_ids", lambda *args, **kwargs: None)


def by_stage(counter: FlopCounterMode) -> Counter:
    """FLOPs of a sampling run by the stages of flops.generation, from the counter's totals per module."""
    stages: Counter = Counter()
    for name, ops in counter.get_flop_counts().items():
        last, total = name.split(".", 1)[-1], sum(ops.values())
        if last == "text_proj" or last.endswith("cross_attn.kv"):
            stages["text_projection"] += total
        elif last == "to_logits":
            stages["logits"] += total
        elif last == "head":
            stages["head"] += total
        elif last.startswith("blocks.") and last.count(".") == 1:
            stages["trunk"] += total
    stages["trunk"] -= sum(
        sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("cross_attn.kv")
    )
    assert sum(stages.values()) == counter.get_total_flops()  # nothing runs outside the stages
    return stages


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def on_device(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """``Module.to`` for fake parameters, which cannot be swapped."""
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            setattr(part, name, torch.nn.Parameter(fake, requires_grad=False) if is_parameter else fake)
    return module


def states_of(config: TextEncoderConfig, batch: int, length: int, device: str) -> torch.Tensor:
    """What TextEncoder.forward computes for prompts whose longest has ``length`` tokens."""
    encoder = on_device(TextEncoder(config), device)
    if config.attend_pads:
        ids = torch.zeros(batch, config.max_length, dtype=torch.long, device=device)
        return encoder.t5(input_ids=ids).last_hidden_state[:, :length]
    ids = torch.zeros(batch, length, dtype=torch.long, device=device)
    return encoder.t5(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def sample(config: DCARConfig, sampling: SamplingConfig, batch: int, grid: tuple[int, int], length: int, device: str):
    model = on_device(dcar.DCAR(config), device)
    sizes = {"codebook_size": config.codebook_size, "latent_channels": config.latent_channels}
    noise = TorchNoise(batch, num_tokens=grid[0] * grid[1], **sizes, device=device)
    states = torch.zeros(batch, length, config.text_dim, device=device)
    mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    return ReferenceSampler(model, sampling)(states, mask, noise, grid=grid)


def tiny(text_pads: bool = False, stage0: bool = False) -> PipelineConfig:
    """Odd sizes; with ``stage0`` the tokenizer has blocks at full resolution."""
    base = preset("shapes")
    text = TextEncoderConfig("bytes", 40, text_pads, 384, 48, 16, 80, 2, 3, "relu" if text_pads else "gated-gelu")
    generator = DCARConfig(
        codebook_size=96,
        latent_channels=16,
        num_tokens=16,
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        mlp_hidden_size=144,
        text_length=40,
        text_dim=48,
        head_width=56,
        head_depth=2,
        head_steps="3,2",
    )
    depths = (2, 1, 2, 1) if stage0 else (0, 1, 2, 3)
    tokens = base.tokenizer.to_dict() | {"codebook_size": 96, "encoder_depths": depths, "decoder_depths": depths}
    return PipelineConfig(DCHTConfig(**tokens), generator, text)


def check_moved(ops: list[flops.Op], products: Products, device: str) -> None:
    if device == "cpu":
        assert flops.moved(ops, 1) == pytest.approx(products.elements, rel=0.01)


CONFIGS = {
    "shapes": preset("shapes"),
    "full": preset("dc-ar-512"),
    "tiny": tiny(),
    "stage0": tiny(text_pads=True, stage0=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_text_encoder(name, device):
    config, batch, length = CONFIGS[name].text, 2, 33
    with counting() as (counter, products):
        states = states_of(config, batch, length, device)
    ops = flops.text_encoder(config, batch, length)
    assert states.shape == (batch, length, config.d_model)
    assert flops.flops(ops) == pytest.approx(counter.get_total_flops(), rel=0.01)
    check_moved(ops, products, device)


SAMPLINGS = {
    "constant": SamplingConfig(num_steps=3),
    "unguided": SamplingConfig(num_steps=2, guidance_scale=0.0),
    "scale 1": SamplingConfig(num_steps=2, guidance_scale=1.0),
    "linear, one step": SamplingConfig(num_steps=1, guidance_schedule="linear"),
    "linear, final forward": SamplingConfig(num_steps=3, guidance_schedule="linear", final_forward=True),
    "power-cosine": SamplingConfig(num_steps=2, guidance_schedule="power-cosine"),
    "unguided, final forward": SamplingConfig(num_steps=2, guidance_scale=0.0, final_forward=True),
}


@pytest.mark.parametrize(
    ("name", "sampling", "grid"),
    [
        ("shapes", "constant", (8, 8)),
        ("full", "linear, one step", (16, 16)),
        *(("tiny", sampling, (3, 5)) for sampling in SAMPLINGS),
    ],
)
def test_sampling(name, sampling, grid, device):
    config, sampling, batch, length = CONFIGS[name], SAMPLINGS[sampling], 2, 13
    with counting() as (counter, products):
        sample(config.generator, sampling, batch, grid, length, device)
    ours = flops.generation(config, sampling, batch=batch, grid=grid, prompt_tokens=length)
    ours = {stage: ops for stage, ops in ours.items() if stage not in ("text", "decode")}
    assert {stage: flops.flops(ops) for stage, ops in ours.items()} == pytest.approx(by_stage(counter), rel=0.01)
    check_moved([op for ops in ours.values() for op in ops], products, device)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 4), (5, 7)])  # 8 x 4: quadratic attention
def test_tokenizer(name, height, width, device):
    config, batch = CONFIGS[name].tokenizer, 2
    with counting() as (counter, products):
        model = on_device(tokenizer.DCHT(config).eval(), device)
        images = model.decode_tokens(torch.zeros(batch, height, width, dtype=torch.long, device=device))
    ops = flops.decoder(config, batch, height, width)
    assert flops.flops(ops) == pytest.approx(counter.get_total_flops(), rel=0.01)
    check_moved(ops, products, device)
    with counting() as (counter, products):
        model = on_device(tokenizer.DCHT(config).eval(), device)
        model.encoder(torch.zeros(images.shape, device=device))
    ops = flops.encoder(config, batch, height, width)
    assert flops.flops(ops) == pytest.approx(counter.get_total_flops(), rel=0.01)
    check_moved(ops, products, device)


def test_full_size_totals():
    """One 512 px image from a prompt of 64 tokens: the known totals, in TFLOP.

    The released code projects all 300 text positions in every forward, pads included: 0.025 more than the trunk here.
    """
    stages = flops.generation(preset("dc-ar-512"), prompt_tokens=64)
    total = {name: flops.flops(ops) / 1e12 for name, ops in stages.items()}
    unmasking = total["text_projection"] + total["trunk"] + total["logits"]
    assert unmasking == pytest.approx(7.14, rel=0.01)
    assert total["head"] == pytest.approx(1.18, rel=0.01)
    assert total["decode"] == pytest.approx(2.77, rel=0.01)
    assert total["text"] == pytest.approx(0.054, rel=0.01)


def test_floor_is_per_operation():
    fast_math = [flops.linear("small", 1, 1000, 1000)]  # bound by its weights
    heavy = [flops.linear("large", 10_000, 1000, 1000)]  # bound by its FLOPs
    rates = {"element_size": 2, "flops_per_s": 1e12, "bytes_per_s": 1e11}
    assert flops.floor(fast_math, **rates) == pytest.approx(1_002_000 * 2 / 1e11)
    assert flops.floor(heavy, **rates) == pytest.approx(2e10 / 1e12)
    assert flops.floor(fast_math + heavy, **rates) == pytest.approx(1_002_000 * 2 / 1e11 + 0.02)
    assert flops.flops(flops.times(heavy, 3)) == 6e10
    assert flops.times(heavy, 0) == []

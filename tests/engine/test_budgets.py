"""FLOPs and launches of the fast path at full size, counted on tensors without data."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dcar_fast import fast_flops, flops
from dcar_fast.config import PipelineConfig, SamplingConfig, preset
from dcar_fast.engine.counting import FORMULAS, Counts, count
from dcar_fast.engine.decoder import FastDecoder
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.text_encoder import TextEncoder
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.noise import Noise
from dcar_fast.ops import _dispatch
from dcar_fast.sampling import FastSampler, ReferenceSampler

FULL: PipelineConfig = preset("dc-ar-512")
CONFIG = FULL.generator
N, D, V, L = CONFIG.num_tokens, CONFIG.hidden_size, CONFIG.codebook_size, CONFIG.num_layers
H, M, C, W = CONFIG.num_heads, CONFIG.mlp_hidden_size, CONFIG.latent_channels, CONFIG.head_width
OPEN = [256, 242, 228, 214, 200, 185, 170, 154, 137, 117, 95, 67]
OPTIONS = {
    "default": {},
    "unguided": {"guidance_scale": 0.0, "num_steps": 3},
    "guidance 1": {"guidance_scale": 1.0, "num_steps": 3},
    "linear": {"guidance_schedule": "linear", "num_steps": 3},
    "final forward": {"final_forward": True, "num_steps": 3},
    "one step": {"num_steps": 1},
}


@cache
def model(dtype: torch.dtype = torch.bfloat16) -> DCAR:
    with torch.device("meta"):
        return DCAR(CONFIG).to("meta", dtype)


class Empty(Noise):
    """Draws of the right shapes for the reference: what they hold does not matter here."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def token(self, step: int) -> torch.Tensor:
        return torch.empty(self.batch, N, V, device="meta")

    def confidence(self, step: int) -> torch.Tensor:
        return torch.empty(self.batch, N, device="meta")

    def latent_init(self) -> torch.Tensor:
        return torch.empty(self.batch, N, C, device="meta")

    def latent(self, i: int) -> torch.Tensor:
        return self.latent_init()


def prompts(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.device("meta"):
        return torch.empty(batch, length, CONFIG.text_dim), torch.ones(batch, length, dtype=torch.bool)


@cache
def sampling(
    length: int,
    batch: int = 1,
    backend: str = "reference",
    case: str = "default",
    dtype: torch.dtype | None = None,
) -> Counts:
    """Of a call in steady state; the fused ops are those that run on a GPU, whatever their backend is called."""
    sampler = FastSampler(model(), SamplingConfig(**OPTIONS[case]), backend, dtype)
    with torch.device("meta"):
        sampler(*prompts(batch, length), 0, lengths=[length] * batch)
        return count(lambda: sampler(*prompts(batch, length), 0, lengths=[length] * batch))


@cache
def decoding(backend: str = "auto") -> Counts:
    """Of a call in steady state. Ops that are asked for by name are those that run on a GPU, as above."""
    with torch.device("meta"):
        tokenizer = DCHT(FULL.tokenizer).to(torch.bfloat16).eval().requires_grad_(False)
        decoder = FastDecoder(tokenizer, backend=backend)
        ids, residual = torch.zeros(1, 16, 16, dtype=torch.int64), torch.empty(1, N, C)
        decoder.decode_tokens(ids, residual)
        return count(lambda: decoder.decode_tokens(ids, residual))


def reading() -> int:
    with torch.device("meta"):
        encoder = TextEncoder(FULL.text, tokenizer=object()).requires_grad_(False)
        ids = torch.zeros(1, FULL.text.max_length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            encoder.t5(input_ids=ids)
    return counter.get_total_flops()


@pytest.mark.parametrize(("length", "budget"), [(64, 10.4), (16, 9.8)])
def test_the_whole_pipeline_keeps_its_budget(length: int, budget: float) -> None:
    """The released code takes 11.15 and 10.94 TFLOP."""
    parts = [sampling(length).flops, decoding().flops, reading()]
    assert all(part > 0 for part in parts)
    teraflop = sum(parts) / 1e12
    assert 0.95 * budget < teraflop <= budget, f"{teraflop:.3f} TFLOP"


def test_packed_linears_take_no_more() -> None:
    """In 16 bits; in float32 they absorb too."""
    assert sampling(64, backend="native").flops <= sampling(64).flops


@pytest.mark.parametrize(("length", "batch"), [(16, 1), (17, 3), (40, 1), (300, 1)])
def test_the_formulas_are_what_torch_counts(length: int, batch: int) -> None:
    stages = fast_flops.generation(FULL, batch=batch, prompt_tokens=length)
    ours = ("text_projection", "trunk", "logits", "head")
    assert sampling(length, batch).flops == sum(flops.flops(stages[name]) for name in ours)


@pytest.mark.parametrize("case", OPTIONS)
def test_the_formulas_hold_for_every_schedule(case: str) -> None:
    stages = fast_flops.generation(FULL, SamplingConfig(**OPTIONS[case]), prompt_tokens=40)
    ours = ("text_projection", "trunk", "logits", "head")
    assert sampling(40, case=case).flops == sum(flops.flops(stages[name]) for name in ours)


def saved(length: int, batch: int) -> dict[str, int]:
    """What each saving leaves out of the default run, in FLOPs."""
    absorbed = {16: 16, 40: None, 300: None}[length]
    project = batch * length * 2 * (CONFIG.text_dim * D + D * D + L * 2 * D * D)
    self_part = 2 * N * 4 * D * D + 4 * N * N * D  # of one image in one layer
    cross = 4 * D * D + 4 * length * D  # of one position in one layer, like the next two
    after = cross + 4 * D * M
    absorbing = 0 if absorbed is None else cross - 4 * H * absorbed * D
    open_later = sum(OPEN[1:-1])  # positions that the last layer looks at in steps 1 to 10, of one image
    looked = batch * ((N * (L - 1) * 23) + 2 * open_later + N * 3)  # positions times layers with a cross-attention
    return {
        "text keys and values once per prompt": 11 * project,
        "those of the null text once per model": 12 * project,
        "the first unconditional pass once per length": batch * L * (self_part + N * after),
        "one image in the first step until it sees its text": (batch - 1) * self_part,
        "one branch until it sees its text": 11 * batch * self_part,
        "the last layer of open positions": 2 * batch * (10 * N - open_later) * (2 * D * D + after),
        "logits of open positions, guided before the product": batch * (24 * N - sum(OPEN)) * 2 * D * V,
        "absorbed projections": looked * absorbing
        - (0 if absorbed is None else 2 * batch * absorbed * L * (2 * D * D + D)),
        "timesteps are constants": 32 * 2 * batch * N * 2 * (256 * W + W * W),
        "the condition is projected once": 31 * 2 * batch * N * 2 * D * W,
        "both branches are fed the same": 32 * batch * N * 2 * C * W,
    }


@pytest.mark.parametrize(("length", "batch"), [(16, 1), (40, 2)])
def test_every_saving(length: int, batch: int) -> None:
    """The reference, counted, less the savings one by one, is the fast sampler, counted."""
    sampler = ReferenceSampler(model())
    with torch.device("meta"):
        reference = count(lambda: sampler(*prompts(batch, length), Empty(batch)))
    listed = saved(length, batch)
    assert all(value >= 0 for value in listed.values())
    assert reference.flops - sum(listed.values()) == sampling(length, batch).flops


@pytest.mark.parametrize(("length", "batch", "most"), [(16, 1, 7), (32, 16, 7), (40, 1, 8), (300, 1, 8)])
def test_launches_of_a_block(length: int, batch: int, most: int) -> None:
    counts = sampling(length, batch)
    blocks = sum(counts.by_op[op] for op in ("fused_linear", "self_attention", "cross_attention"))
    assert blocks - 3 == most * 12 * L, "beside the three that read the text"


@pytest.mark.parametrize(("length", "most"), [(16, 10), (40, 11)])
def test_float8_takes_three_more_launches_a_block(length: int, most: int) -> None:
    """And no other FLOPs."""
    counts, plain = sampling(length, dtype=torch.float8_e4m3fn), sampling(length)
    blocks = sum(counts.by_op[op] for op in ("fused_linear", "self_attention", "cross_attention", "quantize_rows"))
    assert blocks - 3 == most * 12 * L and counts.by_op["quantize_rows"] == 3 * 12 * L
    assert counts.flops == plain.flops and counts.launches == plain.launches + 3 * 12 * L
    assert counts.undeclared == set() and counts.no_formula == set()


@pytest.mark.parametrize("length", [16, 64])
def test_launches_of_an_image(length: int) -> None:
    """In all, and what lies between the blocks: per step the embedding, the norms, sampling and placing."""
    counts = sampling(length)
    assert counts.undeclared == set() and counts.no_formula == set()
    assert counts.launches <= {16: 3100, 64: 3430}[length]
    assert counts.by_op["embed_tokens"] == counts.by_op["place_tokens"] == 12
    assert counts.by_op["sample_tokens"] == 36 and counts.by_op["latent_noise"] == 1
    assert counts.by_op["denoise_step"] == 32 * 14


def test_launches_of_the_decoder() -> None:
    """15 fewer where cuDNN fuses the residual blocks' first convolution, bias and ReLU."""
    counts, tokenizer = decoding("reference"), FULL.tokenizer
    residual_blocks, attention_blocks = 5 + 10, 2 + 2 + 2
    assert tokenizer.decoder_depths == (0, 5, 10, 2, 2, 2) and tokenizer.blocks[:3] == ("res",) * 3
    upsamplings = len(tokenizer.widths) - 1
    convolutions = 1 + 2 * residual_blocks + 4 * attention_blocks + upsamplings
    biases = attention_blocks + upsamplings  # nothing that has not its own op follows these
    assert counts.by_op == {
        "convolution": convolutions + biases,
        "bias_residual": 1 + 2 * residual_blocks,
        "channel_norm": 2 * attention_blocks + 1,
        "relu_linear_attention": 2 * attention_blocks,
        "depthwise_gate": attention_blocks,
        "upsample_shortcut": upsamplings - 1,
        "add_residual": 1,
        "_to_copy": 1,  # the latents to channels_last
        "clone": 2,  # the latents' channels repeated, the image to channels_last
        "pixel_shuffle": 1,
    }
    assert counts.launches == 142 and counts.undeclared == set() and counts.no_formula == set()


def test_launches_of_the_decoder_without_ops_are_declared() -> None:
    counts = decoding()
    assert counts.undeclared == set() and counts.no_formula == set()
    assert counts.flops == decoding("reference").flops


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_adds_its_bias_in_a_launch_of_its_own(bias: bool) -> None:
    with torch.device("meta"):
        conv, x = torch.nn.Conv2d(3, 5, 3, bias=bias), torch.empty(1, 3, 9, 9)
        assert count(lambda: conv(x)).launches == 1 + bias


def test_every_op_has_a_formula() -> None:
    assert FORMULAS.keys() == set(_dispatch._ops)


def test_an_op_without_a_formula_is_named() -> None:
    a = torch.empty(3, 3, device="meta")
    assert count(lambda: torch.linalg.inv_ex(a)).no_formula == {"aten::linalg_inv_ex"}
    assert count(lambda: a @ a).flops == 54 and count(lambda: a @ a).launches == 1
    assert count(lambda: a.view(9)[2:].view(7, 1).T).launches == 0


@pytest.mark.gpu
@pytest.mark.parametrize("length", [16, 64])
def test_a_gpu_launches_what_is_counted(length: int) -> None:
    """One block of the full width in bfloat16: kernels that the profiler sees, against those that the ops declare."""
    from torch.profiler import ProfilerActivity, profile

    config = replace(CONFIG, num_layers=1, head_depth=1, num_tokens=64, codebook_size=1024)
    sampler = FastSampler(DCAR(config).to("cuda", torch.bfloat16), cuda_graph=False)
    states = torch.randn(1, length, config.text_dim, device="cuda")
    mask = torch.ones(1, length, dtype=torch.bool, device="cuda")

    def sample() -> None:
        sampler(states, mask, 0, lengths=[length])

    sample()
    counts = count(sample)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        sample()
        torch.cuda.synchronize()
    events = [e.name for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    # cuBLAS may cut a product into pieces, which a kernel of its own adds up
    kernels = [n for n in events if not n.lower().startswith(("memcpy", "memset")) and "splitkreduce" not in n.lower()]
    assert abs(len(kernels) - counts.launches) <= 0.02 * counts.launches, (counts.by_op, Counter(kernels))

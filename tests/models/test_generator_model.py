"""The generator's trunk against recorded logits, explicit attention, and its own invariances."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from dcar_fast.config import DCARConfig
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.transformer import Block, CrossAttention, SelfAttention
from tests.golden_vectors import error, generator, generator_config, settings, text, vectors


def inputs(rows: int = 3) -> tuple[torch.Tensor, ...]:
    """ids (rows, 16) partly MASK, states, mask, unconditional (all False)."""
    states, mask = text()
    pick = torch.arange(rows) % 3
    ids = vectors("generator")["forward/ids"][:rows]
    return ids, states[pick], mask[pick], torch.zeros(rows, dtype=torch.bool)


@torch.no_grad()
def forward(model: DCAR, *args, **kwargs):
    return model(*args, **kwargs)


def test_recorded_forward():
    recorded = vectors("generator")
    states, mask = text()
    unconditional = torch.arange(6) >= 3
    out = forward(generator(), recorded["forward/ids"], states.repeat(2, 1, 1), mask.repeat(2, 1), unconditional)
    assert error(out.logits, recorded["forward/logits"]) < 1e-4
    assert error(out.hidden, recorded["forward/hidden"]) < 1e-4


def test_rows_do_not_see_each_other():
    ids, states, mask, unconditional = inputs()
    unconditional = torch.tensor([False, True, False])
    together = forward(generator(), ids, states, mask, unconditional)
    for row in range(3):
        one = slice(row, row + 1)
        alone = forward(generator(), ids[one], states[one], mask[one], unconditional[one])
        assert error(alone.logits, together.logits[one]) < 1e-5


def test_unconditional_rows_know_the_prompt_by_its_length_alone():
    ids, states, mask, _ = inputs()
    unconditional = torch.ones(3, dtype=torch.bool)
    out = forward(generator(), ids, states, mask, unconditional)
    other = forward(generator(), ids, torch.randn_like(states), mask, unconditional)
    assert torch.equal(out.logits, other.logits)
    shorter = mask.clone()
    shorter[:, 0] = False
    assert error(forward(generator(), ids, states, shorter, unconditional).logits, out.logits) > 1e-2
    model = copy.deepcopy(generator())
    model.null_text += 1.0
    assert error(forward(model, ids, states, mask, unconditional).logits, out.logits) > 1e-2
    conditional = forward(generator(), *inputs()).logits
    assert torch.equal(forward(model, *inputs()).logits, conditional)


def test_text_outside_the_mask_is_never_seen():
    ids, states, mask, unconditional = inputs()
    expected = forward(generator(), ids, states, mask, unconditional).logits
    noisy = torch.where(mask[..., None], states, torch.randn_like(states) * 100)
    assert torch.equal(forward(generator(), ids, noisy, mask, unconditional).logits, expected)
    short = mask.sum(dim=1) <= 5
    assert short.any(), "some recorded prompts are shorter"
    ids, states, mask = ids[short], states[short], mask[short]
    for flags in (torch.zeros(len(ids), dtype=torch.bool), torch.ones(len(ids), dtype=torch.bool)):
        cut = forward(generator(), ids, states[:, :5], mask[:, :5], flags)
        assert error(cut.logits, forward(generator(), ids, states, mask, flags).logits) < 1e-5


def test_no_text_at_all_is_a_cross_attention_of_zeros():
    torch.manual_seed(0)
    attention = CrossAttention(8, 2)
    x, y = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[True] * 5, [False] * 5])
    out = attention(x, y, mask)
    assert error(out[1], attention.proj.bias.expand(3, 8)) < 1e-6
    assert error(out[:1], attention(x[:1], y[:1], mask[:1])) < 1e-6


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], count, -1).permute(0, 2, 1, 3)


def explicit(q, k, v, mask=None) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v in float64, one head after the other: (B, H, N, d) -> (B, N, H d)."""
    scores = torch.einsum("bhnd,bhtd->bhnt", q.double(), k.double()) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    out = torch.einsum("bhnt,bhtd->bhnd", scores.softmax(-1), v.double())
    return out.permute(0, 2, 1, 3).flatten(2)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_self_attention_is_the_formula(qk_norm):
    torch.manual_seed(1)
    layer = SelfAttention(24, 3, qk_norm).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).split(24, dim=-1)
    if qk_norm:
        torch.nn.init.normal_(layer.q_norm.weight)
        torch.nn.init.normal_(layer.k_norm.bias)

        def norm(t, module):  # over the full width, before the heads are split
            t = (t - t.mean(-1, keepdim=True)) / torch.sqrt(t.var(-1, unbiased=False, keepdim=True) + 1e-5)
            return t * module.weight + module.bias

        q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
    out = explicit(heads(q, 3), heads(k, 3), heads(v, 3))
    assert error(layer(x), out @ layer.proj.weight.T + layer.proj.bias) < 1e-12


def test_cross_attention_is_the_formula_also_with_holes_in_the_mask():
    torch.manual_seed(2)
    layer = CrossAttention(24, 3).double()
    x, y = torch.randn(2, 4, 24, dtype=torch.float64), torch.randn(2, 6, 24, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True, False, True], [True] + [False] * 5])
    k, v = (y @ layer.kv.weight.T + layer.kv.bias).split(24, dim=-1)
    out = explicit(heads(x @ layer.q.weight.T + layer.q.bias, 3), heads(k, 3), heads(v, 3), mask)
    assert error(layer(x, y, mask), out @ layer.proj.weight.T + layer.proj.bias) < 1e-12


def plain_norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + eps)


def test_block_is_the_formula():
    """On inputs so small that the norms' epsilon counts."""
    torch.manual_seed(3)
    block = Block(24, 3, 40, qk_norm=True).double()
    x, y = torch.randn(2, 5, 24).double() * 1e-3, torch.randn(2, 6, 24).double()
    mask = torch.rand(2, 6) < 0.7
    for part in (block.self_attn, block.cross_attn):
        torch.nn.init.zeros_(part.proj.bias)
        part.proj.weight.data *= 1e-3
    expected = x + block.self_attn(plain_norm(x))
    expected = expected + block.cross_attn(expected, y, mask)  # no norm in front
    inner = plain_norm(expected) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    gelu = inner / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    expected = expected + gelu @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    assert error(block(x, y, mask), expected) < 1e-12


def test_logits_and_hidden_states():
    """With blocks that add nothing: hidden = embedding + position, logits = Linear(LN(hidden))."""
    model = copy.deepcopy(generator()).double()
    for block in model.blocks:
        for layer in (block.self_attn.proj, block.cross_attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    model.token_embedding.weight.data *= 1e-3
    model.position *= 1e-3
    ids, states, mask, unconditional = inputs()
    out = forward(model, ids, states.double(), mask, unconditional)
    hidden = model.token_embedding.weight[ids] + model.position
    assert error(out.hidden, hidden) < 1e-15
    assert error(out.logits, plain_norm(hidden) @ model.to_logits.weight.T + model.to_logits.bias) < 1e-12


def position_entry(dim: int, height: int, width: int, row: int, column: int, feature: int) -> float:
    """One entry of the sin-cos table, from the formula."""
    quarter = dim // 4
    coordinate = column / (width / 16) if feature < dim // 2 else row / (height / 16)
    within = feature % (dim // 2)
    angle = coordinate * 10000.0 ** (-(within % quarter) / quarter)
    return math.sin(angle) if within < quarter else math.cos(angle)


def position_table(dim: int, height: int, width: int) -> torch.Tensor:
    return torch.tensor(
        [
            [position_entry(dim, height, width, row, column, f) for f in range(dim)]
            for row in range(height)
            for column in range(width)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("name", sorted(vectors("positions")))
def test_recorded_positions(name):
    from dcar_fast.reference.positions import sincos_positions

    dim, height, width = map(int, name.split("x"))
    table = sincos_positions(dim, height, width)
    assert table.dtype == torch.float32
    assert error(table, vectors("positions")[name]) < 1e-6
    assert error(table[:, ::7], position_table(dim, height, width)[:, ::7]) < 1e-6


def test_positions_of_a_fake_tensor_run_are_not_kept():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    from dcar_fast.reference.positions import sincos_positions

    with FakeTensorMode():
        sincos_positions(20, 5, 3)
    table = sincos_positions(20, 5, 3)
    assert not isinstance(table, FakeTensor)
    assert error(table, position_table(20, 5, 3)) < 1e-6


@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (1, 16), (16, 1)])
def test_rectangular_grids_take_the_formula(grid):
    args = inputs()
    model = copy.deepcopy(generator())
    model.position.copy_(position_table(48, *grid))
    expected = forward(model, *args).logits  # the square grid, with this table in place of the stored one
    assert error(forward(generator(), *args, grid=grid).logits, expected) < 1e-5
    assert error(forward(generator(), *args).logits, expected) > 1e-2


def test_the_stored_table_serves_its_own_grid_only():
    args = inputs()
    square = forward(generator(), *args)
    assert torch.equal(forward(generator(), *args, grid=(4, 4)).logits, square.logits)
    moved = copy.deepcopy(generator())
    moved.position += 1.0
    assert error(forward(moved, *args).logits, square.logits) > 1e-2
    assert torch.equal(forward(moved, *args, grid=(2, 8)).logits, forward(generator(), *args, grid=(2, 8)).logits)


@pytest.mark.parametrize(("tokens", "grid"), [(1, None), (9, None), (15, (3, 5)), (6, (6, 1))])
def test_other_token_counts(tokens, grid):
    ids, states, mask, unconditional = inputs()
    out = forward(generator(), ids[:, :tokens], states, mask, unconditional, grid)
    height, width = grid or (math.isqrt(tokens),) * 2
    sizes = dict(settings("generator")["config"], num_tokens=1)
    other = DCAR(DCARConfig.from_dict(sizes)).eval()
    state = dict(generator().state_dict(), position=torch.zeros(1, 48))
    other.load_state_dict(state)
    other.register_buffer("position", position_table(48, height, width).float())
    other.positions = lambda _: other.position
    assert error(out.logits, forward(other, ids[:, :tokens], states, mask, unconditional, grid).logits) < 1e-5


def test_the_model_keeps_its_own_copy_of_the_position_table():
    first, second = DCAR(generator_config()), DCAR(generator_config())
    first.position.fill_(7.0)
    assert error(second.position, position_table(48, 4, 4)) < 1e-6
    assert error(DCAR(generator_config()).position, position_table(48, 4, 4)) < 1e-6


def test_buffers_are_not_trained_and_everything_else_is():
    model = copy.deepcopy(generator()).train()
    ids, states, mask, _ = inputs()
    out = model(ids, states, mask, torch.tensor([False, True, False]))
    (out.logits.square().mean() + out.hidden.square().mean()).backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert all(name.startswith("head.") for name in names), names
    for name, parameter in model.named_parameters():
        if not name.startswith("head."):
            assert parameter.grad.abs().max() > 0, name
    assert {name for name, _ in model.named_buffers()} == {"position", "null_text"}


def test_initialisation():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_heads": 4, "num_layers": 1, "mlp_hidden_size": 64, "codebook_size": 50}
    model = DCAR(DCARConfig(**sizes, head_width=32, head_depth=1))
    assert model.null_text.shape == (300, 768)
    assert abs(model.null_text.std().item() * math.sqrt(768) - 1) < 0.01
    assert abs(model.null_text.mean().item()) < 1e-3
    assert model.head(torch.randn(4, 32), torch.arange(4), torch.randn(4, 64)).abs().max() == 0
    assert model.token_embedding.weight.shape == (51, 64), "one row per code and one for MASK"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = copy.deepcopy(generator()).to(dtype)
    out, expected = forward(model, *inputs()), forward(generator(), *inputs())
    assert out.logits.dtype == out.hidden.dtype == dtype
    scale = expected.logits.abs().max().item()
    assert error(out.logits, expected.logits) < (0.05 * scale if dtype == torch.bfloat16 else 1e-4)


BAD = {
    "ids too large": ("ids", lambda a: a["ids"].fill_(65)),
    "ids negative": ("ids", lambda a: a["ids"].fill_(-1)),
    "ids int32": ("ids", lambda a: a.update(ids=a["ids"].int())),
    "ids 1-D": ("ids", lambda a: a.update(ids=a["ids"][0])),
    "ids list": ("ids", lambda a: a.update(ids=a["ids"].tolist())),
    "ids no square": ("grid", lambda a: a.update(ids=a["ids"][:, :15])),
    "states width": ("text_states", lambda a: a.update(text_states=a["text_states"][..., :23])),
    "states batch": ("text_states", lambda a: a.update(text_states=a["text_states"][:2])),
    "states 2-D": ("text_states", lambda a: a.update(text_states=a["text_states"][0])),
    "states too long": ("text_states", lambda a: a.update(text_states=torch.zeros(3, 13, 24))),
    "states empty": ("text_states", lambda a: a.update(text_states=torch.zeros(3, 0, 24))),
    "states int": ("text_states", lambda a: a.update(text_states=a["text_states"].long())),
    "states None": ("text_states", lambda a: a.update(text_states=None)),
    "mask length": ("text_mask", lambda a: a.update(text_mask=a["text_mask"][:, :11])),
    "mask batch": ("text_mask", lambda a: a.update(text_mask=a["text_mask"][:2])),
    "mask int": ("text_mask", lambda a: a.update(text_mask=a["text_mask"].long())),
    "unconditional length": (
        "unconditional",
        lambda a: a.update(unconditional=torch.zeros(2, dtype=torch.bool)),
    ),
    "unconditional float": ("unconditional", lambda a: a.update(unconditional=torch.zeros(3))),
    "unconditional bool": ("unconditional", lambda a: a.update(unconditional=True)),
    "grid product": ("grid", lambda a: a.update(grid=(3, 5))),
    "grid negative": ("grid", lambda a: a.update(grid=(-4, -4))),
    "grid zero": ("grid", lambda a: a.update(grid=(0, 16))),
    "grid float": ("grid", lambda a: a.update(grid=(2.5, 6.4))),
    "grid one number": ("grid", lambda a: a.update(grid=4)),
    "grid three numbers": ("grid", lambda a: a.update(grid=(4, 4, 1))),
    "grid text": ("grid", lambda a: a.update(grid="ab")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    name, change = BAD[case]
    ids, states, mask, unconditional = inputs()
    arguments = {"ids": ids.clone(), "text_states": states, "text_mask": mask, "unconditional": unconditional}
    change(arguments)
    with pytest.raises(ValueError, match=name):
        forward(generator(), **arguments)

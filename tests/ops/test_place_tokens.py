"""Every implementation of place_tokens: what placing, sorting and listing in Python give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcar_fast.noise import ConfidenceNoise, CounterNoise
from dcar_fast.ops import _native, place_tokens, remask
from dcar_fast.reference.place_tokens import place_tokens as reference
from dcar_fast.reference.sample_from_logits import gumbel
from tests.ops.placing_cases import MASK, SEEDS, cases, check, make

pytestmark = pytest.mark.usefixtures("poisoned_empty")

CPU = torch.device("cpu")
HERE = ["reference", "native", None]
GPU = ["reference", "triton", None]
SIZES = (1, 2, 31, 64, 70, 257)


def skip_unless_built(backend: str | None) -> None:
    if backend == "native" and not (usable := _native.cpu_usable(CPU)).ok:
        pytest.skip(usable.reason)


@pytest.mark.parametrize("backend", HERE)
def test_python_agrees(backend: str | None) -> None:
    skip_unless_built(backend)
    for case in cases(SIZES):
        check(case.run(place_tokens, backend=backend), case)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
def test_python_agrees_on_a_gpu(backend: str | None) -> None:
    for case in cases((*SIZES, 1000)):
        check(case.run(place_tokens, "cuda", backend=backend), case)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1025, 4096, 5000, 16384])
def test_long_rows_on_a_gpu(tokens: int) -> None:
    for noise in ("counter", "last"):
        case = make(3, tokens, "random", scattered=True, noise=noise)
        check(case.run(place_tokens, "cuda", backend="triton"), case)


@pytest.mark.gpu
def test_one_launch_reads_the_seeds_from_the_device() -> None:
    """Captured once, replayed with other seeds and counts."""
    case = make(3, 256, "random", scattered=True, noise="counter")
    ids, rows, sampled, confidence, counts = (x.cuda() for x in case[:5])
    seeds = case.noise.seeds.cuda()
    settings = {"tau": case.tau, "noise": ConfidenceNoise(seeds, 3), "next_open": 200, "backend": "triton"}
    place_tokens(ids, rows, sampled, confidence, counts, MASK, **settings)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = place_tokens(ids, rows, sampled, confidence, counts, MASK, **settings)
    seeds.add_(77)
    counts.copy_(torch.tensor([1, 100, 250]))
    graph.replay()
    other = case._replace(noise=ConfidenceNoise(seeds.cpu(), 3), num_masked=counts.cpu(), next_open=200)
    check(tuple(result.cpu() for result in results), other)


@pytest.mark.gpu
def test_kernels_take_the_nearest_allowed_count() -> None:
    ids, sampled = torch.full((4, 10), MASK).cuda(), torch.arange(40).view(4, 10).cuda()
    counts = torch.tensor([-1, 11, 5 - 2**63, 2**40]).cuda()
    settings = {"tau": 1.0, "noise": torch.rand(4, 10).cuda(), "next_open": 10, "backend": "triton"}
    new_ids, _ = place_tokens(ids, None, sampled, torch.randn(4, 10).cuda(), counts, MASK, **settings)
    assert (new_ids == MASK).sum(1).tolist() == [0, 10, 0, 10]


@pytest.mark.parametrize("backend", HERE)
def test_many_seeds(backend: str | None) -> None:
    skip_unless_built(backend)
    for start in range(0, 3000, 300):
        case = make(300, 64, "random", scattered=True, noise="counter", seed=start)
        noise = ConfidenceNoise(torch.arange(start, start + 300) * 2**40, 7)
        case = case._replace(noise=noise)
        check(case.run(place_tokens, backend=backend), case)


@pytest.mark.parametrize("backend", HERE)
def test_is_the_end_of_a_reference_step(backend: str | None) -> None:
    """The lines of the reference sampler, on all positions and on the open ones alone."""
    skip_unless_built(backend)
    case = make(3, 49, "random", scattered=False, noise="counter")
    is_open = case.ids == MASK
    u = CounterNoise(case.noise.seeds.tolist(), num_tokens=49, codebook_size=9, latent_channels=4).confidence(3)
    assert torch.equal(case.noise.uniform(49), u)
    noisy = (case.confidence + case.tau * gumbel(u)).masked_fill(~is_open, float("inf"))
    counts = is_open.sum(1) // 2
    want = remask(torch.where(is_open, case.sampled, case.ids), noisy, counts, MASK)
    most = int(is_open.sum(1).max())
    rows = (~is_open).byte().argsort(dim=1, stable=True)[:, :most]  # not contiguous
    settings = {"tau": case.tau, "noise": case.noise, "next_open": int(counts.max()), "backend": backend}
    everything = place_tokens(case.ids, None, case.sampled, case.confidence, counts, MASK, **settings)
    some = case.sampled.gather(1, rows), case.confidence.gather(1, rows)
    for new_ids, next_rows in (everything, place_tokens(case.ids, rows, *some, counts, MASK, **settings)):
        assert torch.equal(new_ids, want)
        for row, count in enumerate(counts.tolist()):
            assert next_rows[row, :count].tolist() == (want[row] == MASK).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("backend", HERE)
def test_the_last_step_ignores_the_counts(backend: str | None) -> None:
    skip_unless_built(backend)
    ids, sampled = torch.tensor([[MASK, 3, MASK]]), torch.tensor([[7, 8, 9]])
    settings = {"tau": 1.0, "noise": None, "next_open": 0, "backend": backend}
    new_ids, rows = place_tokens(ids, None, sampled, torch.zeros(1, 3), torch.tensor([-5]), MASK, **settings)
    assert new_ids.tolist() == [[7, 3, 9]] and rows.shape == (1, 0)


@pytest.mark.parametrize("backend", HERE)
def test_open_positions_that_were_not_sampled_stay_open_and_rank_last(backend: str | None) -> None:
    skip_unless_built(backend)
    ids, rows = torch.tensor([[MASK, MASK, 3, MASK]]), torch.tensor([[3, 2]])
    given = rows, torch.tensor([[7, 8]]), torch.tensor([[float("inf"), 0.0]])
    settings = {"tau": 0.0, "noise": torch.full((1, 4), 0.5), "next_open": 4, "backend": backend}
    for k, want, looks in ((0, [MASK, MASK, 3, 7], [0, 1, 2, 3]), (1, [MASK, MASK, 3, MASK], [0, 1, 3, 2])):
        got = place_tokens(ids, *given, torch.tensor([k]), MASK, **settings)
        assert [x.tolist() for x in got] == [[want], [looks]]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("mask_id", [-(2**63), -1, 0, 1, 2**63 - 1])
def test_any_mask_id(backend: str | None, mask_id: int) -> None:
    skip_unless_built(backend)
    ids, counts = torch.tensor([[mask_id, 17, mask_id]]), torch.tensor([1])
    settings = {"tau": 0.0, "noise": torch.full((1, 3), 0.5), "next_open": 2, "backend": backend}
    got = place_tokens(ids, None, torch.tensor([[5, 6, 7]]), torch.tensor([[2.0, 0, 1]]), counts, mask_id, **settings)
    assert [x.tolist() for x in got] == [[[5, 17, mask_id]], [[2, 0]]]


@pytest.mark.parametrize("backend", HERE)
def test_empty(backend: str | None) -> None:
    skip_unless_built(backend)
    for batch, tokens, given in ((0, 5, 3), (3, 0, 0), (0, 0, 0), (2, 4, 0)):
        ids, rows = torch.full((batch, tokens), MASK), torch.zeros(batch, given, dtype=torch.int64)
        seeds = torch.zeros(batch, dtype=torch.int64)
        settings = {"tau": 1.0, "noise": ConfidenceNoise(seeds, 0), "next_open": tokens, "backend": backend}
        new_ids, next_rows = place_tokens(ids, rows, rows, torch.zeros(batch, given), seeds, MASK, **settings)
        assert torch.equal(new_ids, ids) and next_rows.tolist() == [list(range(tokens))] * batch


@pytest.mark.parametrize("backend", HERE)
def test_many_rows_and_threads(backend: str | None) -> None:
    skip_unless_built(backend)
    batch = 65_537
    ids, sampled = torch.full((batch, 3), MASK), torch.arange(3 * batch).remainder(1000).view(batch, 3)
    counts, confidence = torch.arange(batch) % 4, torch.rand(batch, 3) * 100
    settings = {"tau": 0.0, "noise": torch.full((batch, 3), 0.5), "next_open": 3, "backend": backend}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        new_ids, next_rows = place_tokens(ids, None, sampled, confidence, counts, MASK, **settings)
    finally:
        torch.set_num_threads(before)
    assert torch.equal((new_ids == MASK).sum(1), counts)
    lowest = confidence.argmin(1, keepdim=True)
    assert torch.equal(new_ids.gather(1, lowest)[:, 0] == MASK, counts > 0)
    assert torch.equal(next_rows.sort(1).values, torch.arange(3).expand(batch, 3))


@pytest.mark.parametrize("backend", HERE)
def test_strides_do_not_matter(backend: str | None) -> None:
    skip_unless_built(backend)

    def transposed(x: Tensor) -> Tensor:
        return x.T.contiguous().T

    def sliced(x: Tensor) -> Tensor:
        wide = torch.zeros(2 * x.shape[0], 3 * x.shape[1], dtype=x.dtype)
        wide[1::2, 2::3] = x
        return wide[1::2, 2::3]

    def wider(x: Tensor) -> Tensor:
        return torch.cat((x, x), 1)[:, : x.shape[1]]

    for noise in ("recorded", "counter"):
        case = make(6, 40, "ties", scattered=True, noise=noise)
        want = case.run(place_tokens, backend=backend)
        check(want, case)
        for move in (transposed, sliced, wider):
            moved = case._replace(**{name: move(getattr(case, name)) for name in ("ids", "rows", "sampled")})
            moved = moved._replace(confidence=move(case.confidence), num_masked=sliced(case.num_masked[:, None])[:, 0])
            if noise == "recorded":
                moved = moved._replace(noise=move(case.noise))
            else:
                moved = moved._replace(noise=ConfidenceNoise(sliced(case.noise.seeds[:, None])[:, 0], 3))
            for a, b in zip(moved.run(place_tokens, backend=backend), want, strict=True):
                assert torch.equal(a, b) and a.is_contiguous()


IDS, COUNTS = torch.full((2, 4), 9), torch.tensor([1, 4])
SAMPLED, CONFIDENCE, ROWS = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4), torch.tensor([[0, 1], [3, 2]])
NOISE = ConfidenceNoise(torch.tensor([1, 2]), 0)
ARGUMENTS = {"ids": IDS, "rows": None, "sampled": SAMPLED, "confidence": CONFIDENCE, "num_masked": COUNTS, "mask_id": 9}
ARGUMENTS |= {"tau": 1.0, "noise": NOISE, "next_open": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": IDS.int()}, "ids is torch.int32, allowed is torch.int64"),
        ({"ids": IDS[0]}, r"ids has shape \(4,\), allowed is \(B, N\)"),
        ({"ids": None}, "ids is a NoneType, allowed is a tensor"),
        ({"rows": ROWS}, r"sampled has shape \(2, 4\), allowed is \(2, 2\)"),
        ({"rows": ROWS[:1]}, r"rows has shape \(1, 2\), allowed is \(2, n\)"),
        ({"rows": ROWS.int()}, "rows is torch.int32"),
        ({"rows": ROWS.to("meta")}, "rows is on meta, allowed is the device of ids, cpu"),
        ({"sampled": SAMPLED.float()}, "sampled is torch.float32, allowed is torch.int64"),
        ({"sampled": SAMPLED.to("meta")}, "sampled is on meta"),
        ({"confidence": CONFIDENCE.double()}, "confidence is torch.float64, allowed is torch.float32"),
        ({"confidence": CONFIDENCE[:, 1:]}, r"confidence has shape \(2, 3\), allowed is \(2, 4\)"),
        ({"confidence": CONFIDENCE.clone().requires_grad_()}, "confidence requires a gradient"),
        ({"num_masked": COUNTS.int()}, "num_masked is torch.int32, allowed is torch.int64"),
        ({"num_masked": COUNTS[:1]}, r"num_masked has shape \(1,\), allowed is \(2\)"),
        ({"mask_id": 9.0}, "mask_id is a float, allowed is an integer"),
        ({"mask_id": 2**63}, "mask_id is 9223372036854775808, allowed is what int64 holds"),
        ({"tau": -1.0}, "tau is -1.0, allowed is a finite number >= 0"),
        ({"tau": float("nan")}, "tau is nan"),
        ({"next_open": 5}, r"next_open is 5, allowed is an integer in 0\.\.4"),
        ({"next_open": -1}, "next_open is -1"),
        ({"next_open": True}, "next_open is True"),
        ({"next_open": 2.0}, "next_open is 2.0"),
        ({"noise": CONFIDENCE[:1]}, r"noise has shape \(1, 4\), allowed is \(2, 4\)"),
        ({"noise": SAMPLED}, "noise is torch.int64, allowed are floating-point types"),
        ({"noise": CONFIDENCE.to("meta")}, "noise is on meta"),
        ({"noise": 3}, "noise is a int, allowed is a tensor"),
        ({"noise": ConfidenceNoise(COUNTS[:1], 0)}, r"noise.seeds has shape \(1,\), allowed is \(2\)"),
        ({"noise": ConfidenceNoise(COUNTS.int(), 0)}, "noise.seeds is torch.int32"),
        ({"noise": ConfidenceNoise(COUNTS, -1)}, r"noise.step is -1, allowed are 0\.\.4294967295"),
        ({"noise": ConfidenceNoise(COUNTS, 2**32)}, "noise.step is 4294967296"),
        ({"backend": "fastest"}, "backend is 'fastest'"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        place_tokens(**{**ARGUMENTS, **change})


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"num_masked": torch.tensor([1, 5])}, r"num_masked.*allowed are 0\.\.4"),
        ({"num_masked": torch.tensor([-(2**63), 0])}, r"num_masked.*allowed are 0\.\.4"),
        ({"noise": ConfidenceNoise(torch.tensor([0, -1]), 0)}, r"noise.seeds.*allowed are 0\.\."),
        ({"rows": torch.tensor([[0, 1], [3, 4]])}, r"rows.*allowed are 0\.\.3"),
        ({"rows": torch.tensor([[0, -1], [3, 2]])}, r"rows.*allowed are 0\.\.3"),
    ],
)
def test_values_out_of_range(backend: str | None, change: dict, name: str) -> None:
    skip_unless_built(backend)
    if "rows" in change:
        change = {**change, "sampled": SAMPLED[:, :2], "confidence": CONFIDENCE[:, :2]}
    with pytest.raises(ValueError, match=f"^{name}"):
        place_tokens(**{**ARGUMENTS, **change, "backend": backend})


def test_numpy_integers_are_integers() -> None:
    numpy = pytest.importorskip("numpy")
    got = place_tokens(**{**ARGUMENTS, "mask_id": numpy.int64(9)})
    assert all(map(torch.equal, got, place_tokens(**ARGUMENTS)))


def test_opcheck() -> None:
    for backend in ("reference", "native"):
        skip_unless_built(backend)
        rows = (ROWS, SAMPLED[:, :2], CONFIDENCE[:, :2])
        for given, noise in (
            ((None, SAMPLED, CONFIDENCE), (None, NOISE.seeds, 3)),
            (rows, (torch.rand(2, 4), None, 0)),
            (rows, (None, None, 0)),
        ):
            arguments = (IDS, *given, COUNTS, 9, 0.5, *noise, 3, backend)
            torch.library.opcheck(torch.ops.dcar_fast.place_tokens.default, arguments)


def test_compiles_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the compiler needs a torch.empty of its own
    torch.compiler.reset()

    def step(ids, rows, sampled, confidence, counts, seeds, next_open):
        settings = {"tau": 0.7, "noise": ConfidenceNoise(seeds, 3), "next_open": next_open}
        new_ids, next_rows = place_tokens(ids, rows, sampled, confidence, counts, MASK, **settings)
        return new_ids + 1, next_rows + 1

    compiled = torch.compile(step, fullgraph=True)
    for tokens in (8, 13, 40):
        case = make(3, tokens, "random", scattered=True, noise="counter")
        new_ids, next_rows = compiled(*case[:5], case.noise.seeds, case.next_open)
        check((new_ids - 1, next_rows - 1), case)


def test_exports() -> None:
    class Model(torch.nn.Module):
        def forward(self, ids: Tensor, sampled: Tensor, confidence: Tensor, counts: Tensor, seeds: Tensor):
            noise = ConfidenceNoise(seeds, 1)
            return place_tokens(ids, None, sampled, confidence, counts, 9, tau=1.0, noise=noise, next_open=2)

    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", min=2)
    both, one = {0: batch, 1: tokens}, {0: batch}
    inputs = (IDS, SAMPLED, CONFIDENCE, COUNTS, NOISE.seeds)
    exported = torch.export.export(Model(), inputs, dynamic_shapes=(both, both, both, one, one))
    assert any(node.target is torch.ops.dcar_fast.place_tokens.default for node in exported.graph.nodes)
    seeds = torch.tensor(SEEDS[:5])
    inputs = (torch.full((5, 11), 9), torch.arange(55).view(5, 11), torch.randn(5, 11), torch.arange(5), seeds)
    want = reference(inputs[0], None, *inputs[1:4], 9, tau=1.0, noise=ConfidenceNoise(seeds, 1), next_open=2)
    assert all(map(torch.equal, exported.module()(*inputs), want))


ADDRESSES = {name: 8 for name in ("ids", "rows", "chosen", "confidence", "uniforms", "seeds", "num_masked")}
LAYOUT = {f"{name}_stride": 1 for name in ("ids", "rows", "chosen", "confidence", "uniforms")}
LAYOUT |= {"new_ids": 8, "next_rows": 8, "batch": 1, "tokens": 1, "sampled": 1, "next_open": 1, "step": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": 0}, "ids is a null pointer"),
        ({"chosen": 0}, "chosen is a null pointer"),
        ({"uniforms": 0}, "uniforms is a null pointer"),
        ({"seeds": 0, "noise": "counter"}, "seeds is a null pointer"),
        ({"num_masked": 0}, "num_masked is a null pointer"),
        ({"next_rows": 0}, "next_rows is a null pointer"),
        ({"rows": 4}, "rows is not aligned to 8"),
        ({"confidence": 2}, "confidence is not aligned to 4"),
        ({"ids_stride": -1}, "ids stride is -1"),
        ({"noise": "white"}, "noise is 'white'"),
        ({"next_open": 2}, "next_open is 2"),
        ({"rows": 0, "sampled": 2}, "sampled is 2"),
        ({"step": 2**32}, "step is 4294967296"),
        ({"batch": -1}, "batch is -1"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"batch": 2**40, "tokens": 2**40}, "ids has more elements"),
    ],
)
def test_bindings_check_before_they_touch_memory(change: dict, message: str) -> None:
    skip_unless_built("native")
    settings = {"mask_id": 0, "tau": 1.0, "noise": "uniforms", "num_threads": 1}
    with pytest.raises(ValueError, match=message):
        _native.module().place_tokens(**{**ADDRESSES, **LAYOUT, **settings, **change})

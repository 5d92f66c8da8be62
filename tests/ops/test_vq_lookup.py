"""Every implementation of vq_lookup against float64 and the tie rule."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.ops import _native, vq_lookup
from dcar_fast.ops.vq_lookup import DTYPES
from dcar_fast.reference.vq_lookup import vq_lookup as reference
from tests.tolerance import check_choices, check_close, cosine_bound

pytestmark = pytest.mark.usefixtures("poisoned_empty")

Lookup = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
CPU = torch.device("cpu")


def skip_unless_built() -> None:
    if not (judgement := _native.cpu_usable(CPU)).ok:
        pytest.skip(judgement.reason)


def native(isa: str, threads: int = 2) -> Lookup:
    """The C++ kernel for one instruction set and number of threads."""

    def lookup(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, codebook = (x.contiguous() if x.dtype in DTYPES else x.float().contiguous() for x in (z, codebook))
        outputs = torch.empty(len(z), dtype=torch.int64), torch.empty(z.shape), torch.empty(z.shape)
        names = ("z", "codebook", "ids", "codes", "residual")
        _native.module().vq_lookup(
            **dict(zip(names, (t.data_ptr() for t in (z, codebook, *outputs)), strict=True)),
            rows=len(z),
            num_codes=len(codebook),
            channels=z.shape[1],
            z_dtype=DTYPES[z.dtype],
            codebook_dtype=DTYPES[codebook.dtype],
            num_threads=threads,
            isa=isa,
        )
        return outputs

    return lookup


@pytest.fixture(
    params=["reference", "ops", "native-avx512vnni", "native-avx512", "native-avx2", "native-generic"],
)
def lookup(request: pytest.FixtureRequest) -> Lookup:
    if not request.param.startswith("native"):
        return {"reference": reference, "ops": vq_lookup}[request.param]
    skip_unless_built()
    isa = request.param.removeprefix("native-")
    return native(usable(isa))


def usable(isa: str) -> str:
    if isa not in _native.module().vq_lookup_isas():
        pytest.skip(f"this CPU has no {isa}")
    return isa


def data(rows: int, num_codes: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, channels, generator=generator), torch.randn(num_codes, channels, generator=generator)


def check(got: tuple[Tensor, Tensor, Tensor], z: Tensor, codebook: Tensor) -> None:
    """``got`` against float64, ids within rounding, values by the tolerance rule at the chosen ids."""
    ids, codes, residual = got
    wide_z, wide_codes = F.normalize(z.double(), dim=1), F.normalize(codebook.double(), dim=1)
    check_choices(ids, wide_z @ wide_codes.T, cosine_bound(z.shape[1]), "ids")
    plain_z, plain_codes = F.normalize(z.float(), dim=1), F.normalize(codebook.float(), dim=1)
    check_close(codes, plain_codes[ids], wide_codes[ids], "codes")
    check_close(residual, plain_z - plain_codes[ids], wide_z - wide_codes[ids], "residual")


# Around the tiles of 6 rows, 96 rows a panel, and 8, 16 or 64 codes a block.
SHAPES = [
    (1, 1, 1),
    (1, 2, 3),
    (5, 63, 17),
    (6, 64, 32),
    (7, 65, 33),
    (13, 9, 100),
    (97, 129, 31),
    (193, 1000, 8),
    (1000, 513, 2),
    (3, 16384, 32),
    (2, 40, 1500),
]


@pytest.mark.parametrize(("rows", "num_codes", "channels"), SHAPES)
def test_float64_agrees(lookup: Lookup, rows: int, num_codes: int, channels: int) -> None:
    z, codebook = data(rows, num_codes, channels)
    check(lookup(z, codebook), z, codebook)


def test_full_size_ids_equal_float64(lookup: Lookup) -> None:
    """512 rows x 16384 codes x 32 channels, where half-precision products or TF32 get ids wrong."""
    z, codebook = data(512, 16384, 32, seed=1)
    scores = F.normalize(z.double(), dim=1) @ F.normalize(codebook.double(), dim=1).T
    first, second = scores.topk(2, dim=1).values.unbind(1)
    assert (first - second).min() > 4e-7, "the data must be decidable in float32, or this test says nothing"
    assert torch.equal(lookup(z, codebook)[0], scores.argmax(dim=1))


def test_no_rows(lookup: Lookup) -> None:
    ids, codes, residual = lookup(torch.zeros(0, 5), torch.ones(3, 5))
    assert (ids.shape, codes.shape, residual.shape) == ((0,), (0, 5), (0, 5))
    assert (ids.dtype, codes.dtype, residual.dtype) == (torch.int64, torch.float32, torch.float32)


@pytest.mark.parametrize("num_codes", [2, 3, 7, 8, 9, 15, 17, 31, 63, 64, 65, 127, 130, 1000])
@pytest.mark.parametrize("channels", [1, 3, 8, 32, 33])
def test_equal_codes_tie_to_the_lowest(lookup: Lookup, num_codes: int, channels: int) -> None:
    z, one = data(7, 1, channels, seed=num_codes)
    assert lookup(z, one.expand(num_codes, channels))[0].tolist() == [0] * 7


def test_repeated_codes_tie_to_the_lowest(lookup: Lookup) -> None:
    """Each of 50 directions many times over in random order, also scaled by powers of two, which normalise equally."""
    z, directions = data(200, 50, 32)
    generator = torch.Generator().manual_seed(5)
    which = torch.randint(0, 50, (3000,), generator=generator)
    scale = 2.0 ** torch.randint(-3, 4, (3000, 1), generator=generator)
    codebook = directions[which] * scale
    ids = lookup(z, codebook)[0]
    lowest = torch.stack([(which == which[i]).nonzero()[0, 0] for i in ids])
    assert torch.equal(ids, lowest)
    check_choices(ids, F.normalize(z.double()) @ F.normalize(codebook.double()).T, cosine_bound(32))


@pytest.mark.parametrize("num_codes", [1, 5, 8, 17, 64, 70])
def test_best_cosine_may_be_negative(lookup: Lookup, num_codes: int) -> None:
    """Padding that scores zero would win here."""
    z = torch.tensor([[1.0, 0.0]]).expand(9, 2)
    angle = torch.linspace(0, 1, num_codes)
    codebook = torch.stack([-1 - angle, angle], dim=1)  # cosine grows from -1 with the index
    ids, codes, _ = lookup(z, codebook)
    assert ids.tolist() == [num_codes - 1] * 9
    assert (codes[:, 0] < 0).all()


def test_rows_of_nan_get_code_zero(lookup: Lookup) -> None:
    z, codebook = data(20, 100, 9)
    clean = lookup(z, codebook)
    z[3, 2], z[11] = float("nan"), float("inf")  # inf / inf is NaN
    ids, codes, residual = lookup(z, codebook)
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[3, 11]] = True
    assert ids[bad].tolist() == [0, 0]
    assert residual[3].isnan().all() and residual[11].isnan().all()
    for got, want in zip((ids, codes, residual), clean, strict=True):
        assert torch.equal(got[~bad], want[~bad])
    check_close(codes[bad], F.normalize(codebook[[0, 0]]), F.normalize(codebook[[0, 0]].double()))


def test_codes_of_nan_are_never_chosen(lookup: Lookup) -> None:
    z, codebook = data(50, 70, 5)
    codebook[::2, 1] = float("nan")
    ids = lookup(z, codebook)[0]
    assert (ids % 2 == 1).all()
    assert torch.equal(ids, 2 * lookup(z, codebook[1::2])[0] + 1)
    assert lookup(z, torch.full_like(codebook, float("nan")))[0].tolist() == [0] * 50


def test_zero_vectors(lookup: Lookup) -> None:
    """Normalising divides by at least 1e-12: a zero row ties with everything, a zero code scores 0."""
    _, codebook = data(1, 30, 4)
    ids, _, residual = lookup(torch.zeros(2, 4), codebook)
    assert ids.tolist() == [0, 0] and residual.isfinite().all()
    codebook = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [-1.0, 1e-3]])
    assert lookup(torch.tensor([[1.0, 0.0]]), codebook)[0].tolist() == [1]


def test_tiny_and_huge_vectors_keep_their_direction(lookup: Lookup) -> None:
    z, codebook = data(40, 90, 16)
    scale = 10.0 ** torch.linspace(-9, 15, 40)[:, None]
    assert torch.equal(lookup(z * scale, codebook)[0], lookup(z, codebook)[0])


def test_strides_do_not_matter(lookup: Lookup) -> None:
    z, codebook = data(17, 300, 12)
    want = lookup(z, codebook)
    wide = torch.full((17, 36), float("nan"))
    wide[:, ::3] = z
    for got, expected in zip(lookup(wide[:, ::3], codebook.T.contiguous().T), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_computed_in_float32(lookup: Lookup, dtype: torch.dtype) -> None:
    z, codebook = (x.to(dtype) for x in data(30, 200, 20))
    got = lookup(z, codebook)
    assert got[1].dtype == got[2].dtype == torch.float32
    check(got, z, codebook)


def test_autocast_changes_nothing(lookup: Lookup) -> None:
    z, codebook = data(256, 4096, 32)
    want = lookup(z, codebook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = lookup(z, codebook)
    assert all(map(torch.equal, got, want))


def test_the_reference_carries_no_gradient() -> None:
    z, codebook = (x.requires_grad_() for x in data(4, 9, 3))
    assert not any(output.requires_grad for output in reference(z, codebook))


# Gradients


def through_normalise(z: Tensor, grad: Tensor) -> Tensor:
    leaf = z.detach().clone().requires_grad_()
    F.normalize(leaf, dim=1).backward(grad)
    assert leaf.grad is not None
    return leaf.grad


def odd_rows() -> Tensor:
    z = data(8, 1, 5, seed=3)[0].double()
    z[1], z[2], z[3], z[4], z[5] = 0.0, z[2] * 1e-14, z[3] * 1e9, float("nan"), z[5] * 1e-11
    return z


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("rows", ["random", "odd"])
def test_gradient_is_that_of_normalise(backend: str, rows: str) -> None:
    if backend == "native":
        skip_unless_built()
    z = (odd_rows() if rows == "odd" else data(20, 1, 5)[0].double()).requires_grad_()
    codebook = data(1, 9, 5)[1].double().requires_grad_()
    codes = vq_lookup(z, codebook, backend=backend)[1]
    grad = torch.randn(codes.shape, generator=torch.Generator().manual_seed(1))
    codes.backward(grad)
    want = through_normalise(z, grad.double())
    assert z.grad.dtype == torch.float64 and codebook.grad is None
    assert torch.equal(z.grad.isnan(), want.isnan())
    assert torch.allclose(z.grad, want, rtol=1e-12, atol=0, equal_nan=True)


def test_gradient_of_the_gradient_is_that_of_normalise() -> None:
    z, weight = data(6, 1, 4)[0].double(), data(6, 1, 4, seed=1)[0].double()

    def second(function: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = z.clone().requires_grad_()
        first = torch.autograd.grad((function(leaf) * weight).sum(), leaf, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    codebook = data(1, 7, 4)[1]
    got = second(lambda leaf: vq_lookup(leaf, codebook)[1])
    want = second(lambda leaf: F.normalize(leaf, dim=1))
    assert (got - want).abs().max() < 1e-6 * want.abs().max()  # codes, and with them their gradients, are float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_has_the_type_of_z(dtype: torch.dtype) -> None:
    z, codebook = data(30, 50, 8)
    z = z.to(dtype).requires_grad_()
    grad = data(30, 1, 8, seed=4)[0]
    vq_lookup(z, codebook)[1].backward(grad)
    check_close(z.grad, through_normalise(z.float(), grad).to(dtype), through_normalise(z.double(), grad.double()))


def test_only_codes_and_only_z_have_a_gradient() -> None:
    z, codebook = (x.requires_grad_() for x in data(4, 9, 3))
    ids, codes, residual = vq_lookup(z, codebook)
    assert codes.requires_grad and not ids.requires_grad and not residual.requires_grad
    assert not any(output.requires_grad for output in vq_lookup(z.detach(), codebook))
    with torch.no_grad():
        assert not any(output.requires_grad for output in vq_lookup(z, codebook))


# torch.library


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("backend", ["reference", None])
def test_opcheck(dtype: torch.dtype, rows: int, backend: str | None) -> None:
    z, codebook = data(rows, 9, 3)
    strided = z.to(dtype).T.contiguous().T
    op = torch.ops.dcar_fast.vq_lookup.default
    torch.library.opcheck(op, (strided, codebook, backend))
    # its traced check of gradients adds up all outputs in place, which fails where the first are integers; the next
    # test does it instead
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (strided.requires_grad_(), codebook, backend), test_utils=checks)


def test_compiles_and_exports_as_one_node() -> None:
    class Lookup(torch.nn.Module):
        def forward(self, z: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
            return vq_lookup(z * 2, codebook)

    z, codebook = data(11, 30, 6)
    want = vq_lookup(z * 2, codebook)
    compiled = torch.compile(Lookup(), fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(z, codebook), want))
    leaf, twin = (z.clone().requires_grad_() for _ in range(2))
    compiled(leaf, codebook)[1].square().sum().backward()
    Lookup()(twin, codebook)[1].square().sum().backward()
    assert torch.equal(leaf.grad, twin.grad)

    exported = torch.export.export(
        Lookup(), (z, codebook), dynamic_shapes={"z": {0: torch.export.Dim("rows")}, "codebook": None}
    )
    assert [str(node.target) for node in exported.graph.nodes].count("dcar_fast.vq_lookup.default") == 1
    more = data(40, 30, 6, seed=2)[0]
    assert all(map(torch.equal, exported.module()(more, codebook), vq_lookup(more * 2, codebook)))


# The reference


def test_reference_is_float64_for_float64() -> None:
    z, codebook = (x.double() for x in data(30, 400, 10))
    ids, codes, residual = reference(z, codebook)
    assert codes.dtype == residual.dtype == torch.float64
    assert torch.equal(ids, (F.normalize(z) @ F.normalize(codebook).T).argmax(1))
    assert (codes + residual - F.normalize(z)).abs().max() < 1e-15


@pytest.mark.parametrize("wide", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("backend", ["reference", None])
def test_float64_inputs_give_float32(wide: tuple[bool, bool], backend: str | None) -> None:
    z, codebook = (x.double() if double else x for x, double in zip(data(30, 400, 10), wide, strict=True))
    got = vq_lookup(z, codebook, backend=backend)
    assert got[1].dtype == got[2].dtype == torch.float32
    check(got, z, codebook)


def test_reference_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    z, codebook = data(50, 60, 7)
    want = reference(z, codebook)
    monkeypatch.setattr("dcar_fast.reference.vq_lookup.SCORES_PER_BLOCK", 130)  # two rows at a time
    assert all(map(torch.equal, reference(z, codebook), want))


@pytest.fixture
def module():
    skip_unless_built()
    return _native.module()


# The native kernels


def test_threads_do_not_change_the_result(module) -> None:
    z, codebook = data(500, 3000, 19)
    for isa in module.vq_lookup_isas()[:2]:
        want = native(isa, threads=1)(z, codebook)
        for threads in (2, 3, 7, 64):
            assert all(map(torch.equal, native(isa, threads)(z, codebook), want)), (isa, threads)


def test_codebook_of_several_slices(module) -> None:
    """More than the 16 MB that are packed at a time; the best code lies in the second slice, its equals around it."""
    z, codebook = data(3, 70_000, 64)
    codebook[[68_001, 69_999]] = z[1]
    codebook[[5, 67_000]] = z[2] * 4
    got = vq_lookup(z, codebook, backend="native")
    assert got[0][1:].tolist() == [68_001, 5]
    check(got, z, codebook)


def bit_patterns(dtype: torch.dtype) -> Tensor:
    """Every number of a 16-bit type, subnormals, infinities and NaN included, beside a 1: (65536, 2)."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return torch.stack([every, torch.ones_like(every)], dim=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_native_widens_every_16_bit_number(module, dtype: torch.dtype) -> None:
    z, codebook = bit_patterns(dtype), data(1, 20, 2)[1].to(dtype)
    for got, want in zip(native("generic")(z, codebook), native("generic")(z.float(), codebook.float()), strict=True):
        assert torch.equal(got.nan_to_num(nan=9.0), want.nan_to_num(nan=9.0))
    codes = torch.cat([z, codebook])
    got, want = (native("generic")(codebook, x)[0] for x in (codes, codes.float()))
    assert torch.equal(got, want)


def clustered(num_codes: int, channels: int, spread: float, clusters: int) -> Tensor:
    _, centres = data(1, clusters, channels, seed=7)
    return centres.repeat(num_codes // clusters + 1, 1)[:num_codes] + spread * data(1, num_codes, channels, seed=8)[1]


def next_to_each_other(num_codes: int, channels: int) -> Tensor:
    """Codes that differ in the last bits of one channel."""
    codes = data(1, 1, channels, seed=9)[1].repeat(num_codes, 1)
    steps = torch.randint(-3, 4, (num_codes,), generator=torch.Generator().manual_seed(9), dtype=torch.int32)
    where = torch.arange(num_codes) % channels
    codes[torch.arange(num_codes), where] = (codes[torch.arange(num_codes), where].view(torch.int32) + steps).view(
        torch.float32
    )
    return codes


def hard_codebooks(num_codes: int, channels: int) -> dict[str, Tensor]:
    """Codebooks on which 8-bit scores say little."""
    random = data(1, num_codes, channels, seed=6)[1]
    outlier, sparse, tiny, holes = random.clone(), torch.zeros_like(random), random.clone(), random.clone()
    outlier[num_codes // 2] = 0.0
    outlier[num_codes // 2, 0] = 1.0  # the step of all codes is that of the largest number
    sparse[torch.arange(num_codes), torch.arange(num_codes) % channels] = random[:, 0]
    tiny[::2] *= 1e-30  # too small to normalise: codes of a length far below 1
    holes[::3] = float("nan")
    holes[1::7] = 0.0
    return {
        "random": random,
        "repeated": random[torch.randint(0, 9, (num_codes,), generator=torch.Generator().manual_seed(1))],
        "one cluster": clustered(num_codes, channels, 1e-4, 1),
        "twenty clusters": clustered(num_codes, channels, 1e-2, 20),
        "next to each other": next_to_each_other(num_codes, channels),
        "all equal": random[:1].repeat(num_codes, 1),
        "zeros": torch.zeros_like(random),
        "subnormal": random * 1e-41,
        "outlier": outlier,
        "sparse": sparse,
        "tiny": tiny,
        "holes": holes,
        "nothing": torch.full_like(random, float("nan")),
    }


@pytest.mark.parametrize(
    ("rows", "num_codes", "channels"),
    [(200, 3000, 32), (100, 1000, 3), (100, 700, 1), (60, 2000, 67), (7, 33_000, 8), (20, 300, 1500), (3, 70, 8193)],
)
def test_filtering_changes_nothing(module, rows: int, num_codes: int, channels: int) -> None:
    """Codes ruled out by 8-bit scores are never the best, nor equal to it with a lower index."""
    fast, plain = native(usable("avx512vnni")), native("avx512")
    for name, codebook in hard_codebooks(num_codes, channels).items():
        z = torch.cat([data(rows, 1, channels)[0], codebook[:: max(1, num_codes // rows)][:rows]])
        z[1], z[2], z[3 % rows], z[4 % rows] = 0.0, z[2] * 1e-30, z[3 % rows] * 1e25, float("nan")
        near = z + 1e-3 * data(len(z), 1, channels, seed=2)[0]
        for got, want in zip(fast(near, codebook), plain(near, codebook), strict=True):
            assert torch.equal(got.nan_to_num(nan=9.0), want.nan_to_num(nan=9.0)), name


def test_calls_from_several_threads(module) -> None:
    """The kernel runs without the GIL and keeps its state to itself."""
    cases = [data(100 + 17 * i, 2000, 24, seed=i) for i in range(4)]
    want = [vq_lookup(*case, backend="native") for case in cases]
    got: list[list[tuple[Tensor, ...]]] = [[] for _ in cases]

    def work(i: int) -> None:
        for _ in range(10):
            got[i].append(vq_lookup(*cases[i], backend="native"))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, expected in zip(got, want, strict=True):
        assert len(results) == 10
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": 0}, "z is a null pointer"),
        ({"codebook": 0}, "codebook is a null pointer"),
        ({"residual": 2}, "residual is not aligned"),
        ({"ids": 4}, "ids is not aligned"),
        ({"rows": -1}, "rows is -1"),
        ({"num_codes": 0}, "num_codes is 0"),
        ({"channels": 0}, "channels is 0"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"isa": "mmx"}, "isa is 'mmx'"),
        ({"z": 2}, "z is not aligned to 4"),
        ({"codebook": 1}, "codebook is not aligned to 2"),
        ({"z_dtype": "float64"}, "z_dtype is 'float64', allowed are 'float32', 'float16' and 'bfloat16'"),
        ({"codebook_dtype": ""}, "codebook_dtype is ''"),
        ({"rows": 2**62, "channels": 2**62}, "z has more elements"),
        ({"num_codes": 2**62, "channels": 2**10}, "codebook has more elements"),
    ],
)
def test_bindings_check_before_they_touch_memory(module, change: dict, message: str) -> None:
    sizes = {"rows": 1, "num_codes": 1, "channels": 1, "num_threads": 1}
    sizes |= {"z_dtype": "float32", "codebook_dtype": "bfloat16"}
    addresses = dict.fromkeys(("z", "codebook", "ids", "codes", "residual"), 8)  # no memory there
    with pytest.raises(ValueError, match=message):
        module.vq_lookup(**{**addresses, **sizes, **change})


@pytest.mark.parametrize(
    ("z", "codebook", "message"),
    [
        ([[1.0]], torch.ones(2, 1), r"z is a list, allowed is a tensor \(M, C\)"),
        (torch.ones(3), torch.ones(2, 3), r"z has shape \(3,\), allowed is \(M, C\)"),
        (torch.ones(3, 2, dtype=torch.int64), torch.ones(2, 2), "z is torch.int64, allowed are floating-point types"),
        (torch.ones(3, 2), torch.ones(2, 2, dtype=torch.int32), "codebook is torch.int32"),
        (torch.ones(3, 2), torch.ones(4, 3), r"codebook has shape \(4, 3\), allowed is \(V, 2\)"),
        (torch.ones(3, 2), torch.ones(0, 2), r"codebook has shape \(0, 2\), allowed is .* at least 1"),
        (torch.ones(3, 0), torch.ones(2, 0), r"codebook has shape \(2, 0\), allowed is .* at least 1"),
        (torch.ones(3, 2), torch.ones(2, 2, device="meta"), "codebook is on meta, allowed is the device of z, cpu"),
    ],
)
def test_bad_input(z, codebook, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vq_lookup(z, codebook)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", None])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    ("rows", "num_codes", "channels"), [*SHAPES, (65_537, 70, 4), (300, 65_536, 64), (129, 700, 96)]
)
def test_float64_agrees_on_a_gpu(
    backend: str | None, dtype: torch.dtype, rows: int, num_codes: int, channels: int
) -> None:
    z, codebook = (x.to(dtype) for x in data(rows, num_codes, channels))
    got = vq_lookup(z.cuda(), codebook.cuda(), backend=backend)
    check(tuple(output.cpu() for output in got), z, codebook)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 3, 32, 96])
def test_ties_nan_and_zeros_on_a_gpu(channels: int) -> None:
    """Equal codes wherever they stand, rows and codes of NaN, and every hard codebook."""
    for name, codebook in hard_codebooks(3000, channels).items():
        z = torch.cat([data(60, 1, channels)[0], codebook[:50]])
        z[1], z[2], z[3] = 0.0, float("nan"), float("inf")
        ids, _, residual = (output.cpu() for output in vq_lookup(z.cuda(), codebook.cuda(), backend="triton"))
        assert ids[2] == ids[3] == 0 and residual[2].isnan().all(), name
        equal = (F.normalize(codebook)[None] == F.normalize(codebook)[ids][:, None]).all(2)  # (M, V)
        lowest = torch.where(equal.any(1), equal.int().argmax(1), 0)  # NaN equals nothing
        assert torch.equal(ids, lowest), name


@pytest.mark.gpu
def test_on_a_gpu_tf32_changes_nothing() -> None:
    z, codebook = data(1024, 16384, 32)
    want = reference(z, codebook)[0]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # not by monkeypatch, which cannot put torch's attribute back
    try:
        got = vq_lookup(z.cuda(), codebook.cuda())
    finally:
        torch.set_float32_matmul_precision(before)
    check(tuple(output.cpu() for output in got), z, codebook)
    assert (got[0].cpu() != want).sum() <= 1

"""Every shipped Triton kernel, compiled to machine code for GPUs that are not here: no spills, memory in limits, matrix
instructions where they must be."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler by the interpreter", allow_module_level=True)

from dcar_fast.kernels import configs, offline  # noqa: E402  (triton may be missing)
from dcar_fast.kernels.configs import Config  # noqa: E402

OPS = offline.kernel_names()
ONE_TYPE = {"latent_noise", "place_tokens"}  # kernels whose tensors are float32 and integers, whatever the model's type

FLOAT8 = {"quantize_rows"}  # which GPUs before sm_89 have no instructions for


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[str, list[tuple[int, offline.Variant, offline.Resources]]]:
    """Everything that ships, for every target, by op; of the ops whose tests were asked for."""
    asked = [item for item in request.session.items if item.path == Path(__file__) and "compiled" in item.fixturenames]
    ops = sorted({op for item in asked for op in ([item.callspec.params["op"]] if hasattr(item, "callspec") else OPS)})
    found: dict[str, list] = {op: [] for op in ops}
    for target, variant, resources in offline.compile_all(ops=ops):
        found[variant.name.partition(".")[0]].append((target, variant, resources))
    return found


@pytest.mark.parametrize("op", OPS)
def test_fits(op: str, compiled) -> None:
    bad = []
    for target, variant, got in compiled[op]:
        where = f"sm_{target} {variant.label}: {got}"
        if (got.spills, got.stack) != (0, 0) or not 0 < got.registers <= 255:
            bad.append(f"spills: {where}")
        if got.shared > configs.SHARED_LIMIT[target]:
            bad.append(f"shared memory: {where}")
        if variant.tensor_cores and not got.mma:
            bad.append(f"no matrix instructions: {where}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("op", OPS)
def test_every_target_and_precision_is_compiled(op: str, compiled) -> None:
    targets = {target for target in offline.TARGETS if op not in FLOAT8 or target >= 89}
    assert {target for target, _, _ in compiled[op]} == targets
    for target in targets:
        needed = {"fp32"} if op in ONE_TYPE else {"fp32", "fp16", "bf16"}
        assert {variant.dtype for where, variant, _ in compiled[op] if where == target} >= needed


def test_float8_is_compiled_for_its_matrix_instructions(compiled) -> None:
    """Those of 8 bits, on every target that has them."""
    found = {t: got.mma for t, variant, got in compiled["fused_linear"] if variant.dtype == "fp8"}
    assert {target: set(mma) for target, mma in found.items()} == {89: {"QMMA"}, 90: {"QGMMA"}, 100: {"UTCQMMA"}}


def test_products_are_declared(compiled) -> None:
    """A kernel with matrix instructions says so; the ops that are matrix products have them."""
    declared = {variant.name.partition(".")[0] for op in OPS for _, variant, _ in compiled[op] if variant.tensor_cores}
    assert declared >= {"cross_attention", "self_attention", "sample_tokens", "denoise_step", "vq_lookup"}


@pytest.mark.parametrize("op", OPS)
def test_variants_are_what_is_launched(op: str) -> None:
    """The candidates contain what ships for data-centre GPUs, and no label stands for two variants."""
    for target in (*offline.TARGETS, 120):
        shipped, every = ([v.label for v in offline.variants(target, flag, [op])] for flag in (False, True))
        assert len(set(shipped)) == len(shipped) and len(set(every)) == len(every)
        assert set(shipped) <= set(every)


@pytest.mark.parametrize("op", OPS)
def test_sizes_of_one(op: str) -> None:
    """An integer argument that equals 1 is a constant to the compiler, without the methods of a tensor; the interpreter
    does not know that."""
    kernels = {variant.kernel: variant for variant in reversed(offline.variants(90, ops=[op]))}
    for kernel, variant in kernels.items():
        specialised = {param.name for param in kernel.params if not param.do_not_specialize}
        ones = [name for name, kind in variant.signature.items() if kind in ("i32", "i64") and name in specialised]
        assert ones, f"{variant.name} takes no sizes"
        aligned = {"ALIGNED": 1} if "ALIGNED" in variant.constexprs else {}
        changed = replace(
            variant,
            signature={name: kind for name, kind in variant.signature.items() if name not in ones},
            constexprs={**variant.constexprs, **aligned, **dict.fromkeys(ones, 1)},
            multiples_of_16=tuple(name for name in variant.multiples_of_16 if name not in ones),
        )
        assert offline.compile_variant(changed, 90).registers > 0


def test_spills_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernel with far too few registers: what test_fits looks for is really found."""
    variant = offline.variants(80, ops=["add_residual"])[0]
    monkeypatch.setattr(Config, "options", property(lambda self: {"num_warps": 1, "maxnreg": 24}))
    got = offline.compile_variant(variant, 80)
    assert got.spills > 0 and got.stack > 0 and got.registers <= 24


def test_shared_memory_is_seen() -> None:
    """A tile too large for a block compiles without complaint: the limit must be checked from the outside."""
    variant = offline.variants(80, ops=["add_residual"])[0]
    huge = Config({"BLOCK_TOKENS": 1024, "BLOCK_CHANNELS": 64}, num_warps=32)
    assert offline.compile_variant(replace(variant, config=huge), 80).shared > configs.SHARED_LIMIT[80]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    variant = offline.variants(80, ops=["add_residual"])[0]
    offline.print_table([(80, variant, offline.Resources(40, 0, 4096, 0, {"HMMA": 8}))])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:6] == ["variant", "sm", "registers", "stack", "shared", "spills"]
    assert row.startswith(variant.label) and row.split()[-7:] == ["80", "40", "0", "4096", "0", "HMMA", "8"]

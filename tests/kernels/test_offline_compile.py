"""Every shipped Triton kernel, compiled to machine code for GPUs that are not here: no spills, memory in limits."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler by the interpreter", allow_module_level=True)

from dcar_fast.kernels import add_residual, offline  # noqa: E402  (triton may be missing)

VARIANTS = offline.all_variants()


@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.label)
def test_fits(variant: offline.Variant, target: int) -> None:
    got = offline.compile_variant(variant, target)
    assert (got.spills, got.stack) == (0, 0)
    assert 0 < got.registers <= 255
    assert got.shared <= offline.SHARED_LIMIT[target]


def test_every_kernel_is_listed() -> None:
    listed = {variant.label.split()[0] for variant in VARIANTS}
    assert listed == set(offline.KERNELS)
    folder = os.path.dirname(offline.__file__)
    assert listed == {name.removesuffix(".py") for name in os.listdir(folder) if name.endswith(".py")} - {"offline"}


def test_spills_are_seen() -> None:
    """The same kernel with far too few registers: what test_fits looks for is really found."""
    starved = VARIANTS[0]._replace(options={"num_warps": 1, "maxnreg": 24})
    got = offline.compile_variant(starved, 80)
    assert got.spills > 0 and got.stack > 0 and got.registers <= 24


def test_shared_memory_is_seen() -> None:
    """A tile too large for a block compiles without complaint: the limit must be checked from the outside."""
    blocks = {"BLOCK_TOKENS": 1024, "BLOCK_CHANNELS": 64, "HAS_RESIDUAL": True}
    huge = VARIANTS[0]._replace(constexprs=blocks, options={"num_warps": 32})
    assert offline.compile_variant(huge, 80).shared > offline.SHARED_LIMIT[80]


def test_variants_are_what_is_launched() -> None:
    """The table that the launcher reads is the one compiled here."""
    compiled = {
        (v.constexprs["BLOCK_TOKENS"], v.constexprs["BLOCK_CHANNELS"], v.options["num_warps"])
        for v in VARIANTS
        if v.kernel is add_residual.add_residual_kernel
    }
    assert compiled == {tuple(entry.values()) for entry in add_residual.CONFIGS.values()}


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    offline.print_table(VARIANTS[:1], [80])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["variant", "sm", "registers", "stack", "shared", "spills", "matrix"]
    assert row.startswith(VARIANTS[0].label) and row.split()[-6] == "80"

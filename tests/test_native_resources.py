"""The reader of the native module's CUDA code: against a listing, and on what was built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: cuobjdump comes with it")

from dcar_fast.ops import _native  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "kernels"))

import _native_resources as resources  # noqa: E402

KEYS = {"kernel", "target", "registers", "spills", "shared_bytes", "stack", "mma"}
USAGE = """
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN4dcar12_GLOBAL__N_15scaleIfEEvPT_i:
  REG:21 STACK:16 SHARED:4096 LOCAL:0 CONSTANT[0]:1008 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function plain:
  REG:7 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:1008 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function plain:
  REG:8 STACK:0 SHARED:32 LOCAL:0 CONSTANT[0]:1008 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = """
Fatbin elf code:
================
arch = sm_80

\tcode for sm_80
\t\tFunction : plain
        /*0000*/                   MOV R1, c[0x0][0x28] ;      /* 0x00000a0000017a02 */
\t\tFunction : _ZN4dcar12_GLOBAL__N_15scaleIfEEvPT_i
        /*0000*/                   STL.64 [R1], R2 ;           /* 0x0000000201007387 */
        /*0010*/              @!P0 LDL R2, [R1] ;              /* 0x0000000001027983 */
        /*0020*/                   HMMA.16816.F32 R4, R4, R8, RZ ;   /* 0x0000000804047 */

Fatbin elf code:
================
arch = sm_90a

\tcode for sm_90a
\t\tFunction : plain
        /*0000*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4] ;  /* 0x00e00000041879f0 */
"""


def test_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "cuobjdump", lambda option, path: {"-res-usage": USAGE, "-sass": CODE}[option])
    rows = [tuple(row[key] for key in sorted(KEYS)) for row in resources.rows_of(Path("any"))]
    # kernel, mma, registers, shared_bytes, spills, stack, target
    assert rows == [
        ("plain", {}, 7, 0, 0, 0, "sm_80"),
        ("plain", {"HGMMA": 1}, 8, 32, 0, 0, "sm_90a"),
        ("scale<float>", {"HMMA": 1}, 21, 4096, 2, 16, "sm_80"),
    ]


@pytest.mark.parametrize("missing", ["-res-usage", "-sass"])
def test_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    listings = {"-res-usage": USAGE, "-sass": CODE, missing: "cuobjdump info: nothing here\n"}
    monkeypatch.setattr(resources, "cuobjdump", lambda option, path: listings[option])
    with pytest.raises(RuntimeError, match="any"):
        resources.rows_of(Path("any"))


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN4dcar41_GLOBAL__N__a5255c21_9_remask_cu_958a52a813remask_kernelIisjEEvNS_6RemaskET_", None),
        ("_ZN4dcar4callEPFviE", "call"),  # dcar::call(void (*)(int))
        ("_Z4mainv", "main"),
        ("remask_kernel", "remask_kernel"),
    ],
)
def test_readable(symbol: str, name: str | None) -> None:
    assert resources.readable(symbol) == (name or "remask_kernel<int, short, unsigned int>")


def test_what_was_built() -> None:
    """Every kernel for every architecture, none of which spills; or the reason why there is none."""
    if not _native._load()[0]:
        pytest.skip(_native._load()[1])
    native = _native.module()
    if not native.cuda_compiled():
        with pytest.raises(RuntimeError, match="the native module was built without CUDA: ."):
            resources.native_rows()
        return
    rows = resources.native_rows()
    targets = {f"sm_{arch.partition('+')[0]}" for arch in native.cuda_archs()}
    for name in ("remask_kernel<int, int, unsigned int>", "add_residual_kernel<__nv_bfloat16>"):
        assert {row["target"] for row in rows if row["kernel"] == name} == targets
    for row in rows:
        assert set(row) == KEYS and 0 < row["registers"] <= 255 and row["shared_bytes"] <= 48 * 1024, row
        assert row["spills"] == 0 and row["stack"] == 0, row


def test_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_load", lambda: (None, "dcar_fast._native was not built: no compiler"))
    with pytest.raises(RuntimeError, match="was not built: no compiler"):
        resources.native_rows()


def test_runs_from_anywhere(tmp_path: Path) -> None:
    """benchmarks/kernels on the path is all that it takes."""
    code = f"import sys; sys.path.insert(0, {str(Path(resources.__file__).parent)!r}); import _native_resources"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

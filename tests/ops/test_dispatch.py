"""Which implementation runs, and what is said about the others."""

from __future__ import annotations

import logging
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dcar_fast import ops
from dcar_fast.ops import _dispatch, _native, vq_lookup
from dcar_fast.ops._dispatch import BACKENDS, ENVIRONMENT, Backend, Usable, choose, choose_for, register

CPU = torch.device("cpu")


def forget() -> None:
    _dispatch._automatic.cache_clear()
    _dispatch._explicit.cache_clear()
    _native._load.cache_clear()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    """No remembered choice, no request from the environment, and no trace of the ops made up here."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr(_dispatch, "_ops", dict(_dispatch._ops))
    forget()
    yield
    forget()


def backend(name: str, ok: bool = True) -> Backend:
    return Backend(name, lambda: name, lambda device: Usable(ok, f"{name} says {'yes' if ok else 'no'}"))


def test_auto_takes_the_first_usable() -> None:
    register("made_up", backend("cuda", ok=False), backend("native"), backend("reference"))
    assert choose("made_up", CPU).run() == "native"
    assert choose("made_up", CPU, "auto").run() == "native"


def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    register("made_up", backend("cuda", ok=False), backend("native"))
    with caplog.at_level(logging.INFO, logger="dcar_fast.ops._dispatch"):
        for _ in range(3):
            choose("made_up", CPU)
    assert [record.getMessage() for record in caplog.records] == [
        "made_up on cpu: native (native says yes; not cuda: cuda says no)"
    ]
    assert caplog.records[0].levelno == logging.INFO


def test_argument_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    register("made_up", backend("native"), backend("triton"), backend("reference"))
    monkeypatch.setenv(ENVIRONMENT, "triton")
    assert choose("made_up", CPU).name == "triton"
    assert choose("made_up", CPU, "reference").name == "reference"
    assert choose("made_up", CPU, "auto").name == "native"
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert choose("made_up", CPU).name == "reference", "the variable is read at every call"
    monkeypatch.setenv(ENVIRONMENT, "")
    assert choose("made_up", CPU).name == "native"


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend is 'cudnn', allowed are 'auto', 'cuda', 'triton', 'native', 'refer"):
        choose("vq_lookup", CPU, "cudnn")


def test_unknown_backend_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "Reference")
    with pytest.raises(ValueError, match="DCAR_FAST_BACKEND is 'Reference', allowed are"):
        vq_lookup(torch.ones(2, 3), torch.ones(4, 3))


def test_backend_that_cannot_run_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    register("made_up", backend("cuda", ok=False), backend("native"))
    for _ in range(2):  # an error is not remembered as an answer
        with pytest.raises(ValueError, match="backend is 'cuda', which cannot run made_up on cpu: cuda says no"):
            choose("made_up", CPU, "cuda")
    with pytest.raises(ValueError, match="backend is 'triton'.*made_up has no triton implementation"):
        choose("made_up", CPU, "triton")
    monkeypatch.setenv(ENVIRONMENT, "cuda")
    with pytest.raises(ValueError, match="DCAR_FAST_BACKEND is 'cuda'.*cuda says no"):
        choose("made_up", CPU)


def test_nothing_usable() -> None:
    register("made_up", backend("cuda", ok=False))
    with pytest.raises(ValueError, match="nothing can run made_up on cpu.*cuda says no"):
        choose("made_up", CPU)


def test_register_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"made_up: backends \['mps'\] are not among"):
        register("made_up", backend("mps"))


def test_ops_obey() -> None:
    z, codebook = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match="which cannot run vq_lookup on cpu: vq_lookup has no cuda implementation"):
        vq_lookup(z, codebook, backend="cuda")
    assert vq_lookup(z, codebook, backend="reference")[0].tolist() == [0, 0]


def test_float64_is_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a kernel is preferred, but it has no float64."""
    register("made_up", backend("triton"), backend("reference"))
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    for name in (None, "auto", "triton"):
        assert choose_for("made_up", single, name).name == "triton"
    for name in (None, "auto", "reference"):
        assert choose_for("made_up", double, name).name == "reference"
    with pytest.raises(ValueError, match="backend is 'triton', which cannot run made_up on torch.float64"):
        choose_for("made_up", double, "triton")
    monkeypatch.setenv(ENVIRONMENT, "triton")
    with pytest.raises(ValueError, match="'triton', which cannot run made_up on torch.float64"):
        choose_for("made_up", double, None)


def test_report_covers_every_op_and_backend() -> None:
    told = ops.report("cpu")
    assert set(told) == {path.stem for path in Path(ops.__file__).parent.glob("[!_]*.py")} <= set(ops.__all__)
    for op, backends in told.items():
        assert tuple(backends) == BACKENDS
        assert backends["reference"].ok, "there is always a reference"
        for usable in backends.values():
            assert usable.reason
        assert backends[choose(op, CPU).name].ok


def test_report_on_a_gpu_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("asks what is said where there is no GPU")
    triton = ops.report("cuda:0")["add_residual"]["triton"]
    assert not triton.ok and triton.reason in ("torch sees no CUDA device", "triton is not installed")


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dcar_fast._native", None)  # what the import system keeps for "not found"
    assert choose("vq_lookup", CPU).name == "reference"
    with pytest.raises(
        ValueError, match="'native', which cannot run vq_lookup on cpu: dcar_fast._native was not built"
    ):
        choose("vq_lookup", CPU, "native")
    with pytest.raises(RuntimeError, match="dcar_fast._native was not built"):
        _native.module()


def test_native_module_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: omp_get_thread_num")

    monkeypatch.setattr(_native.importlib, "import_module", broken)
    usable = _native.cpu_usable(CPU)
    assert usable == (False, "dcar_fast._native does not load: undefined symbol: omp_get_thread_num")


@pytest.mark.parametrize(
    ("arch", "runs", "does_not"),
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("89", [(8, 9)], [(8, 6), (9, 0)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("100+PTX", [(10, 0), (10, 3), (12, 0)], [(9, 0)]),
        ("120", [(12, 0), (12, 1)], [(10, 0)]),
    ],
)
def test_architectures(arch: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]) -> None:
    assert all(_native.runs_on(arch, capability) for capability in runs)
    assert not any(_native.runs_on(arch, capability) for capability in does_not)


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ((13000, 12080), "built with CUDA 13.0, the driver here supports 12.8"),
        ((13000, 0), "built with CUDA 13.0, the driver here supports 0.0"),
        ((12090, 12020), "CUDA C++ built for 80, 90a"),
        ((12090, 13010), "CUDA C++ built for 80, 90a"),
    ],
)
def test_a_driver_too_old_for_the_kernels(monkeypatch, versions: tuple[int, int], reason: str) -> None:
    native = SimpleNamespace(
        cuda_compiled=lambda: True, cuda_archs=lambda: ["80", "90a"], cuda_versions=lambda: versions
    )
    _native._load.cache_clear()
    monkeypatch.setattr(_native, "_load", cache(lambda: (native, "")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert _native.cuda_usable(torch.device("cuda:0")) == ("CUDA C++" in reason, reason)


def test_malformed_architecture() -> None:
    with pytest.raises(ValueError, match="arch is 'sm_80'"):
        _native.runs_on("sm_80", (8, 0))


def test_ops_load_no_triton() -> None:
    """Judging and running on the CPU needs no triton, which takes long to import."""
    code = (
        "import sys, torch; from dcar_fast import ops; ops.report('cpu');"
        "ops.vq_lookup(torch.ones(2, 3), torch.ones(4, 3)); print('triton' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]

"""Warm-up and tuner with kernels, clocks and devices that are made up: what is chosen, skipped, refused and written."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dcar_fast import timing, tuning
from dcar_fast.kernels import configs
from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.tuning import Choice, Named

CPU = torch.device("cpu")
GPU = "cpu"  # what configs.gpu_name calls it
SHIPPED, FAST, SLOW, HUGE, WRONG = (Config({"BLOCK": block}, 4) for block in (16, 32, 64, 128, 256))


class OutOfResources(Exception):
    """What Triton raises has this name."""


class Kernel:
    """A kernel whose launches are recorded. ``milliseconds``: what a launch takes, by its tile."""

    def __init__(self, milliseconds: dict[int, float], name: str = "fake") -> None:
        self.milliseconds = milliseconds
        self.launched: list[int | None] = []
        self.table = Table(
            name,
            shipped={"datacenter": (Rule({"rows": 1000}, SHIPPED), Rule({}, SLOW)), "consumer": (Rule({}, SHIPPED),)},
            candidates=tuple(Config({"BLOCK": block}, 4) for block in milliseconds if block != 16),
            scaling=("rows",),
        )

    def launch(self, config: Config | None) -> tuple[torch.Tensor, None]:
        block = None if config is None else config.blocks["BLOCK"]
        self.launched.append(block)
        if block == 128:
            raise OutOfResources("out of resource: shared memory, Required: 300000\nmore")
        if block == 256:
            return torch.tensor([1.0, 2.5]), None
        return torch.tensor([1.0, 2.0]) + (block or 0) * 1e-7, None

    def case(self, label: str = "fp32 600", rows: int = 600, factor: dict[int, float] | None = None) -> Named:
        def prepare(device: torch.device):
            assert device == CPU
            return self.launch

        self.factor = {**getattr(self, "factor", {}), label: factor or {}}
        return Named("fake", Case(label, self.table, {"rows": rows}, prepare))

    def timer(self, calls) -> dict[int, list[float]]:
        """Calls each once and looks its time up; the labels' factors apply in the order of the cases."""
        label = self._labels.pop(0)
        times = {}
        for number, call in calls.items():
            call()
            block = self.launched[-1]
            seconds = 1e-3 * self.milliseconds[block] * self.factor[label].get(block, 1.0)
            times[number] = [seconds, 0.9 * seconds, 50 * seconds]  # a median, not a mean
        return times

    def tune(self, *cases: Named) -> list[Choice]:
        self._labels = [named.case.label for named in cases]
        return list(tuning.tune(cases, CPU, self.timer))


def test_the_fastest_wins() -> None:
    kernel = Kernel({16: 1.0, 32: 0.5, 64: 0.6})
    (choice,) = kernel.tune(kernel.case())
    assert (choice.config, choice.tuned, choice.failure) == (FAST, True, None)
    assert choice.sizes == {"rows": 1024}
    assert choice.times_us == {"fp32 600": {"shipped": pytest.approx(1000), "tuned": pytest.approx(500)}}
    assert str(choice) == "fake {'rows': 1024}: 32 w4 s2 (fp32 600 1000.0 -> 500.0 us)"


@pytest.mark.parametrize(("milliseconds", "tuned"), [(0.985, False), (0.981, False), (0.975, True), (1.5, False)])
def test_a_candidate_must_be_clearly_faster(milliseconds: float, tuned: bool) -> None:
    kernel = Kernel({16: 1.0, 32: milliseconds})
    (choice,) = kernel.tune(kernel.case())
    assert choice.tuned is tuned and choice.config == (FAST if tuned else SHIPPED)


def test_cases_of_one_bucket_share_the_choice() -> None:
    """Candidate 32 is best on the mean, but slows one case by more than the margin; 64 does not."""
    kernel = Kernel({16: 1.0, 32: 0.5, 64: 0.9})
    cases = kernel.case("fp32 600", 600), kernel.case("bf16 600", 600, {32: 2.1}), kernel.case("fp32 3000", 3000)
    first, second = kernel.tune(*cases)
    assert first.config == SLOW and set(first.times_us) == {"fp32 600", "bf16 600"}
    assert first.times_us["bf16 600"] == {"shipped": pytest.approx(1000), "tuned": pytest.approx(900)}
    assert second.sizes == {"rows": 4096} and second.config == FAST


def test_the_mean_is_geometric() -> None:
    kernel = Kernel({16: 1.0, 32: 1.0, 64: 1.0})
    cases = kernel.case("a", factor={32: 0.25, 64: 0.6}), kernel.case("b", factor={32: 1.0, 64: 0.6})
    (choice,) = kernel.tune(*cases)
    assert choice.config == FAST  # sqrt(0.25 * 1) = 0.5, where the arithmetic mean has 0.625


def test_what_ships_is_no_candidate_of_its_own() -> None:
    """Timed twice it could be found faster than itself."""
    kernel = Kernel({16: 1.0, 32: 1.5})
    kernel.table = Table("fake", kernel.table.shipped, (SHIPPED, FAST), ("rows",))
    kernel.tune(kernel.case())
    assert kernel.launched.count(16) == 2, "once for the result, once in the timer"


def test_a_kernel_that_reuses_its_output_is_compared_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, buffer = Kernel({16: 1.0, 256: 0.1}), torch.empty(2)
    real = kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda config: buffer.copy_(real(config)[0]))
    (choice,) = kernel.tune(kernel.case())
    assert choice.skipped == {"differ from the shipped result": 1} and not choice.tuned


def test_rules_that_differ_within_a_bucket_stay() -> None:
    kernel = Kernel({16: 1.0, 64: 1.0, 32: 1.0})
    (choice,) = kernel.tune(kernel.case("a", 999), kernel.case("b", 1024))
    assert (choice.config, choice.tuned) == (None, False)


def test_what_does_not_fit_or_differs_is_counted_and_never_timed() -> None:
    kernel = Kernel({16: 1.0, 128: 0.1, 256: 0.1, 32: 0.9})
    (choice,) = kernel.tune(kernel.case(), kernel.case("again"))
    assert choice.config == FAST
    assert choice.skipped == {"do not fit": 1, "differ from the shipped result": 1}
    assert kernel.launched.count(128) == kernel.launched.count(256) == 1
    assert str(choice).endswith(", 1 differ from the shipped result, 1 do not fit)")


def test_a_shipped_configuration_that_does_not_fit_is_a_failure() -> None:
    kernel = Kernel({128: 1.0, 32: 0.5})
    kernel.table = Table("fake", {"datacenter": (Rule({}, HUGE),)}, kernel.table.candidates, ("rows",))
    (choice,) = kernel.tune(kernel.case())
    assert choice.failure == (
        "the shipped configuration 128 w4 s2 does not fit: out of resource: shared memory, Required: 300000"
    )


def test_other_errors_stop_the_tuner_and_name_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel({16: 1.0, 32: 0.5})
    real = kernel.launch

    def launch(config):
        if config == FAST:
            raise RuntimeError("an illegal memory access was encountered")
        return real(config)

    monkeypatch.setattr(kernel, "launch", launch)
    with pytest.raises(RuntimeError, match="fake fp32 600 with 32 w4 s2 failed: an illegal memory access"):
        kernel.tune(kernel.case())

    def full(config):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(kernel, "launch", full)
    with pytest.raises(torch.OutOfMemoryError):
        kernel.tune(kernel.case())


def test_a_launch_must_return_something() -> None:
    assert tuning.tensors((torch.ones(1), None, [3])) == [torch.ones(1)]
    with pytest.raises(TypeError, match="a launch returned NoneType"):
        tuning.tensors(None)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("got", "expected", "dtype", "same"),
    [
        ([1.0, 2.0], [1.0, 2.0001], torch.float32, True),
        ([1.0, 2.0], [1.0, 2.02], torch.float32, False),
        ([1.0, 2.0], [1.0, 2.02], torch.bfloat16, True),
        ([1.0, 2.0], [1.0, 2.5], torch.bfloat16, False),
        ([100.0] * 50 + [0.0], [100.0] * 50 + [0.01], torch.float32, True),  # rounding beside large values
        ([1.0] * 4095 + [0.0], [1.0] * 4096, torch.bfloat16, False),  # one value among many was not written
        ([NAN, INF], [NAN, INF], torch.float32, True),
        ([NAN, INF], [NAN, -INF], torch.float32, False),
        ([NAN, 1.0], [1.0, 1.0], torch.float32, False),
        ([-1.0, 1.0], [NAN, 1.0], torch.float32, False),
        ([INF, 1.0], [1.0, 1.0], torch.float32, False),
        ([1, 2], [1, 3], torch.int64, False),
        ([1, 2], [1, 2], torch.int64, True),
        ([], [], torch.float16, True),
    ],
)
def test_agreement(got: list, expected: list, dtype: torch.dtype, same: bool) -> None:
    got, expected = torch.tensor(got, dtype=dtype), torch.tensor(expected, dtype=dtype)
    assert tuning.agree([got], [expected]) is same
    assert not tuning.agree([got], [expected, expected])
    assert not tuning.agree([got.reshape(1, -1)], [expected])


# ---- the file


def tuned(kernel: Kernel, *cases: Named) -> list[Choice]:
    return kernel.tune(*(cases or (kernel.case(),)))


def test_the_file_is_used_and_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "SHIPPED", tmp_path / "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = configs.cache_folder() / f"{GPU}.json"
    configs.forget()
    assert Kernel({}).table.pick(CPU, rows=600) == SHIPPED  # the file that is not there yet has been looked for
    kernel, other = Kernel({16: 1.0, 32: 0.5}), Kernel({16: 1.0, 64: 0.5}, "other")
    tuning.write(path, tuning.merge(path, GPU, tuned(kernel)))
    tuning.write(path, tuning.merge(path, GPU, tuned(other)))
    assert kernel.table.pick(CPU, rows=600) == FAST and other.table.pick(CPU, rows=1024) == SLOW
    assert kernel.table.pick(CPU, rows=400) == SHIPPED
    held = json.loads(path.read_text())
    (entry,) = held["tables"]["fake"]
    assert held["gpu"] == GPU and entry["date"] and entry["versions"]["torch"] == torch.__version__
    assert entry["times_us"]["fp32 600"]["tuned"] == pytest.approx(500)

    # tuned anew: the old entry goes, others stay, unknown keys too
    held["tables"]["fake"].append(entry | {"sizes": {"rows": 8}})
    path.write_text(json.dumps(held | {"note": "kept"}))
    slower = Kernel({16: 1.0, 32: 1.5})
    tuning.write(path, tuning.merge(path, GPU, tuned(slower)))
    assert configs.read(path) == {
        "fake": {(("rows", 8),): FAST, (("rows", 1024),): SHIPPED},
        "other": {(("rows", 1024),): SLOW},
    }
    assert json.loads(path.read_text())["note"] == "kept"
    configs.forget()


def test_no_entry_where_the_rules_win_or_nothing_was_chosen(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    kernel = Kernel({16: 1.0, 32: 0.5, 64: 0.9})
    tuning.write(path, tuning.merge(path, GPU, tuned(kernel)))
    failed = Choice(kernel.table, {"rows": 1024}, failure="does not fit")
    assert configs.read(path) == {"fake": {(("rows", 1024),): FAST}}
    tuning.write(path, tuning.merge(path, GPU, [failed]))
    assert configs.read(path) == {"fake": {(("rows", 1024),): FAST}}
    tuning.write(path, tuning.merge(path, GPU, [Choice(kernel.table, {"rows": 1024})]))
    assert configs.read(path) == {"fake": {}}


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    kernel = Kernel({16: 1.0, 32: 0.5})
    tuning.write(path, tuning.merge(path, GPU, tuned(kernel)))
    before = path.read_bytes()
    real = Path.write_text

    def half(self: Path, text: str, **options) -> int:
        real(self, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        tuning.write(path, tuning.merge(path, GPU, tuned(Kernel({16: 1.0, 64: 0.5}))))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", '{"tables": {"fake": [{"sizes"', "[]", "my thesis"])
def test_what_is_no_such_file_is_not_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="x.json is no file of tuned configurations"):
        tuning.merge(path, GPU, [])
    assert path.read_text() == text


def test_another_gpus_file_is_not_extended(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"gpu": "nvidia-h200", "tables": {}}')
    with pytest.raises(ValueError, match="x.json is for nvidia-h200, this GPU is cpu"):
        tuning.merge(path, GPU, [])


# ---- warm-up


def test_warmup_counts_what_became_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel({16: 1.0})
    waited: list[int] = []
    watched: list[list[bool]] = []
    real = kernel.launch

    @contextmanager
    def watch():
        watched.append([])
        yield watched[-1]

    def launch(config):
        watched[-1].extend([False, False, True] if not kernel.launched else [])
        return real(config)

    monkeypatch.setattr(kernel, "launch", launch)
    cases = kernel.case(), kernel.case("again")
    first, second = tuning.warmup(cases, CPU, watch=watch, wait=lambda: waited.append(len(kernel.launched)))
    assert (first.name, first.compiled, first.cached, first.failure) == ("fake fp32 600", 2, 1, None)
    assert (second.name, second.compiled, second.cached) == ("fake again", 0, 0)
    assert kernel.launched == [None, None], "the table chooses"
    assert waited == [0, 1, 1, 2], "the clock stops when the device is done"


def test_warmup_goes_on_after_a_launch_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel({16: 1.0})

    def launch(config):
        raise OutOfResources("out of resource: registers\nmore")

    monkeypatch.setattr(kernel, "launch", launch)
    done = list(tuning.warmup([kernel.case()] * 2, CPU, watch=lambda: nullcontext([]), wait=lambda: None))
    assert [warm.failure for warm in done] == ["out of resource: registers"] * 2


def test_warmup_in_processes(main, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """With a made-up pool and GPU: every case is a job, and one that does not fit is an error at the end."""
    kernel, bad = Kernel({16: 1.0}), Kernel({16: 1.0}, "bad")

    def full(config):
        raise OutOfResources("out of resource: registers\nmore")

    bad.launch = full
    monkeypatch.setattr(tuning, "gpu", lambda device: CPU)
    monkeypatch.setattr(tuning, "all_cases", lambda match: [kernel.case("a"), bad.case("b"), kernel.case("c")])
    monkeypatch.setattr(tuning, "current", lambda device: nullcontext())
    monkeypatch.setattr(tuning, "compilers", lambda jobs: nullcontext(SimpleNamespace(map=map)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made up")
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    assert main(["bench", "warmup"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("Made up: 3 launches\nfake a ") and kernel.launched == [None, None]
    assert captured.out.splitlines()[-1].startswith("0 kernels compiled, 0 from the cache, ")
    assert "error: 1 of 3 launches do not fit this GPU: bad b" in captured.err
    assert tuning.launch_job(tuning.Job("cpu", "", 0)).failure is None
    kernel.table = Table("fake", kernel.table.shipped, (SLOW, FAST), ("rows",))
    tuning.launch_job(tuning.Job("cpu", "", 2, candidate=1))
    assert kernel.launched[-1] == 32


def test_compilers_are_processes() -> None:
    with tuning.compilers(2) as pool:
        assert pool.submit(os.getppid).result(timeout=120) == os.getpid()


def test_compilations_are_seen() -> None:
    """Triton's compiler, which needs no GPU, tells the list."""
    pytest.importorskip("triton", reason="triton is not installed")
    from dcar_fast.kernels import offline
    from dcar_fast.kernels._watch import compilations

    variant = offline.variants(80, ops=["add_residual"])[0]
    with compilations() as outer:
        with compilations() as inner:
            offline.compile_variant(variant, 80)
            offline.compile_variant(variant, 80)
        offline.compile_variant(variant, 80)
    assert len(inner) == 2 and inner[1] and len(outer) == 3, "the second time it comes from the cache"


def test_cases_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr("dcar_fast.kernels.offline.kernel_names", lambda: ["add_residual"])
    found = tuning.all_cases("add_residual")
    assert {named.op for named in found} == {"add_residual"}
    assert all("bf16" in str(named) for named in tuning.all_cases("add_residual bf16"))
    with pytest.raises(ValueError, match="no kernel has a case that contains 'nothing like it'"):
        tuning.all_cases("nothing like it")


# ---- the commands


@pytest.fixture
def main():
    """The command line, on machines that have what it needs; GPU machines may not."""
    pytest.importorskip("tyro", reason="tyro is not installed")
    from dcar_fast.cli import main

    return main


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("command", ["warmup", "tune"])
def test_without_a_gpu(main, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "sees none here"),
        (["--device", "cpu"], "not on cpu: Triton kernels run on CUDA devices, this is cpu"),
        (["--device", "cuda:1"], "device cuda:1 cannot be used"),
    ):
        assert main(["bench", command, *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith("dcar-fast: error: ") and message in captured.err


def test_tune_refuses_before_any_work(main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    """With a GPU that is made up: what stands in the way is found before the first launch."""
    kernel = Kernel({16: 1.0, 32: 0.5})
    monkeypatch.setattr(tuning, "gpu", lambda device: CPU)
    monkeypatch.setattr(tuning, "all_cases", lambda match: [kernel.case()])
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    for arguments, message in (
        (["--jobs", "0"], "jobs must be at least 1, got 0"),
        (["--minutes", "0"], "minutes must be above 0, got 0.0"),
        (["--minutes", "nan"], "minutes must be above 0, got nan"),
        (["-o", str(tmp_path)], f"{tmp_path} is a folder"),
        (["-o", str(bad)], "bad.json is no file of tuned configurations"),
    ):
        assert main(["bench", "tune", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert kernel.launched == [] and bad.read_text() == "[]"


def test_tune_writes_as_it_goes(main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    kernel, path = Kernel({16: 1.0, 32: 0.5, 64: 1.0}), tmp_path / "tuned.json"
    cases = [kernel.case("a", 600), kernel.case("b", 3000)]
    kernel._labels = ["a", "b"]
    seen = []

    def timer(calls):
        seen.append(set(configs.read(path)["fake"]) if path.exists() else None)
        return kernel.timer(calls)

    monkeypatch.setattr(tuning, "gpu", lambda device: CPU)
    monkeypatch.setattr(tuning, "all_cases", lambda match: cases)
    monkeypatch.setattr(tuning, "current", lambda device: nullcontext())
    monkeypatch.setattr(tuning, "event_timer", lambda device: timer)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made up")
    compiled: list[tuning.Job] = []
    monkeypatch.setattr(tuning, "compilers", lambda jobs: nullcontext(SimpleNamespace(map=map)))
    monkeypatch.setattr(tuning, "launch_job", compiled.append)
    assert main(["bench", "tune", "-o", str(path)]) == 0
    assert compiled == [tuning.Job("cpu", "", case, number) for case in (0, 1) for number in (-1, 0, 1)]
    assert seen == [None, {(("rows", 1024),)}], "the first result was written before the second was begun"
    assert set(configs.read(path)["fake"]) == {(("rows", 1024),), (("rows", 4096),)}
    assert "2 configurations are faster than what ships" in capsys.readouterr().out

    kernel._labels = ["a"]
    path.unlink()
    assert main(["bench", "tune", "-o", str(path), "--minutes", "1e-9"]) == 0
    assert set(configs.read(path)["fake"]) == {(("rows", 1024),)}
    assert "stopped after 1e-09 minutes" in capsys.readouterr().out


def test_the_timer_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up events: each call stands alone between two, its cache spoiled before, and warm-up does not count."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 5.0

    class Buffer:
        def zero_(self) -> None:
            log.append("spoil")

    def empty(size: int, **options) -> Buffer:
        assert size == 400 << 20 and options["device"] == CPU
        return Buffer()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=100 << 20))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(timing, "current", lambda device: nullcontext())
    times = timing.event_timer(CPU, rounds=2)({1: lambda: log.append("a"), 2: lambda: log.append("b")})
    assert times == {1: [0.005, 0.005], 2: [0.005, 0.005]}
    timed = [["spoil", "event", name, "event"] for name in "abba"]
    assert log == [*"abab", *sum(timed, []), "wait"]


# ---- on a GPU


@pytest.mark.gpu
def test_warmup_and_tune_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuning.run_warmup("cuda", "add_residual")
    assert "compiled" in capsys.readouterr().out
    path = tmp_path / "tuned.json"
    tuning.run_tune("cuda", "add_residual", path)
    found = configs.read(path)["add_residual"]
    assert found and "differ from the shipped result" not in capsys.readouterr().out


@pytest.mark.gpu
def test_the_timer_sees_the_gpu() -> None:
    """Twice the work takes about twice as long; nothing is said about how long."""
    x = torch.randn(4096, 4096, device="cuda")
    times = timing.event_timer(torch.device("cuda", 0), rounds=7)({1: lambda: x @ x, 2: lambda: (x @ x, x @ x)})
    one, two = (sorted(times[name])[3] for name in (1, 2))
    assert 1.5 < two / one < 2.5

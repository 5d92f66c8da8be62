"""reproduction.py: statistics, verdicts, what is not computed twice, what is refused, and studies of a tiny model."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dcar_fast import SamplingConfig
from dcar_fast.config import preset
from dcar_fast.models.dcar import DCAR
from dcar_fast.sampling import ReferenceSampler
from tests.benchmark_scripts import BENCHMARKS, run
from tests.reproduction_model import BUDGET, pipeline, save_model

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


@pytest.fixture(scope="module", autouse=True)
def path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def module(name: str):
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("reproduction") / "model")


def call(out: Path, *arguments, **budget) -> int:
    made = module("_reproduction.budget").Budget(**{**BUDGET, **budget})
    return module("reproduction").main(["--out", str(out), "--device", "cpu", *map(str, arguments)], made)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


# ---- statistics and verdicts


def test_summaries_are_those_of_numpy() -> None:
    spread = module("_reproduction.spread")
    values = {0: 3.5, 1: -1.25, 2: 8.0, 5: 0.5}
    found, expected = spread.summary(values), np.array(list(values.values()))
    assert found["mean"] == pytest.approx(expected.mean()) and found["std"] == pytest.approx(expected.std(ddof=1))
    assert (found["min"], found["max"]) == (-1.25, 8.0) and found["values"]["5"] == 0.5
    assert spread.summary({4: 2.0})["std"] is None


def test_the_pooled_spread_is_that_of_a_two_way_table() -> None:
    spread = module("_reproduction.spread")
    x = np.random.default_rng(3).normal(size=(4, 5)) + 10 * np.arange(4)[:, None] + 7 * np.arange(5)
    rest = x - x.mean(1, keepdims=True) - x.mean(0, keepdims=True) + x.mean()
    found, degrees = spread.pooled_spread({f"v{v}": dict(enumerate(row)) for v, row in enumerate(x.tolist())})
    assert degrees == 12 and found == pytest.approx(math.sqrt((rest**2).sum() / 12))
    for values in ({"a": {0: 1.0, 1: 2.0}}, {"a": {0: 1.0}, "b": {0: 1.0}}, {"a": {0: 1, 1: 2}, "b": {0: 1, 2: 2}}):
        with pytest.raises(ValueError, match="two variants of the same two seeds"):
            spread.pooled_spread(values)


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 3, 3.18245), (0.995, 7, 3.49948), (0.975, 14, 2.14479)],
)
def test_quantiles_are_those_of_the_tables(probability: float, degrees: int, quantile: float) -> None:
    assert module("_reproduction.spread").student_quantile(probability, degrees) == pytest.approx(quantile, rel=1e-5)


def verdict(kind: str, values: dict, others=("b",), higher=True, tolerance=0.0, variant="a", worst=None) -> dict:
    spread = module("_reproduction.spread")
    finding = spread.Finding("it is so", "m", kind, variant, tuple(others), tolerance)
    table = {name: dict(enumerate(row)) for name, row in values.items()}
    return spread.judge(finding, table, range(len(next(iter(values.values())))), higher, list(values), worst)


def test_two_variants_are_a_paired_test() -> None:
    a, b = np.array([10.0, 14.0, 12.5]), np.array([9.1, 12.6, 11.4])
    found = verdict("better", {"a": a, "b": b})
    error = (a - b).std(ddof=1) / math.sqrt(3)
    assert found["differences"]["b"] == pytest.approx((a - b).mean())
    assert found["margin"] == pytest.approx(4.302653 * error, rel=1e-5)
    assert found["verdict"] == "shows" and (a - b).mean() > found["margin"]


@pytest.mark.parametrize(
    ("kind", "values", "options", "expected"),
    [
        ("better", {"a": [5, 6, 7], "b": [1, 2.1, 3]}, {}, "shows"),
        ("better", {"a": [1, 2.1, 3], "b": [5, 6, 7]}, {}, "is reversed"),
        ("better", {"a": [1, 2.1, 3], "b": [5, 6, 7]}, {"higher": False}, "shows"),
        ("better", {"a": [5, 1, 4], "b": [1, 4, 3]}, {}, "does not show"),
        ("better", {"a": [5, 6, 7], "b": [1, 2.1, 3], "c": [5, 6.1, 6.9]}, {"others": "bc"}, "does not show"),
        ("better", {"a": [5, 6, 7], "b": [1, 2.1, 3], "c": [9, 10, 11.1]}, {"others": "bc"}, "is reversed"),
        ("better", {"a": [5, 5, 5], "b": [5, 5, 5]}, {}, "does not show"),
        ("not worse", {"a": [5, 6, 7], "b": [5, 6.1, 6.9]}, {"tolerance": 1}, "shows"),
        ("not worse", {"a": [5, 6, 7], "b": [5, 6.1, 6.9]}, {}, "does not show"),
        ("not worse", {"a": [5, 6, 7], "b": [9, 10, 11.1]}, {"tolerance": 1}, "is reversed"),
        ("not worse", {"a": [5, 9, 1], "b": [5, 2, 8]}, {"tolerance": 1}, "does not show"),
        ("optimum", {"b": [1, 2, 3.1], "a": [5, 6, 7], "d": [5, 6.1, 7], "c": [2, 3, 4]}, {"others": "bc"}, "shows"),
        ("optimum", {"b": [5, 6, 7.1], "a": [5, 6, 7], "c": [2, 3, 4]}, {"others": "bc"}, "does not show"),
        (
            "optimum",
            {"b": [1, 2, 3.1], "a": [5, 6, 7], "d": [9, 10, 11], "c": [2, 3, 4]},
            {"others": "bc"},
            "is reversed",
        ),
        ("not worse", {"a": [0, 0, 0.5], "b": [0, 0.5, 0]}, {"tolerance": 2}, "shows"),
        ("not worse", {"a": [0, 0, 0.5], "b": [0, 0.5, 0]}, {"tolerance": 2, "worst": 0}, "does not show"),
        ("not worse", {"a": [90, 91, 90], "b": [90, 91, 90]}, {"tolerance": 2, "worst": 0}, "shows"),
        ("better", {"a": [0, 0, 0], "b": [0, 0, 0]}, {"worst": 0}, "does not show"),
        ("better", {"a": [5], "b": [1]}, {}, "one seed has no spread"),
    ],
)
def test_verdicts(kind, values, options, expected) -> None:
    assert verdict(kind, values, **options)["verdict"] == expected


def test_what_is_not_done_is_not_judged() -> None:
    spread = module("_reproduction.spread")
    finding = spread.Finding("it is so", "m", "better", "a", ("b",))
    found = spread.judge(finding, {"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0}}, [0, 1], True, ["a", "b"])
    assert found["verdict"] == "unfinished" and found["margin"] is None
    shows, not_shown, reverse = "shows", "does not show", "is reversed"
    assert spread.overall([shows, shows]) == shows and spread.overall([shows, not_shown]) == not_shown
    assert spread.overall([not_shown, reverse, shows]) == reverse
    assert spread.overall([reverse, "unfinished"]) == "unfinished"


# ---- what is done once


@pytest.fixture
def toy(monkeypatch):
    """A study without a model, whose parts count their calls and can be told to stop."""
    s, spread = module("_reproduction.study"), module("_reproduction.spread")
    calls, stops = [], []

    def part(name: str):
        def measure(context, seed: int):
            calls.append((name, seed))
            if (name, seed) in stops:
                stops.clear()
                raise KeyboardInterrupt
            return {name: {"m": seed + len(name) + seed / 7}}

        return measure

    study = s.Study(
        name="toy",
        title="Toy",
        question="Is it?",
        note="It may be.",
        variants=("a", "bb"),
        parts={"a": part("a"), "bb": part("bb")},
        measures=(s.Measure("m", "m, units", 2, True),),
        findings=(spread.Finding("longer is more", "m", "better", "bb", ("a",)),),
        paper={"FID": {"a": 5.13}},
        trained=False,
    )
    monkeypatch.setattr(module("_reproduction.studies"), "STUDIES", {"toy": study})
    monkeypatch.setattr(module("_reproduction.studies"), "DEFAULT", ("toy",))
    return calls, stops


def test_a_finished_cell_is_not_computed_again(toy, tmp_path: Path) -> None:
    calls, stops = toy
    stops.append(("a", 1))
    assert call(tmp_path, "--seeds", 0, 1) == 130
    assert calls == [("a", 0), ("bb", 0), ("a", 1)]
    assert read(tmp_path / "results.json")["studies"][0]["verdict"] == "unfinished"
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")}
    assert len(times) == 2
    calls.clear()
    assert call(tmp_path, "--seeds", 0, 1) == 0
    assert calls == [("a", 1), ("bb", 1)]
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    found = read(tmp_path / "results.json")["studies"][0]
    assert (found["verdict"], found["cells_done"], found["cells"]) == ("shows", 4, 4)
    calls.clear()
    assert call(tmp_path, "--seeds", 0, 1, 2) == 0  # more seeds go on from the same cells
    assert calls == [("a", 2), ("bb", 2)]
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob(".[a-z]*-*"))


def test_a_cell_that_fails_is_said_and_the_rest_goes_on(toy, tmp_path: Path, monkeypatch, capsys) -> None:
    calls, _ = toy
    study = module("_reproduction.studies").STUDIES["toy"]

    def fails(context, seed: int):
        raise RuntimeError("no memory")

    monkeypatch.setitem(study.parts, "a", fails)
    assert call(tmp_path, "--seeds", 0) == 1
    assert calls == [("bb", 0)] and "toy, a, seed 0: RuntimeError: no memory" in capsys.readouterr().err
    assert read(tmp_path / "results.json")["failures"] == {"toy, a, seed 0": "RuntimeError: no memory"}
    assert "**Failed: toy, a, seed 0: RuntimeError: no memory**" in (tmp_path / "tables.md").read_text()


def test_a_number_that_is_none_is_no_result(toy, tmp_path: Path, monkeypatch) -> None:
    study = module("_reproduction.studies").STUDIES["toy"]
    monkeypatch.setitem(study.parts, "a", lambda context, seed: {"a": {"m": math.nan}})
    assert call(tmp_path, "--seeds", 0) == 1
    assert [path.name for path in (tmp_path / "cells").rglob("*.json")] == ["bb-seed0.json"]


def test_an_interrupted_training_goes_on_and_a_finished_one_is_kept(tmp_path: Path, monkeypatch) -> None:
    trainings, tokenizers = module("_reproduction.trainings"), module("_reproduction.tokenizers")
    step = module("dcar_fast.training.step").StepRun
    context, steps, begin = tiny_context(tmp_path), [], step.begin

    def watched(self, number, batches):
        steps.append(number)
        if steps[-1] == 5 and len(steps) == 6:
            raise KeyboardInterrupt
        begin(self, number, batches)

    monkeypatch.setattr(step, "begin", watched)
    monkeypatch.setattr(trainings, "CHECKPOINTS", 4)
    settings = tokenizers._stage_settings(context, "mixed", "mixed", 8, 0, "")
    with pytest.raises(KeyboardInterrupt):
        trainings.finish(settings, mixed_paths=True)
    assert steps == list(range(6))
    steps.clear()
    done = trainings.finish(settings, mixed_paths=True)
    assert steps == [4, 5, 6, 7], "from the checkpoint of step 4"
    assert done["steps"] == 8 and done["seconds"] > 0 and (Path(done["model"]) / "config.json").is_file()
    steps.clear()
    assert trainings.finish(settings, mixed_paths=True) == done and not steps
    other = replace(settings, optimizer=replace(settings.optimizer, learning_rate=1.0))
    with pytest.raises(ValueError, match="holds a training of other settings"):
        trainings.finish(other, mixed_paths=True)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--out {out} --studies magic", "argument --studies: invalid choice: 'magic'"),
        ("--out {out} --studies steps steps", "argument --studies: steps is named twice"),
        ("--out {out} --seeds 0 1 0", "argument --seeds: 0 is named twice"),
        ("--out {out} --seeds -1", "argument --seeds: must be an integer >= 0, got '-1'"),
        ("--out {out} --prompts 1", "argument --prompts: must be an integer in 2..1200, got '1'"),
        ("--out {file}", "argument --out: {file} cannot be written"),
        ("--out {file}/sub", "argument --out: {file}/sub cannot be written"),
        ("--out {out} --model {out}/nothing", "argument --model: '{out}/nothing' is neither a folder nor"),
        ("--out {out} --model {untrained}", "argument --model: {untrained} holds untrained weights"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"out": tmp_path / "out", "file": tmp_path / "file", "untrained": tmp_path / "untrained"}
    names["file"].write_text("")
    if "untrained" in arguments:
        save_model(names["untrained"], trained=False)
    with pytest.raises(SystemExit) as exit_:
        module("reproduction").main(["--device", "cpu", *arguments.format(**names).split()])
    errors = capsys.readouterr().err
    assert exit_.value.code == 2 and f"reproduction.py: error: {message.format(**names)}" in errors
    assert not (names["out"] / "cells").exists()


def test_a_preset_without_trained_weights_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(module("_reproduction.context"), "shipped_folder", lambda name: None)
    with pytest.raises(SystemExit):
        call(tmp_path, "--studies", "steps")
    assert "argument --model: preset 'shapes' comes without trained weights" in capsys.readouterr().err


def test_results_of_other_settings_are_refused_by_name(toy, tmp_path: Path, capsys) -> None:
    assert call(tmp_path, "--seeds", 0) == 0
    with pytest.raises(SystemExit):
        call(tmp_path, "--seeds", 0, "--quick", prompts=9)
    message = capsys.readouterr().err
    assert "holds results of other settings: budget.prompts 6 instead of 9; quick False instead of True" in message
    store = module("_reproduction.store").Store(tmp_path, {"quick": False, "model": "abc"})
    assert store.settings["model"] == "abc", "not known before, as no study needed one"
    with pytest.raises(ValueError, match="model 'abc' instead of 'abd'"):
        module("_reproduction.store").Store(tmp_path, {"model": "abd"})
    (tmp_path / "cells" / "toy" / "a-seed0.json").write_text("{}")
    with pytest.raises(ValueError, match="is no result of this benchmark"):
        list(store.cells())


def test_it_is_a_command() -> None:
    done = run("reproduction.py", "--help")
    assert done.returncode == 0 and "--studies" in done.stdout and "final-forward" in done.stdout


# ---- what is measured


def tiny_context(folder: Path, model: Path | None = None):
    budget = module("_reproduction.budget").Budget(**BUDGET)
    store = module("_reproduction.store").Store(folder, {})
    return module("_reproduction.context").Context(store, budget, torch.device("cpu"), model, pipeline())


def test_discrete_only_has_the_same_tokens_and_no_head(monkeypatch) -> None:
    drawing, made = module("_reproduction.drawing"), pipeline()
    prompts = ["a red circle", "two squares"]
    calls = drawing.drawing_times(made, lambda number: (prompts, [number, number + 1]))
    hybrid, heads = calls["hybrid"](3), []
    run_class = module("dcar_fast.sampling._fast_run").FastRun
    monkeypatch.setattr(run_class, "denoise", lambda *_: heads.append(1))
    discrete = calls["discrete"](3)
    assert torch.equal(hybrid.ids, discrete.ids) and not heads and not discrete.residual.any()
    assert hybrid.residual.abs().max() > 0 and module("dcar_fast.sampling.fast").FastRun is run_class


def test_head_steps_are_those_asked_for() -> None:
    drawing, made = module("_reproduction.drawing"), pipeline()
    before = made.generator.config
    generator = DCAR(replace(before, head_steps=3)).eval()
    generator.load_state_dict(made.generator.state_dict())
    text = made.encode_text(["a red circle"])
    for _ in range(2):  # what is packed for one number of steps must not serve another
        usual = made.generate(text, [5])
        found = drawing.with_head_steps(made, 3).generate(text, [5])
    expected = ReferenceSampler(generator)(text.states, text.mask, [5])
    assert torch.equal(found.ids, expected.ids) and torch.equal(usual.ids, expected.ids)
    torch.testing.assert_close(found.residual, expected.residual, rtol=1e-3, atol=1e-4)
    assert (usual.residual - found.residual).abs().max() > 1e-3 and made.generator.config is before


def test_mixed_paths() -> None:
    trainings, draws = module("_reproduction.trainings"), module("dcar_fast.training.task").Draws
    task = trainings.MixedPathsTask.__new__(trainings.MixedPathsTask)
    rows = [task._paths(draws(0, step, 8, start, 4), filling=False) for step in range(100) for start in (0, 4)]
    assert 0.4 < torch.cat(rows).float().mean() < 0.6
    whole = task._paths(draws(0, 7, 8, 0, 8), filling=False)
    assert torch.equal(whole, torch.cat(rows[14:16])), "the same for any number of processes"


def test_equal_compute(tmp_path: Path) -> None:
    tokenizers, pretraining = module("_reproduction.tokenizers"), module("_reproduction.pretraining")
    for name in tokenizers.STAGES:
        for total in (8, 60, 2000):
            stages = tokenizers.stage_steps(name, total)
            assert sum(steps for _, steps in stages) == total and min(steps for _, steps in stages) >= 1
    context = tiny_context(tmp_path)
    context.budget = replace(context.budget, pretraining_steps=600, finetuning_steps=120)
    low, high = (pretraining.step_flops(context, pretraining.generator_config(context, n)) for n in (1, 2))
    both = 600 * low + 120 * high
    assert high > 2 * low and abs(pretraining.steps_from_scratch(context) * high - both) <= high / 2


def numbers_in(value) -> list[float]:
    if isinstance(value, dict):
        return [n for entry in (*value.keys(), *value.values()) for n in numbers_in(entry)]
    if isinstance(value, list):
        return [n for entry in value for n in numbers_in(entry)]
    if isinstance(value, str):
        return [float(n) for n in NUMBER.findall(value)]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_studies_of_a_tiny_model(model: Path, tmp_path: Path, capsys) -> None:
    names = ("hybrid", "stages", "resolution", "pretraining", "final-forward")
    assert call(tmp_path, "--model", model, "--studies", *names, "--seeds", 0, "--quick") == 0
    assert call(tmp_path, "--model", model, "--studies", "hybrid", "final-forward", "--seeds", 0, 1, "--quick") == 0
    found = read(tmp_path / "results.json")
    studies = {study["name"]: study for study in found["studies"]}
    assert set(studies) == set(names) and found["quick"] and found["failures"] == {}
    assert found["environment"]["threads"] == torch.get_num_threads() and found["environment"]["versions"]["torch"]
    assert all(cell["seconds"] > 0 for cell in found["cells"])
    stages = studies["stages"]  # of the first command alone
    assert (stages["verdict"], stages["seeds"], stages["cells_done"]) == ("one seed has no spread", [0], 3)
    verdicts = ("shows", "does not show", "is reversed")
    assert studies["hybrid"]["verdict"] in verdicts and studies["final-forward"]["verdict"] in verdicts
    on = studies["final-forward"]["summary"]
    assert on["same_tokens"]["on"]["mean"] == 100 and on["relative_change"]["on"]["mean"] > 0
    steps = studies["pretraining"]["summary"]["steps"]
    assert steps["low resolution first"]["mean"] == 4 and 1 <= steps["from scratch"]["mean"] <= 3
    loss = studies["pretraining"]["summary"]["token_loss"]["from scratch"]["mean"]
    assert abs(loss - math.log(64)) < 1, "of 64 codes, hardly trained"

    text = (tmp_path / "tables.md").read_text()
    assert text in capsys.readouterr().out and "Quick: toy budgets" in text
    known = numbers_in(found)
    for number in NUMBER.findall(text):
        decimals = len(number.partition(".")[2])
        close = min(abs(round(value, decimals) - float(number)) for value in (*known, *(-n for n in known)))
        assert close < 1e-9, f"{number} is in no result"


def test_the_full_size_is_timed_with_random_weights(tmp_path: Path) -> None:
    assert call(tmp_path, "--studies", "full-size", "--seeds", 0) == 0
    (study,) = read(tmp_path / "results.json")["studies"]
    rates = study["summary"]["images_per_second"]
    assert rates["hybrid"]["mean"] > 0 and rates["discrete"]["mean"] > 0
    assert study["paper"]["images/s, A100, batch 16"] == {"hybrid": 10.3, "discrete": 11.4}


def test_plots(toy, tmp_path: Path) -> None:
    plots = module("_reproduction.plots")
    assert call(tmp_path, "--seeds", 0, 1) == 0
    assert (tmp_path / "toy.png").exists() == plots.can_plot()


def test_curves(toy, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    assert call(tmp_path, "--seeds", 0, 1) == 0
    study = module("_reproduction.studies").STUDIES["toy"]
    (found,) = read(tmp_path / "results.json")["studies"]
    for axis in (lambda variant: (float(len(variant)), ""), lambda variant: (1.0, variant)):
        assert module("_reproduction.plots").plot(replace(study, axis=axis), found, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").stat().st_size > 1000


def test_every_finding_can_be_judged() -> None:
    for name, study in module("_reproduction.studies").STUDIES.items():
        assert study.name == name and study.findings
        for finding in study.findings:
            assert study.measure(finding.measure).higher is not None
            assert {finding.variant, *finding.others} <= set(study.variants)
        assert {v for row in study.paper.values() for v in row} <= set(study.variants)
        if study.axis is not None:
            assert all(isinstance(study.axis(variant)[0], float) for variant in study.variants)


def test_defaults_are_among_the_variants() -> None:
    studies, default = module("_reproduction.studies").STUDIES, SamplingConfig()
    assert f"{default.num_steps}" in studies["steps"].variants
    assert f"{default.guidance_scale:g}" in studies["guidance"].variants
    assert f"{default.temperature:g}, annealed" in studies["temperature"].variants
    assert f"{preset('shapes').generator.head_steps}" in studies["head-steps"].variants


def test_a_later_command_does_not_take_other_seeds_away(toy, tmp_path: Path, monkeypatch) -> None:
    studies = module("_reproduction.studies").STUDIES
    second = replace(studies["toy"], name="second", parts=dict(studies["toy"].parts))
    monkeypatch.setattr(module("_reproduction.studies"), "STUDIES", {**studies, "second": second})
    assert call(tmp_path, "--studies", "toy", "--seeds", 0, 1) == 0
    assert call(tmp_path, "--studies", "second", "--seeds", 4) == 0
    found = read(tmp_path / "results.json")["studies"]
    assert [(study["name"], study["seeds"]) for study in found] == [("toy", [0, 1]), ("second", [4])]
    assert [study["verdict"] for study in found] == ["shows", "one seed has no spread"]

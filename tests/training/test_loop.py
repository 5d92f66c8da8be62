"""The loop on a toy task: losses that do not depend on how it is cut, logs, previews, schedules, and what stops it."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcar_fast.training.checkpoint import checkpoints, read_state
from dcar_fast.training.loop import NonFiniteLoss, TrainingInterrupted, train
from dcar_fast.training.settings import OptimizerSettings
from dcar_fast.training.step import learning_rate
from dcar_fast.training.watch import Watch
from tests.training.toy_task import OPTIMIZER, ToyTask, loader, run, settings

VARYING = ("seconds", "images_per_second", "waiting_for_data")


def lines(folder: Path) -> list[dict[str, float]]:
    """The log without what depends on time."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in VARYING} for line in found]


def test_what_a_run_leaves_behind(tmp_path):
    report = run(tmp_path, preview_every=5, trackers=("tensorboard",))
    assert report.step == 8 and report.model == tmp_path / "model" and report.seconds > 0
    assert report.checkpoint == tmp_path / "checkpoints" / "step-00000008"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    assert sorted(p.name for p in (tmp_path / "previews").iterdir()) == ["bias-00000005.png", "bias-00000008.png"]
    assert list((tmp_path / "log").glob("events.out.tfevents.*"))
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(1, 9))
    assert {"loss", "gradient_norm", "learning_rate"} <= found[0].keys() and "critic" not in found[0]
    assert "critic" in found[2] and report.metrics["loss"] == found[-1]["loss"]
    rates = [learning_rate(OPTIMIZER, step, 8) for step in range(8)]
    assert [line["learning_rate"] for line in found] == rates
    names = [".lock", "checkpoints", "log", "metrics.jsonl", "model", "previews"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_tensorboard_has_scalars_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, preview_every=4, trackers=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 9))
    expected = [line["loss"] for line in lines(tmp_path)]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(expected, rel=1e-6)
    assert [e.step for e in events.Images("bias")] == [4, 8] and events.Images("bias")[0].width == 4


def test_the_log_is_the_mean_since_the_last_line(tmp_path):
    run(tmp_path / "each")
    run(tmp_path / "three", log_every=3)
    each, three = lines(tmp_path / "each"), lines(tmp_path / "three")
    assert [line["step"] for line in three] == [3, 6, 8]
    for end, start in ((3, 0), (6, 3), (8, 6)):
        wanted = sum(line["loss"] for line in each[start:end]) / (end - start)
        assert next(line for line in three if line["step"] == end)["loss"] == pytest.approx(wanted, rel=1e-12)
    assert three[0]["critic"] == each[2]["critic"]  # a metric that came in later


def test_training_lowers_the_loss(tmp_path):
    class Same:
        def __call__(self, **arguments):
            return loader(**{**arguments, "start_step": 0, "position": None})

    class OneBatch(Same):
        def __call__(self, **arguments):
            batch = next(super().__call__(**arguments))
            while True:
                yield batch

    run(tmp_path, loader=OneBatch(), steps=60, log_every=10, checkpoint_every=0)
    losses = [line["loss"] for line in lines(tmp_path)]
    assert losses[-1] < 0.6 * losses[0]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000060"]  # 0: at the end alone


def test_accumulation_changes_nothing_but_the_rounding(tmp_path):
    run(tmp_path / "1")
    run(tmp_path / "2", accumulation=2)
    run(tmp_path / "4", accumulation=4)
    whole = lines(tmp_path / "1")
    for parts in ("2", "4"):
        for line, wanted in zip(lines(tmp_path / parts), whole, strict=True):
            assert line == pytest.approx(wanted, rel=1e-5), line["step"]
    first, second = (load_file(tmp_path / parts / "model" / "net.safetensors") for parts in ("1", "4"))
    for name in set(first) - {"passes"}:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)


def test_the_export_has_the_averages_and_training_goes_on_with_the_weights(tmp_path):
    run(tmp_path / "mean")
    run(tmp_path / "plain", ema_decay=0.0)
    assert lines(tmp_path / "mean") == lines(tmp_path / "plain")
    mean, plain = (load_file(tmp_path / name / "model" / "net.safetensors") for name in ("mean", "plain"))
    state = torch.load(tmp_path / "mean" / "checkpoints" / "step-00000008" / "modules.pt", weights_only=True)["net"]
    assert not torch.equal(mean["last.weight"], plain["last.weight"])
    assert all(torch.equal(state[name], value) for name, value in plain.items())
    assert mean["passes"] == plain["passes"] == 8  # a buffer is as it is
    assert torch.equal(mean["fixed"], plain["fixed"])


def test_previews_do_not_disturb(tmp_path):
    """Neither the losses nor torch's global generator, which the preview draws from."""
    run(tmp_path / "with", preview_every=1)
    run(tmp_path / "without")
    assert lines(tmp_path / "with") == lines(tmp_path / "without")
    first, second = (
        torch.load(tmp_path / name / "checkpoints" / "step-00000008" / "rest.pt", weights_only=True)["random"]
        for name in ("with", "without")
    )
    assert torch.equal(first[0]["cpu"], second[0]["cpu"])


def test_bfloat16_is_autocast(tmp_path):
    run(tmp_path / "half", precision="bfloat16", steps=3)
    run(tmp_path / "full", steps=3)
    half, full = lines(tmp_path / "half"), lines(tmp_path / "full")
    assert half != full and [h["loss"] for h in half] == pytest.approx([f["loss"] for f in full], rel=0.05)
    state = torch.load(tmp_path / "half" / "checkpoints" / "step-00000003" / "modules.pt", weights_only=True)["net"]
    assert all(value.dtype == torch.float32 for value in state.values())


def test_the_task_gets_its_modules_back(tmp_path):
    task = ToyTask()
    plain, attributes = dict(task.modules), set(vars(task.net))
    run(tmp_path / "half", task, precision="bfloat16", steps=1)
    assert all(task.modules[name] is module for name, module in plain.items())
    assert set(vars(task.net)) == attributes
    once, twice = ToyTask(), ToyTask()
    run(tmp_path / "1", twice, precision="bfloat16", steps=2)
    run(tmp_path / "2", twice, precision="float32", steps=2)  # not in bfloat16 again
    once.net.load_state_dict(torch.load(tmp_path / "1/checkpoints/step-00000002/modules.pt", weights_only=True)["net"])
    run(tmp_path / "3", once, steps=2)
    assert lines(tmp_path / "2") == lines(tmp_path / "3")


def test_clipping_is_by_the_settings(tmp_path):
    task = ToyTask(critic=False)
    task.optimizers = lambda: {"net": torch.optim.SGD(task.net.parameters(), lr=1.0)}
    before = {k: v.clone() for k, v in task.net.state_dict().items()}
    optimizer = OptimizerSettings(learning_rate=1.0, clip=0.25)
    train(task, settings(tmp_path, steps=1), {"net": optimizer}, loader)
    moved = [(v - before[k]).norm() for k, v in task.net.state_dict().items() if k != "passes"]
    assert lines(tmp_path)[0]["gradient_norm"] > 0.5  # the norm before it was clipped
    assert torch.stack(moved).norm().item() == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_the_update(tmp_path, value):
    task = ToyTask(critic=False, bad_step=4, bad_value=value)
    with pytest.raises(NonFiniteLoss) as caught:
        run(tmp_path, task)
    message = str(caught.value)
    assert message.startswith("step 5: the loss or its gradients are not finite; the examples were ['colours-16', ")
    assert message.endswith(f"the last good checkpoint is {tmp_path}/checkpoints/step-00000003")
    assert all(p.isfinite().all() for p in task.net.parameters())
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert not (tmp_path / "model").exists()
    healed = run(tmp_path, ToyTask(critic=False))  # goes on from the checkpoint
    assert healed.step == 8 and [line["step"] for line in lines(tmp_path)] == list(range(1, 9))


@pytest.mark.parametrize("bad_step", [2, 3, 4, 7])
def test_on_a_gpu_the_answer_comes_a_step_later_but_before_anything_is_written(tmp_path, monkeypatch, bad_step):
    """The delayed way, on a CPU: the step is named rightly, no line and no checkpoint has a spoilt number."""
    monkeypatch.setattr(Watch, "delayed", property(lambda self: True, lambda self, value: None), raising=False)
    run(tmp_path / "whole", ToyTask(critic=False))
    with pytest.raises(NonFiniteLoss, match=f"step {bad_step + 1}: .*'colours-{4 * bad_step}'"):
        run(tmp_path / "bad", ToyTask(critic=False, bad_step=bad_step), log_every=2)
    assert all(line["loss"] < 1 for line in lines(tmp_path / "bad"))
    for folder in checkpoints(tmp_path / "bad" / "checkpoints"):
        states = read_state(folder, "modules")["net"], read_state(folder, "averages")["net"]
        assert all(value.isfinite().all() for state in states for value in state.values())
    run(tmp_path / "bad", ToyTask(critic=False))
    assert lines(tmp_path / "bad")[-1] == lines(tmp_path / "whole")[-1]


def test_without_a_checkpoint_it_says_so(tmp_path):
    with pytest.raises(NonFiniteLoss, match="step 1: .* the last good checkpoint is none"):
        run(tmp_path, ToyTask(bad_step=0))


def test_gradients_that_are_no_numbers_stop_it_too(tmp_path):
    task = ToyTask(critic=False)
    task.net.last.bias.register_hook(lambda gradient: gradient / 0 if task.seen == 3 else gradient)
    with pytest.raises(NonFiniteLoss, match="step 4: "):
        run(tmp_path, task)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_saves_it(tmp_path, number, capfd):
    class Signalled(ToyTask):
        def train_step(self, run, batches):
            if run.step == 4:
                os.kill(os.getpid(), number)
            return super().train_step(run, batches)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted, match="stopped after step 5, which is saved as .*step-00000005"):
        run(tmp_path, Signalled())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert issubclass(TrainingInterrupted, KeyboardInterrupt)
    assert f"{number.name}: the run ends after this step" in capfd.readouterr().err
    run(tmp_path)
    run(tmp_path / "whole")
    assert lines(tmp_path) == lines(tmp_path / "whole")


@pytest.mark.parametrize(
    "numbers, status",
    [
        ([signal.SIGTERM] * 3, 5),  # a scheduler's, and the launcher's of the same
        ([signal.SIGINT, signal.SIGINT], 5),
        ([signal.SIGINT, None, signal.SIGTERM], 5),
        ([signal.SIGINT, None, signal.SIGINT], 4),  # who cannot wait
        ([signal.SIGTERM, None, signal.SIGINT], 4),
    ],
)
def test_signals_that_come_twice(tmp_path, monkeypatch, numbers, status):
    monkeypatch.setattr(Watch, "AGAIN", 0.2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts without one

    class Signalled(ToyTask):
        def train_step(self, run, batches):
            for number in numbers if run.step == 4 else ():
                time.sleep(0.3) if number is None else os.kill(os.getpid(), number)
            return super().train_step(run, batches)

    try:
        with pytest.raises(KeyboardInterrupt) as stop:
            run(tmp_path, Signalled())
    finally:
        signal.signal(signal.SIGINT, before)
    assert isinstance(stop.value, TrainingInterrupted) == (status == 5)
    assert run(tmp_path).step == 8 and len(lines(tmp_path)) == 8


def test_a_signal_in_the_last_step_is_no_reason_to_leave_the_model_out(tmp_path):
    class Signalled(ToyTask):
        def train_step(self, run, batches):
            if run.step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().train_step(run, batches)

    assert run(tmp_path, Signalled()).step == 8 and (tmp_path / "model").exists()


def test_it_runs_outside_the_main_thread(tmp_path):
    thread = threading.Thread(target=run, args=(tmp_path,))
    thread.start()
    thread.join()
    assert (tmp_path / "model").exists()


def test_lines_on_standard_error(tmp_path, capfd):
    run(tmp_path, log_every=4)
    error = capfd.readouterr().err
    assert "step 4/8  loss 0." in error and " images/s  0:00:00 left" in error
    assert f"the model is in {tmp_path}/model" in error
    run(tmp_path, steps=9)
    assert f"continues at step 8 from {tmp_path}/checkpoints/step-00000008" in capfd.readouterr().err


def test_skipped_examples_are_in_the_log(tmp_path):
    class Counting:
        def __init__(self, **arguments):
            self.batches, self.skipped, self.closed = loader(**arguments), {"broken": 2, "empty": 1}, False

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.batches)

        def close(self):
            self.closed = True

    made = []
    run(tmp_path, loader=lambda **arguments: made.append(Counting(**arguments)) or made[-1])
    assert lines(tmp_path)[0]["skipped"] == 3 and made[0].closed


def test_the_loader_is_closed_when_the_run_fails(tmp_path):
    made = []
    with pytest.raises(NonFiniteLoss):
        run(tmp_path, ToyTask(bad_step=1), loader=lambda **arguments: made.append(loader(**arguments)) or made[-1])
    with pytest.raises(ValueError, match="closed"):
        next(made[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trackers": ("tensorbored",)}, "tensorbored"),
        ({"trackers": ("wandb",)}, r"run\.trackers: the packages of \['wandb'\] are not installed"),
        ({"parallel": "fsdp2"}, r"run\.parallel must be 'ddp' for what trains \['critic', 'net'\]"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    if changes.get("trackers") == ("wandb",) and _installed("wandb"):
        pytest.skip("wandb is installed here")
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
    ],
)
def test_what_accelerate_config_would_change_is_refused(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}={value} would change what is trained"):
        run(tmp_path)


def test_accelerate_config_does_not_compile(tmp_path, monkeypatch):
    """Compiled modules have other names: the run could not read its own checkpoints."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert run(tmp_path, steps=4).step == 4
    assert run(tmp_path, steps=8).step == 8


def test_fsdp2_needs_a_launcher(tmp_path):
    with pytest.raises(ValueError, match="start with accelerate launch or torchrun"):
        run(tmp_path, ToyTask(critic=False), parallel="fsdp2")


def test_settings_for_other_modules(tmp_path):
    with pytest.raises(ValueError, match=r"optimizers must be given for \['critic', 'net'\], got \['net'\]"):
        train(ToyTask(), settings(tmp_path), {"net": OPTIMIZER}, loader)


def test_the_learning_rate():
    flat = OptimizerSettings(learning_rate=2.0, warmup_steps=4)
    assert [learning_rate(flat, s, 9) for s in (0, 1, 3, 4, 8)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    falling = OptimizerSettings(learning_rate=2.0, final_learning_rate=1.0)
    assert learning_rate(falling, 0, 101) == 2.0 and learning_rate(falling, 100, 101) == 1.0
    assert learning_rate(falling, 50, 101) == pytest.approx(1.5)
    assert learning_rate(falling, 25, 101) == pytest.approx(1.5 + math.cos(math.pi / 4) / 2)
    both = OptimizerSettings(learning_rate=2.0, warmup_steps=10, final_learning_rate=0.0)
    assert [learning_rate(both, s, 21) for s in (9, 10, 15, 20)] == pytest.approx([2.0, 2.0, 1.0, 0.0])
    assert learning_rate(both, 5, 6) == pytest.approx(1.2)  # the run ends within the warm-up
    assert learning_rate(falling, 7, 5) == 1.0 and learning_rate(falling, 0, 1) == 2.0


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None

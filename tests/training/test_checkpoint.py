"""Checkpoints are whole or not there; a resumed run is the run; what does not fit is refused."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dcar_fast.training.checkpoint import (
    checkpoints,
    load_optimizer_state,
    module_state,
    optimizer_state,
    read_record,
    read_state,
    write_checkpoint,
)
from tests.training.test_loop import lines
from tests.training.toy_task import ToyTask, run

ROOT = Path(__file__).parents[2]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything with numbers in a checkpoint, under flat names."""
    found = {}

    def walk(prefix, value):
        if isinstance(value, torch.Tensor):
            found[prefix] = value
        elif isinstance(value, dict):
            for key, entry in value.items():
                walk(f"{prefix}/{key}", entry)
        elif isinstance(value, (list, tuple)):
            for i, entry in enumerate(value):
                walk(f"{prefix}/{i}", entry)
        elif isinstance(value, (int, float)):
            found[prefix] = torch.tensor(float(value), dtype=torch.float64)

    for name in ("modules", "averages", "optimizers", "rest"):
        walk(name, read_state(folder, name))
    return found


def assert_same(first: Path, second: Path) -> None:
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, different


@pytest.mark.parametrize("late", [False, True], ids=["plain", "a parameter without gradient at first"])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_resumed_run_is_the_run_to_the_bit(tmp_path, at, late):
    """Stopped at ``at`` and continued by a new task: losses, weights, averages, moments and random state are equal.

    The critic begins at step 2, so its optimiser has no state in the first checkpoints.
    """
    whole = {"checkpoint_every": 0, "log_every": 2, "keep_checkpoints": 9}
    run(tmp_path / "whole", ToyTask(late=late), **whole)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", Stopped(at, late=late), **whole)
    assert [p.name for p in checkpoints(tmp_path / "parts" / "checkpoints")] == [f"step-{at:08d}"]
    run(tmp_path / "parts", ToyTask(late=late), **whole)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    last = "checkpoints/step-00000008"
    assert_same(tmp_path / "parts" / last, tmp_path / "whole" / last)
    first, second = (json.loads((tmp_path / n / last / "record.json").read_text()) for n in ("parts", "whole"))
    assert first["positions"] == second["positions"] == [{"kind": "custom", "step": 8, "micro_batch": 0}]


class Stopped(ToyTask):
    """Asks for an end after ``at`` steps."""

    def __init__(self, at: int, **changes) -> None:
        super().__init__(**changes)
        self.at = at

    def train_step(self, run, batches):
        if run.step + 1 == self.at:
            signal.raise_signal(signal.SIGTERM)
        return super().train_step(run, batches)


def test_a_finished_run_only_exports_again(tmp_path):
    run(tmp_path)
    before = lines(tmp_path)
    shutil.rmtree(tmp_path / "model")
    calls = []
    report = run(tmp_path, loader=lambda **arguments: calls.append(arguments))
    assert report.step == 8 and (tmp_path / "model").exists() and lines(tmp_path) == before and not calls
    assert report.metrics["loss"] == before[-1]["loss"]


def test_more_steps_may_be_asked_for_and_the_log_goes_on(tmp_path):
    run(tmp_path, steps=4)
    run(tmp_path, steps=6, log_every=2, checkpoint_every=1, keep_checkpoints=3, accumulation=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 6]
    assert [p.name[-1] for p in checkpoints(tmp_path / "checkpoints")] == ["4", "5", "6"]


def test_lines_behind_the_checkpoint_are_taken_out(tmp_path):
    run(tmp_path, steps=5, checkpoint_every=3, keep_checkpoints=5)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000005")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    run(tmp_path, steps=5)
    run(tmp_path / "whole", steps=5)
    assert lines(tmp_path) == lines(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 8}, "run.batch_size 4 -> 8"),
        ({"seed": 6}, "run.seed 5 -> 6"),
        ({"ema_decay": 0.5}, "run.ema_decay 0.9 -> 0.5"),
        ({"identity": {"data": {"path": "b", "workers": 3}, "run": {"steps": 9}}}, "data.path 'a' -> 'b'"),
        ({"identity": {"run": {"steps": 9}}}, "data.path 'a' -> None"),
        ({"identity": {"data": {"path": "a"}, "model": "x"}}, "model None -> 'x'"),
        ({"steps": 3}, r"run.steps must be at least 4, the step of .*, got 3"),
        ({"resume": False}, "run.output must hold no checkpoints where run.resume is false"),
        ({"task": ToyTask(width=9)}, r"is of another net: \d+ tensors differ: blocks.0.linear.bias \(8,\) -> \(9,\)"),
        ({"task": ToyTask(critic=False)}, r"is of the modules \['critic', 'net'\], now there are \['net'\]"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changes, message):
    named = "identity" in changes
    identity = {"data": {"path": "a", "workers": 2}, "run": {"steps": 4}, "preview_prompts": ["a", "b"]}
    run(tmp_path, steps=4, identity=identity if named else None)
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **{"steps": 6, **changes})
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before
    run(tmp_path, steps=6, identity=identity if named else None)  # nothing is spoilt


def test_settings_that_may_change(tmp_path):
    run(
        tmp_path, steps=4, identity={"data": {"workers": 2, "path": "a"}, "preview_prompts": ["a"], "run": {"steps": 4}}
    )
    changed = {"data": {"workers": 0, "path": "a"}, "preview_prompts": ["b", "c"], "run": {"steps": 6, "log_every": 2}}
    assert run(tmp_path, steps=6, identity=changed).step == 6


@pytest.mark.parametrize("damage", ["bit", "short", "missing", "record", "format"])
def test_a_damaged_checkpoint_is_named_and_never_passed_over(tmp_path, damage):
    run(tmp_path, steps=6)
    folder = tmp_path / "checkpoints" / "step-00000006"
    path = folder / "optimizers.pt"
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif damage == "short":
        path.write_bytes(content[:-1])
    elif damage == "missing":
        path.unlink()
    elif damage == "record":
        (folder / "record.json").write_text("{")
    else:
        record = json.loads((folder / "record.json").read_text())
        (folder / "record.json").write_text(json.dumps(record | {"format": "2"}))
    with pytest.raises(
        ValueError, match=rf"checkpoint {folder} is damaged: .*; to continue from the one before it, rem"
    ):
        run(tmp_path)
    shutil.rmtree(folder)
    run(tmp_path)
    run(tmp_path / "whole")
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_the_last_are_kept_and_leftovers_go(tmp_path):
    for name in (".step-abc", ".step-removed-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.pt").write_bytes(b"half")
    (tmp_path / "step-00000001").mkdir()  # of an earlier program: whole
    (tmp_path / "notes").mkdir()
    for step in (2, 3, 100_000_000):
        folder = write_checkpoint(tmp_path, step, {"a": {"x": torch.arange(3)}}, {"extra": [1, None]}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-00000003", "step-100000000"]
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-100000000"]
    record = read_record(folder)
    assert record["step"] == 100_000_000 and record["extra"] == [1, None]
    assert torch.equal(read_state(folder, "a")["x"], torch.arange(3))


def test_a_checkpoint_can_be_written_again(tmp_path):
    for value in (1, 2):
        folder = write_checkpoint(tmp_path, 7, {"a": torch.tensor(value)}, {}, keep=1)
    assert read_state(folder, "a") == 2 and [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


def test_a_failed_save_leaves_the_old_ones(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, {"a": torch.zeros(2)}, {}, keep=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match="step-00000002 cannot be written: No space left on device"):
        write_checkpoint(tmp_path, 2, {"a": torch.zeros(2)}, {}, keep=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000001"] and read_record(tmp_path / "step-00000001")


def test_a_full_disk_is_named_and_gets_its_space_back(tmp_path):
    write_checkpoint(tmp_path, 1, {"a": torch.ones(3)}, {}, keep=2)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(ValueError, match="step-00000002 cannot be written: .* bytes are free on that disk"):
            write_checkpoint(tmp_path, 2, {"a": torch.ones(10_000)}, {}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("text", ["null\n", "5\n", '{"loss": 1}\n', '{"step": 2, "lo', "\x00\x01"])
def test_a_log_with_something_else_in_it(tmp_path, text):
    run(tmp_path, steps=4)
    kept = lines(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(text)
    run(tmp_path, steps=5)
    assert lines(tmp_path)[:4] == kept and len(lines(tmp_path)) == 5


def test_pickles_are_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "evil",))

    folder = write_checkpoint(tmp_path, 1, {"a": Evil()}, {}, keep=1)
    with pytest.raises(Exception, match="Weights only load failed"):
        read_state(folder, "a")
    assert not (tmp_path / "evil").exists()


def test_saving_an_optimizer_without_state_does_not_step_it():
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    assert optimizer_state(module, optimizer) == {} and not optimizer.state
    load_optimizer_state(module, optimizer, {})
    assert not optimizer.state


def test_a_part_of_an_optimizers_state_comes_back_as_it_was():
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module.weight.grad = torch.ones(2, 2)
    optimizer.step()
    saved = optimizer_state(module, optimizer)
    other = torch.nn.Linear(2, 2)
    restored = torch.optim.AdamW(other.parameters())
    load_optimizer_state(other, restored, saved)
    assert list(restored.state) == [other.weight]
    for key, value in optimizer.state[module.weight].items():
        assert torch.equal(restored.state[other.weight][key], value)
    assert module_state(module).keys() == {"weight", "bias"}


SCRIPT = """
import os
import sys
import time
import torch
import accelerate
from tests.training.toy_task import run

torch.set_num_threads(1)
save = torch.save

def slow(value, path):
    # half a file, then a while in which the process is likely to be killed, then the whole one
    save(value, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    time.sleep(0.01)
    path.write_bytes(whole)

torch.save = slow
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        run(sys.argv[1], steps=40, checkpoint_every=3)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_at_any_moment_it_loses_no_more_than_since_the_last_checkpoint(tmp_path):
    """kill -9 again and again, often within a save; in the end the losses are the uninterrupted run's."""
    generator, folder = random.Random(0), tmp_path / "killed"
    done, kills, within, code = 0, 0, 0, -1
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        while code != 0:
            parent.stdin.write("go\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            if kills < 8:
                wait_for_step(folder, done + 1)
                time.sleep(generator.uniform(0, 0.2))
                os.kill(child, signal.SIGKILL)
            code = int(parent.stdout.readline())
            assert code in (0, -signal.SIGKILL)
            if code == 0:
                break
            kills += 1
            root = folder / "checkpoints"
            found = checkpoints(root)
            within += any(path.name.startswith(".step-") for path in root.glob(".*"))
            for checkpoint in found:
                read_record(checkpoint)  # raises unless it is whole
            saved = int(found[-1].name.removeprefix("step-")) if found else 0
            assert saved >= done and whole_lines(folder)[-1]["step"] - saved <= 3
            done = saved
    assert kills >= 4 and within >= 1, (kills, within)
    run(tmp_path / "whole", steps=40, checkpoint_every=3)
    assert lines(folder) == lines(tmp_path / "whole")
    assert_same(*(path / "checkpoints" / "step-00000040" for path in (folder, tmp_path / "whole")))
    assert not list((folder / "checkpoints").glob(".step-*"))


def whole_lines(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line[-1:] == "}"] if path.exists() else []


def wait_for_step(folder: Path, step: int) -> None:
    for _ in range(6000):
        found = whole_lines(folder)
        if found and found[-1]["step"] >= step:
            return
        time.sleep(0.005)
    raise AssertionError("no step in 30 seconds")

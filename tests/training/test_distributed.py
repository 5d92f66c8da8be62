"""Two processes under gloo, started by torchrun and by accelerate: the same losses as one, and checkpoints for both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dcar_fast.training.checkpoint import checkpoints, read_record
from tests.training.test_checkpoint import Stopped, tensors
from tests.training.test_loop import lines
from tests.training.toy_task import ToyTask, run

ROOT = Path(__file__).parents[2]
TORCHRUN = (
    "torch.distributed.run",
    "--nproc-per-node=2",
    "--master-port=0",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=localhost:0",
)
# accelerate's own way for several CPU processes is MPI; this is the one for GPUs, and each process finds none
ACCELERATE = (
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes=2",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--main_process_port=0",
)
SHARDED = {"parallel": "fsdp2", "task": {"critic": False}}


def launch(folder: Path, cases: list[dict[str, Any]], launcher: tuple[str, ...] = TORCHRUN) -> list[list[list[Any]]]:
    """How the cases ended, by process."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    command = [sys.executable, "-m", *launcher, "-m", "tests.training.launched", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Outputs of one launch of two processes, which goes through many runs, and of the same runs in one process."""
    made = tmp_path_factory.mktemp("distributed")
    run(made / "one")
    run(made / "one-net", ToyTask(critic=False))
    for name, critic in (("one-early", True), ("one-net-early", False)):
        with pytest.raises(KeyboardInterrupt):
            run(made / name, Stopped(5, critic=critic))
    cases = {
        "two": {},
        "two-accumulated": {"accumulation": 2, "log_every": 3},
        "sharded": {**SHARDED, "preview_every": 4},
        "sharded-accumulated": {**SHARDED, "accumulation": 2},
        "sharded-half": {**SHARDED, "precision": "bfloat16"},
        "two-early": {"kill": [0, 4]},
        "sharded-early": {**SHARDED, "kill": [1, 4]},
        "one-early": {},  # began in one process
        "one-net-early": SHARDED,
        "bad": {"task": {"bad_step": 4}},
        "stopped": {"kill": [1, 3]},
        "indivisible": {"batch_size": 5},
        "refused": {"parallel": "fsdp2"},
    }
    values = [{"output": str(made / name), **case} for name, case in cases.items()]
    ends = launch(made, values)
    (made / "ends.json").write_text(json.dumps([dict(zip(cases, end, strict=True)) for end in ends]))
    return made


def ends(folder: Path, name: str) -> list[list[Any]]:
    return [process[name] for process in json.loads((folder / "ends.json").read_text())]


def assert_same_lines(found: Path, wanted: Path) -> None:
    assert [line["step"] for line in lines(found)] == [line["step"] for line in lines(wanted)]
    for line, other in zip(lines(found), lines(wanted), strict=True):
        assert line == pytest.approx(other, rel=1e-5), line["step"]


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ("two", "one"),
        ("sharded", "one-net"),
        ("sharded-accumulated", "one-net"),
        ("one-early", "one"),
        ("one-net-early", "one-net"),
    ],
)
def test_two_processes_have_the_losses_of_one(folder, found, wanted):
    """Data parallel and sharded, accumulated, and continued from the checkpoint of one process."""
    assert_same_lines(folder / found, folder / wanted)
    assert [end[:2] for end in ends(folder, found)] == [["done", 8]] * 2
    one, two = (load_file(folder / name / "model" / "net.safetensors") for name in (wanted, found))
    for name in set(one) - {"passes"}:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


def test_means_over_steps_and_processes(folder):
    each = {line["step"]: line["loss"] for line in lines(folder / "one")}
    found = {line["step"]: line["loss"] for line in lines(folder / "two-accumulated")}
    wanted = {
        end: sum(each[s] for s in range(start + 1, end + 1)) / (end - start) for start, end in ((0, 3), (3, 6), (6, 8))
    }
    assert found == pytest.approx(wanted, rel=1e-5)


def test_sharded_in_bfloat16_is_near(folder):
    full, half = lines(folder / "one-net"), lines(folder / "sharded-half")
    assert [line["loss"] for line in half] == pytest.approx([line["loss"] for line in full], rel=0.1)
    assert [line["loss"] for line in half] != [line["loss"] for line in full]


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_their_checkpoints_are_whole_ones(folder, name):
    """The same names and shapes as one process writes, float32, with the position and random state of each process."""
    saved = folder / name / "checkpoints" / "step-00000008"
    record = read_record(saved)
    assert record["processes"] == 2 and len(record["positions"]) == 2
    one = tensors(folder / ("one" if name == "two" else "one-net") / "checkpoints" / "step-00000008")
    two = tensors(saved)
    assert "rest/random/1/cpu" in two
    two = {key: value for key, value in two.items() if not key.startswith("rest/random/")}
    assert two.keys() == {key for key in one if not key.startswith("rest/random/")}
    for key, value in two.items():
        torch.testing.assert_close(value, one[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("begun", "whole", "arguments"), [("two-early", "one", {}), ("sharded-early", "one-net", SHARDED)]
)
def test_one_process_goes_on_where_two_stopped(folder, begun, whole, arguments):
    run(folder / begun, ToyTask(**arguments.get("task", {})))
    assert_same_lines(folder / begun, folder / whole)


def test_sharded_previews_and_exports_are_those_of_the_averages(folder):
    state = torch.load(folder / "sharded/checkpoints/step-00000008/averages.pt", weights_only=True)["net"]
    exported = load_file(folder / "sharded" / "model" / "net.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in state.items()) and exported["passes"] == 8
    assert len(list((folder / "sharded" / "previews").iterdir())) == 2


def test_a_bad_loss_of_one_process_stops_both(folder):
    for end in ends(folder, "bad"):
        assert end[0] == "NonFiniteLoss"
        assert "step 5: " in end[1] and "['colours-16', 'colours-17', 'colours-18', 'colours-19']" in end[1]
    assert [p.name for p in checkpoints(folder / "bad" / "checkpoints")] == ["step-00000003"]


def test_a_signal_to_one_process_stops_both_at_the_same_step(folder):
    assert {tuple(end)[0] for end in ends(folder, "stopped")} == {"TrainingInterrupted"}
    assert [p.name for p in checkpoints(folder / "stopped" / "checkpoints")] == ["step-00000003", "step-00000004"]
    run(folder / "stopped")
    assert_same_lines(folder / "stopped", folder / "one")


def test_no_thread_of_gloo_lives_on_into_the_end_of_python(folder):
    """One that drops a tensor just then aborts the process, and its launcher reports a failure."""
    for rank in range(2):
        threads = (folder / f"cases.json.{rank}.threads").read_text().split("\n")
        assert threads and not [name for name in threads if "gloo" in name], threads


def test_what_is_refused(folder):
    for end in ends(folder, "indivisible"):
        assert end == ["ValueError", "run.batch_size must be a multiple of 2 processes x 1 accumulated parts, got 5"]
    assert all("run.parallel must be 'ddp'" in end[1] for end in ends(folder, "refused"))


def test_accelerate_launch(folder, tmp_path):
    ended = launch(tmp_path, [{"output": str(tmp_path / "out")}], ACCELERATE)
    assert [end[0][:2] for end in ended] == [["done", 8]] * 2
    assert_same_lines(tmp_path / "out", folder / "one")

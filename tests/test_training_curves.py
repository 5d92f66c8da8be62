"""Curves of trainings: what is read from the logs, and what is refused."""

import json

import pytest
from PIL import Image

from tests.benchmark_scripts import import_module, run

__all__ = ["import_module"]


def log(folder, lines):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_step_done_twice_counts_once(module, tmp_path):
    """After kill -9 a run does some steps again; on a CPU they are equal, elsewhere the later ones are in the model."""
    lines = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}, {"step": 10, "loss": 2.5}]
    read = module("training_curves").read_metrics(log(tmp_path / "run", lines))
    assert read == [{"step": 10, "loss": 2.5}, {"step": 20, "loss": 2.0}]


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    one = log(tmp_path / "one", [{"step": s, "loss": 1 / s, "psnr": s, "seconds": s} for s in (10, 20, 30)])
    two = log(tmp_path / "two", [{"step": s, "loss": 2 / s, "seconds": s} for s in (10, 20)])
    output = tmp_path / "curves.png"
    done = run("training_curves.py", one, two, "-o", output)
    assert done.returncode == 0, done.stderr
    with Image.open(output) as both, Image.open(output) as again:
        assert both.size == again.size and both.width > both.height  # two panels beside each other
    done = run("training_curves.py", one, "-o", output, "--metrics", "loss")
    with Image.open(output) as single:
        assert done.returncode == 0 and single.width < both.width


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, (), "does not exist: no training has written there"),
        ("", (), "is empty"),
        ('{"step": 1, "loss"', (), "line 1 is no line of a training's log"),
        ('{"loss": 1}\n', (), "line 1 is no line of a training's log"),
        ('{"step": 1, "loss": 1}\n', ("--metrics", "psnr"), r"['psnr'] were not logged; there are ['loss']"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, text, arguments, message):
    run_folder, output = tmp_path / "run", tmp_path / "curves.png"
    run_folder.mkdir()
    if text is not None:
        (run_folder / "metrics.jsonl").write_text(text)
    done = run("training_curves.py", run_folder, "-o", output, *arguments)
    assert done.returncode == 2 and message in done.stderr and not output.exists()

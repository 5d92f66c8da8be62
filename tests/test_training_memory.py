"""benchmarks/training_memory.py: its arguments, and the tokenizer's step on a tiny model."""

from __future__ import annotations

import pytest

from tests.benchmark_scripts import import_module, run  # noqa: F401  (a fixture)
from tests.training.tokenizer_cases import config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--what tokenizer --size 300", "argument --size: must be one of (256, 512) for tokenizer, got 300"),
        ("--what decoder", "argument --what: invalid choice: 'decoder'"),
        ("--what tokenizer --bs 0", "argument --bs: must be an integer >= 1, got '0'"),
        ("--what tokenizer --json /nowhere/result.json", "argument --json: cannot write /nowhere/result.json"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    done = run("training_memory.py", *arguments.split())
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"training_memory.py: error: {message}") and done.stderr.count("\n") == 1


def test_a_step_takes_all_losses(module):
    tokenizer_step = module("_training_tokenizer").tokenizer_step
    found = tokenizer_step(32, 2, config())
    assert found["seconds"] > 0 and 0 < found["loss"] < 100 and found["parameters"] > 10_000

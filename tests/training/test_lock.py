"""Two processes never write one folder: the second is refused, and a process that is gone holds nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dcar_fast.training.lock import LOCK, only_writer
from tests.training.toy_task import run

HOLDER = """
import sys, time
from dcar_fast.training.lock import only_writer
with only_writer(sys.argv[1]):
    print("holds", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def test_the_second_is_refused_until_the_first_is_gone(tmp_path, holder):
    with (
        pytest.raises(ValueError, match=f"{tmp_path} is being written by process {holder.pid} on .*; choose another"),
        only_writer(tmp_path),
    ):
        pass
    with pytest.raises(ValueError, match=f"run.output: {tmp_path} is being written by process {holder.pid}"):
        run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK], "nothing was touched"
    holder.kill()
    holder.wait()
    assert run(tmp_path).step == 8


def test_one_after_another(tmp_path):
    for _ in range(2):
        with only_writer(tmp_path / "new" / "folder"):
            text = (tmp_path / "new" / "folder" / LOCK).read_text()
    assert text.startswith(f"process {os.getpid()} on ") and text.count("\n") == 1


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match="file/out cannot be written: Not a directory"),
        only_writer(tmp_path / "file/out"),
    ):
        pass
    with pytest.raises(ValueError, match="run.output: .*file/out cannot be written"):
        run(tmp_path / "file" / "out")


def test_a_file_system_without_locks_is_announced(tmp_path, monkeypatch, caplog):
    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", without)
    with only_writer(tmp_path):
        pass
    assert "is not locked (No locks available)" in caplog.text

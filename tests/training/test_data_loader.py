"""The loader: one global batch however it is split, exact continuation, worker processes that come and go quietly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing

from dcar_fast.training.data.examples import Batch, Example
from dcar_fast.training.data.loader import make_loader, random_access_loader
from dcar_fast.training.data.split import Split
from dcar_fast.training.data.workers import signals_wait
from tests.training.data_files import make_folder, settings


class Numbers:
    """Example i shows i."""

    def example(self, index: int) -> Example:
        image = np.empty((2, 3, 3), np.uint8)
        image[:] = index // 256, index % 256, os.getpid() % 256
        return Example(str(index), image, f"number {index}")


class Slow(Numbers):
    def example(self, index: int) -> Example:
        time.sleep(0.05 if index % 3 == 0 else 0)
        return super().example(index)


class Failing(Numbers):
    def example(self, index: int) -> Example:
        if index == 5:
            raise ValueError("number 5 is missing")
        return super().example(index)


def content(batches: list[Batch]) -> list[tuple[list[str], list[str], bytes]]:
    return [(batch.keys, batch.captions, batch.images.numpy().tobytes()) for batch in batches]


def take(loader: Any, count: int) -> list[Batch]:
    with loader:
        return list(islice(loader, count))


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 3), (2, 3), (3, 2), (6, 2)])
def test_every_split_has_the_rows_of_the_global_batch(world: int, accumulation: int) -> None:
    size, steps = 12, 3
    rows = size // (world * accumulation)
    by_rank = [
        take(random_access_loader(Numbers(), Split(size, world, rank, accumulation)), steps * accumulation)
        for rank in range(world)
    ]
    for step in range(steps):
        keys: list[str] = []
        for micro in range(accumulation):
            for rank in range(world):
                batch = by_rank[rank][step * accumulation + micro]
                assert len(batch.keys) == rows
                keys += batch.keys
        assert keys == [str(step * size + i) for i in range(size)]


def test_images_are_channels_first_bytes() -> None:
    (batch,) = take(random_access_loader(Numbers(), Split(4), start_step=100), 1)
    assert batch.images.shape == (4, 3, 2, 3) and batch.images.dtype == torch.uint8 and batch.images.is_contiguous()
    assert batch.images[:, 0].eq(1).all() and batch.images[:, 1, 0, 0].tolist() == [144, 145, 146, 147]
    assert batch.captions == [f"number {i}" for i in range(400, 404)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["shapes", "folder"])
def test_a_resumed_loader_goes_on_exactly(tmp_path: Path, kind: str, workers: int) -> None:
    augmented = kind == "folder"
    path = make_folder(tmp_path, 7) if augmented else ""
    data = settings(kind, path, workers=workers, random_crop=augmented, flip=augmented)
    whole = take(make_loader(data, batch_size=4, accumulation=2), 12)
    assert content(whole) == content(
        take(make_loader(settings(**{**vars(data), "workers": 1}), batch_size=4, accumulation=2), 12)
    )
    for done in (2, 5):
        position = json.loads(json.dumps(whole[done - 1].position))
        rest = take(make_loader(data, batch_size=4, accumulation=2, position=position), 12 - done)
        assert content(rest) == content(whole[done:])
        assert [batch.position for batch in rest] == [batch.position for batch in whole[done:]]
    by_step = take(make_loader(data, batch_size=4, accumulation=2, start_step=3), 6)
    assert content(by_step) == content(whole[6:])


def test_at_the_end_of_a_step_another_split_may_go_on() -> None:
    data = settings("shapes")
    whole = take(make_loader(data, batch_size=4), 4)
    position = take(make_loader(data, batch_size=4, world_size=2, rank=1, accumulation=2), 4)[-1].position
    assert content(take(make_loader(data, batch_size=4, position=position, start_step=2), 2)) == content(whole[2:])


def test_workers_keep_the_order() -> None:
    batches = take(random_access_loader(Slow(), Split(2), workers=3), 12)
    assert [key for batch in batches for key in batch.keys] == [str(i) for i in range(24)]
    assert len({int(batch.images[0, 2, 0, 0]) for batch in batches}) == 3


def test_seeds_make_a_difference() -> None:
    first, second, third = (take(make_loader(settings("shapes", seed=s), batch_size=4), 1) for s in (0, 1, 1))
    assert content(first) != content(second) == content(third)
    assert content(take(make_loader(settings("shapes"), seed=1, batch_size=4), 1)) == content(second)


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(make_loader(settings("shapes", workers=1), batch_size=2), 3)
    assert torch.equal(torch.get_rng_state(), before)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def children() -> list[int]:
    return [process.pid for process in torch.multiprocessing.active_children()]


def test_closing_ends_the_workers() -> None:
    before = set(children())
    loader = random_access_loader(Numbers(), Split(2), workers=2)
    next(loader)
    workers = list(set(children()) - before)
    assert len(workers) == 2
    loader.close()
    assert gone(workers, 5)
    with pytest.raises(ValueError, match="closed"):
        next(loader)
    loader.close()


def test_ctrl_c_leaves_the_workers_working() -> None:
    before = set(children())
    with random_access_loader(Numbers(), Split(2), workers=2) as loader:
        next(loader), next(loader)  # both workers have started
        for pid in set(children()) - before:
            os.kill(pid, signal.SIGINT)
        assert [next(loader).keys[0] for _ in range(8)] == [str(2 * i) for i in range(2, 10)]


SCRIPT = """
import os, sys, time, types
import torch.multiprocessing
from dcar_fast.training.data.loader import make_loader
if __name__ == "__main__":
    if sys.argv[1] == "spawn":
        torch.multiprocessing.set_start_method("spawn")
    data = {"kind": "folder", "path": sys.argv[2], "size": 16, "random_crop": True, "flip": True}
    data = types.SimpleNamespace(**data, workers=2, seed=0)
    loader = make_loader(data, batch_size=4)
    batches = [next(loader) for _ in range(6)]
    print([(b.keys, int(b.images.long().sum())) for b in batches])
    print(*[process.pid for process in torch.multiprocessing.active_children()], flush=True)
    if sys.argv[1] == "killed":
        time.sleep(60)
"""


def test_spawned_and_forked_workers_agree_and_end_with_the_program(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    folder = make_folder(tmp_path / "pictures", 5)
    lines = {}
    for method in ("spawn", "default"):
        command = [sys.executable, str(tmp_path / "script.py"), method, str(folder)]
        root = Path(__file__).parents[2]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(root)}
        )
        assert done.returncode == 0 and not done.stderr, done.stderr  # no complaints on the way out
        lines[method], pids = done.stdout.splitlines()
        assert gone([int(pid) for pid in pids.split()], 5)
    assert lines["spawn"] == lines["default"]


def test_workers_end_when_the_program_is_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    folder = make_folder(tmp_path / "pictures", 5)
    command = [sys.executable, str(tmp_path / "script.py"), "killed", str(folder)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    ) as process:
        process.stdout.readline()
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        process.kill()
    assert gone(pids, 20)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_a_source_come_through(workers: int) -> None:
    before = set(children())
    with random_access_loader(Failing(), Split(2), workers=workers) as loader:
        next(loader)
        next(loader)
        with pytest.raises(ValueError, match="number 5 is missing") as error:
            next(loader)
        pids = list(set(children()) - before)
    assert len(pids) == workers and gone(pids, 1)  # the exception, which refers to the iterator, does not keep them
    del error


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({}, {"batch_size": 4.0}, "batch_size must be an integer"),
        ({}, {"batch_size": 6, "world_size": 2, "accumulation": 2}, "batch_size must be a multiple of 2 processes x 2"),
        ({}, {"batch_size": 4, "world_size": 2, "rank": 2}, "rank must be below world_size 2, got 2"),
        ({}, {"batch_size": 4, "rank": -1}, "rank must be an integer >= 0"),
        ({}, {"batch_size": 4, "start_step": -1}, "start_step must be an integer >= 0"),
        ({}, {"batch_size": 4, "seed": -1}, "seed must be an integer >= 0"),
        ({"workers": -1}, {"batch_size": 4}, "data.workers must be an integer >= 0"),
        ({"kind": "video"}, {"batch_size": 4}, "data.kind must be one of .*, got 'video'"),
        ({"flip": True}, {"batch_size": 4}, "data.random_crop and data.flip must be off with data.kind 'shapes'"),
        ({"kind": "cache", "random_crop": True}, {"batch_size": 4}, "must be off with data.kind 'cache'"),
        ({"kind": "folder"}, {"batch_size": 4}, "data.path must name a folder"),
        ({}, {"batch_size": 4, "position": {"kind": "folder"}}, "position is of data.kind 'folder'"),
        ({}, {"batch_size": 4, "position": {"kind": "shapes", "step": 2, "micro_batch": 1}}, "micro_batch in 0..0"),
        (
            {},
            {"batch_size": 4, "position": {"kind": "shapes", "data": "other", "step": 2, "micro_batch": 0}},
            "position is of other data of kind 'shapes'",
        ),
        ({}, {"batch_size": 4, "position": {"kind": "shapes", "step": -2, "micro_batch": 0}}, "position must have"),
        (
            {},
            {"batch_size": 4, "start_step": 3, "position": {"kind": "shapes", "step": 2, "micro_batch": 0}},
            "position must have step 3",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader(SimpleNamespace(**{**vars(settings("shapes")), **changes}), **arguments)


def test_a_schedulers_sigterm_leaves_the_workers_working() -> None:
    before = set(children())
    with random_access_loader(Numbers(), Split(2), workers=2) as loader:
        for pid in set(children()) - before:  # at once: they may not even have started
            os.kill(pid, signal.SIGTERM)
        assert [next(loader).keys[0] for _ in range(8)] == [str(2 * i) for i in range(8)]
        workers = list(set(children()) - before)
        assert len(workers) == 2
    assert gone(workers, 5)


class Hanging(Numbers):
    """Never comes back from the second example."""

    def example(self, index: int) -> Any:
        while index == 1:
            time.sleep(60)
        return super().example(index)


def test_a_worker_that_hangs_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    before = set(children())
    loader = random_access_loader(Hanging(), Split(1), workers=1)
    assert next(loader).keys == ["0"]
    workers = list(set(children()) - before)
    loader.close()
    assert gone(workers, 1)


def test_signals_wait_while_workers_start() -> None:
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        with signals_wait():
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # to this thread, which would fork
            assert not got
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)

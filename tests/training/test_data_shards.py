"""Tar shards: every sample once an epoch however they are split, exact continuation, and damaged archives."""

from __future__ import annotations

import functools
import gzip
import http.server
import io
import json
import shutil
import tarfile
import threading
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from dcar_fast.training.data import shards, tar_files
from dcar_fast.training.data.examples import Batch, Skip
from dcar_fast.training.data.loader import Loader, make_loader
from dcar_fast.training.data.shards import Place, ShardSource, expand_shards
from tests.training.data_files import encoded, make_shards, picture, settings, write_tar

pytest.importorskip("webdataset")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several windows in a shard of a few samples."""
    monkeypatch.setattr(shards, "WINDOW", 4)


def take(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return list(islice(loader, count))


def content(batches: list[Batch]) -> list[tuple[list[str], list[str], bytes]]:
    return [(batch.keys, batch.captions, batch.images.numpy().tobytes()) for batch in batches]


def lane_keys(source: ShardSource, lane: int, lanes: int, epoch: int) -> list[str]:
    """Keys of a lane's examples in one epoch."""
    found = []
    for example, place in source.examples(lane, lanes, Place(epoch)):
        if place.epoch > epoch:
            break
        found.append(example.key)
    return found


@pytest.mark.parametrize("sizes", [[5, 9, 1, 7], [11], [3, 4], [0, 6, 0]])
@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
def test_the_lanes_of_an_epoch_share_out_every_sample(tmp_path: Path, sizes: list[int], lanes: int) -> None:
    source = ShardSource(expand_shards(str(make_shards(tmp_path, sizes))), 16)
    orders = []
    for epoch in range(3):
        found = [key for lane in range(lanes) for key in lane_keys(source, lane, lanes, epoch)]
        assert sorted(found) == [f"{i:04d}" for i in range(sum(sizes))]
        orders.append(tuple(found))
    assert len(set(orders)) == 3


def test_samples_are_shuffled_within_windows_and_by_the_seed(tmp_path: Path) -> None:
    urls = expand_shards(str(make_shards(tmp_path, [12])))
    first = lane_keys(ShardSource(urls, 16, seed=0), 0, 1, 0)
    assert first != sorted(first)
    assert [sorted(first[i : i + 4]) for i in (0, 4, 8)] == [[f"{j:04d}" for j in range(i, i + 4)] for i in (0, 4, 8)]
    assert lane_keys(ShardSource(urls, 16, seed=1), 0, 1, 0) != first


def test_more_lanes_than_samples(tmp_path: Path) -> None:
    """Each lane has its turn."""
    source = ShardSource(expand_shards(str(make_shards(tmp_path, [2]))), 16)
    for lane in range(5):
        stream = source.examples(lane, 5, Place())
        assert {example.key for example, _ in islice(stream, 4)} == {"0000", "0001"}


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("done", [1, 4, 9])
def test_a_resumed_loader_goes_on_exactly(tmp_path: Path, workers: int, done: int) -> None:
    make_shards(tmp_path, [5, 9, 1, 7])
    data = settings("shards", tmp_path, workers=workers, random_crop=True, flip=True)
    whole = take(make_loader(data, batch_size=3), 16)
    position = json.loads(json.dumps(whole[done - 1].position))
    rest = take(make_loader(data, batch_size=3, start_step=done, position=position), 16 - done)
    assert content(rest) == content(whole[done:])
    assert [batch.position for batch in rest] == [batch.position for batch in whole[done:]]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_goes_on_exactly(tmp_path: Path, rank: int) -> None:
    make_shards(tmp_path, [5, 9, 1])
    arguments: dict[str, Any] = {"batch_size": 8, "world_size": 2, "rank": rank, "accumulation": 2}
    data = settings("shards", tmp_path, workers=2)
    whole = take(make_loader(data, **arguments), 12)
    assert all(len(batch.keys) == 2 for batch in whole)
    rest = take(make_loader(data, **arguments, start_step=2, position=whole[3].position), 8)
    assert content(rest) == content(whole[4:])


def test_ranks_read_different_samples(tmp_path: Path) -> None:
    make_shards(tmp_path, [6, 6])
    data = settings("shards", tmp_path)
    keys = []
    for rank in range(2):
        batches = take(make_loader(data, batch_size=2, world_size=2, rank=rank), 6)
        keys += [key for batch in batches for key in batch.keys]
    assert sorted(keys) == [f"{i:04d}" for i in range(12)]


def test_nothing_is_decoded_on_the_way_to_a_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path, [3, 30])
    data = settings("shards", tmp_path)
    position = take(make_loader(data, batch_size=1), 20)[-1].position
    decoded, opened = [], []
    real, read = shards.decode_picture, shards.read_samples
    monkeypatch.setattr(shards, "decode_picture", lambda *given: decoded.append(1) or real(*given))
    monkeypatch.setattr(shards, "read_samples", lambda *given: opened.append(1) or read(*given))
    take(make_loader(data, batch_size=1, position=position), 1)
    assert len(decoded) == 1 and len(opened) == 1


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def member_offset(path: Path, name: str) -> int:
    with tarfile.open(path) as archive:
        return archive.getmember(name).offset


def test_the_rest_of_a_truncated_shard_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_shards(tmp_path, [6, 6])
    cut(tmp_path / "000.tar", member_offset(tmp_path / "000.tar", "0003.png") + 600)  # within the picture
    with make_loader(settings("shards", tmp_path), batch_size=1) as loader:
        keys = [batch.keys[0] for batch in islice(loader, 18)]
    assert Counter(keys) == {key: 2 for key in ["0000", "0001", "0002", *(f"{i:04d}" for i in range(6, 12))]}
    assert loader.skipped == {"broken shard": 1}
    assert any("000.tar is left out: broken shard (the rest of it" in record.getMessage() for record in caplog.records)


def test_a_sample_cut_in_two_is_left_out(tmp_path: Path) -> None:
    make_shards(tmp_path, [6])
    cut(tmp_path / "000.tar", member_offset(tmp_path / "000.tar", "0003.txt"))  # the picture is whole
    with make_loader(settings("shards", tmp_path), batch_size=3) as loader:
        assert sorted(next(loader).keys) == ["0000", "0001", "0002"]
        next(loader)
        assert loader.skipped == {"broken shard": 1, "no caption": 1}


def test_a_damaged_header_is_no_end(tmp_path: Path) -> None:
    """tarfile would take it for one and say nothing."""
    path = make_shards(tmp_path, [6]) / "000.tar"
    data = bytearray(path.read_bytes())
    offset = member_offset(path, "0002.png")
    data[offset + 5 : offset + 300] = b"\x55" * 295
    path.write_bytes(data)
    told: list[Skip] = []
    samples = list(tar_files.read_samples(str(path), told.append))
    assert [sample["__key__"] for sample in samples] == ["0000", "0001"]
    assert [skip.reason for skip in told] == ["broken shard"] and "damaged header" in told[0].detail


@pytest.mark.parametrize("data", [b"", b"no tar at all" * 100])
def test_no_archive(tmp_path: Path, data: bytes) -> None:
    make_shards(tmp_path, [2])
    (tmp_path / "bad.tar").write_bytes(data)
    with make_loader(settings("shards", tmp_path), batch_size=1) as loader:
        assert {next(loader).keys[0] for _ in range(8)} == {"0000", "0001"}
        assert loader.skipped == {"broken shard": 1}


def test_broken_samples_are_left_out_and_counted_once(tmp_path: Path) -> None:
    good = encoded(picture(1))
    files = {"a.jpg": encoded(picture(0), "JPEG"), "a.txt": b"good"}
    files |= {"b.png": b"no picture", "b.txt": b"text", "c.png": good, "c.txt": b" ", "d.png": good}
    files |= {"e.txt": b"text", "f.png": encoded(picture(0, 1, 1)), "f.txt": b"text", "g.png": good, "g.json": b"["}
    files |= {
        "h.png": good,
        "h.json": b'{"caption": "from json"}',
        "i.PNG": good,
        "i.cls": b"3",
        "i.txt": b"upper case",
    }
    write_tar(tmp_path / "a.tar", files)
    with make_loader(settings("shards", tmp_path, workers=1), batch_size=3) as loader:
        batches = list(islice(loader, 4))
    assert all(sorted(batch.captions) == ["from json", "good", "upper case"] for batch in batches)
    counts = {"unreadable picture": 1, "empty caption": 1, "no caption": 1, "no picture": 1, "picture too small": 1}
    assert loader.skipped == counts | {"unreadable caption": 1}


def test_a_name_that_comes_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (("a.txt", b"one"), ("a.txt", b"two"), ("a.png", encoded(picture(0)))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with make_loader(settings("shards", path), batch_size=1) as loader:
        assert next(loader).captions == ["one"]
        next(loader)
        assert loader.skipped == {"duplicate name": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_usable_stops_with_the_reasons(tmp_path: Path, workers: int) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": b"no picture", "a.txt": b"text"})
    write_tar(tmp_path / "b.tar", {"b.png": b"no picture", "b.txt": b"text"})
    with make_loader(settings("shards", tmp_path, workers=workers), batch_size=1) as loader:
        with pytest.raises(ValueError, match="nothing in 2 shards can be used: .* x unreadable picture"):
            next(loader)


def test_without_captions(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": encoded(picture(1)), "b.png": encoded(picture(2))})
    with make_loader(settings("shards", tmp_path), batch_size=2, captions=False) as loader:
        batch = next(loader)
    assert sorted(batch.keys) == ["a", "b"] and batch.captions == ["", ""] and not loader.skipped


def test_commands_and_compression(tmp_path: Path) -> None:
    path = make_shards(tmp_path, [3]) / "000.tar"
    (tmp_path / "000.tgz").write_bytes(gzip.compress(path.read_bytes()))
    for name in (f"pipe:cat {path}", f"{tmp_path}/000.tgz", f"pipe:gunzip -c {tmp_path}/000.tgz", f"file:{path}"):
        told: list[Skip] = []
        assert len(list(tar_files.read_samples(name, told.append))) == 3 and told == [], name


@pytest.mark.parametrize(
    "command", ["cat {0}; exit 3", "cat {0}; exec >&-; sleep 0.2; exit 3", "head -c 2000 {0}", "exit 3"]
)
def test_a_command_that_fails_is_told(tmp_path: Path, command: str) -> None:
    path = make_shards(tmp_path, [3]) / "000.tar"
    told: list[Skip] = []
    list(tar_files.read_samples(f"pipe:{command.format(path)}", told.append))
    assert [skip.reason for skip in told] == ["broken shard"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset streams through curl")
def test_shards_are_streamed_over_http(tmp_path: Path) -> None:
    make_shards(tmp_path, [3, 2])

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/{{000..002}}.tar"
        with make_loader(settings("shards", url), batch_size=5) as loader:
            keys = next(loader).keys + next(loader).keys
    finally:
        server.shutdown()
        server.server_close()
    assert Counter(keys) == {f"{i:04d}": 2 for i in range(5)} and sum(loader.skipped.values()) == 1  # 002 is missing


def test_ways_to_name_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [str(path) for path in sorted(make_shards(tmp_path / "a[1]", [1, 1, 1]).iterdir())]
    assert expand_shards(str(tmp_path / "a[1]")) == names
    make_shards(tmp_path, [1, 1, 1])
    names = [f"{tmp_path}/{i:03d}.tar" for i in range(3)]
    assert expand_shards(f"{tmp_path}/*.tar") == names
    assert expand_shards(f"{tmp_path}/{{000..002}}.tar") == names
    assert expand_shards(names[2]) == names[2:]
    assert expand_shards("https://host/{1,2}.tar::pipe:cat x{3..4}") == [
        "https://host/1.tar",
        "https://host/2.tar",
        "pipe:cat x3",
        "pipe:cat x4",
    ]
    monkeypatch.setenv("WDS_ROOT", str(tmp_path))
    assert expand_shards("${ROOT}/001.tar") == names[1:2]


@pytest.mark.parametrize("path", ["", "/no/such.tar", "/no/*.tar", "${UNSET}/a.tar", "/tmp/{000..2.tar"])
def test_shards_that_are_not_there(path: str) -> None:
    with pytest.raises(ValueError, match="data.path"):
        expand_shards(path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no shard"):
        make_loader(settings("shards", tmp_path), batch_size=1)


def test_positions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    make_shards(tmp_path / "a", [4, 4])
    make_shards(tmp_path / "b", [4, 4])
    data = settings("shards", tmp_path / "a", workers=2)
    position = take(make_loader(data, batch_size=2), 1)[0].position
    cases = [
        (settings("shards", tmp_path / "b", workers=2), {}, position, "position has shards"),
        (data, {"seed": 1}, position, "position has shards"),
        (data, {"world_size": 2}, position, "position has world_size 1, now it is 2"),
        (settings("shards", tmp_path / "a", workers=3), {}, position, "data.workers 2, now there are 3"),
        (settings("folder", tmp_path / "a"), {}, position, "position is of data.kind 'shards'"),
        (data, {}, {**position, "places": "x"}, "position must have places"),
        (data, {}, {**position, "turn": 2}, "position must have places"),
        (data, {}, {**position, "places": [{"epoch": -1}] * 2}, "a place in tar shards has"),
        (data, {"start_step": 3}, None, "position must be given with tar shards"),
    ]
    for given, arguments, where, message in cases:
        with pytest.raises(ValueError, match=message):
            make_loader(given, batch_size=2, position=where, **arguments)


def test_without_webdataset_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_shards(tmp_path, [1]) / "000.tar"
    monkeypatch.setitem(__import__("sys").modules, "webdataset", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[train\]'"):
        make_loader(settings("shards", path), batch_size=1)

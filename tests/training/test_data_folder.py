"""A folder of pictures: captions, order, and what happens to files that cannot be used."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from dcar_fast.training.data.folder import FolderSource
from dcar_fast.training.data.loader import make_loader
from tests.training.data_files import make_folder, picture, settings


def keys(source: FolderSource, indices: range) -> list[str]:
    return [source.example(i).key for i in indices]


def write_metadata(folder: Path, rows: list[dict]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_epoch_has_every_picture_in_another_order(tmp_path: Path) -> None:
    source = FolderSource(make_folder(tmp_path, 12), 16, seed=3)
    epochs = [keys(source, range(12 * e, 12 * e + 12)) for e in range(3)]
    assert all(sorted(epoch) == [f"{i:03d}.png" for i in range(12)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert keys(FolderSource(tmp_path, 16, seed=4), range(12)) != epochs[0]


def test_an_example_depends_on_seed_and_index_alone(tmp_path: Path) -> None:
    make_folder(tmp_path, 7)
    arguments = {"seed": 5, "random_crop": True, "flip": True}
    forwards = FolderSource(tmp_path, 16, **arguments)
    backwards = pickle.loads(pickle.dumps(FolderSource(tmp_path, 16, **arguments)))
    first = {i: forwards.example(i) for i in range(30)}
    second = {i: backwards.example(i) for i in reversed(range(30))}
    for i in first:
        assert first[i].key == second[i].key and np.array_equal(first[i].image, second[i].image), i
    offsets = {first[i].image[0, :, 0].tobytes() for i in first if first[i].key == first[0].key}
    assert len(offsets) > 1  # another crop in another epoch


def test_picture_and_caption_belong_together(tmp_path: Path) -> None:
    source = FolderSource(make_folder(tmp_path, 5), 16)
    for i in range(5):
        example = source.example(i)
        number = int(example.image[8, 8, 0])
        assert (example.key, example.caption) == (f"{number:03d}.png", f"picture {number}")
        assert example.image.shape == (16, 16, 3) and example.image.dtype == np.uint8


@pytest.mark.parametrize("field", ["text", "caption", "prompt"])
def test_captions_from_metadata(tmp_path: Path, field: str) -> None:
    (tmp_path / "train").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / "train" / f"{i}.png")
    picture(9).save(tmp_path / "not-listed.png")
    write_metadata(tmp_path, [{"file_name": f"train/{i}.png", field: f" a\n b {i}", "seed": i} for i in range(3)])
    source = FolderSource(tmp_path, 16)
    found = {example.key: example.caption for example in map(source.example, range(3))}
    assert found == {f"train/{i}.png": f"a b {i}" for i in range(3)}


def test_without_captions_every_picture_counts(tmp_path: Path) -> None:
    write_metadata(make_folder(tmp_path, 2), [{"file_name": "000.png", "text": "zero"}])
    picture(7).save(tmp_path / "a.jpg")
    source = FolderSource(tmp_path, 16, captions=False)
    assert sorted(keys(source, range(3))) == ["000.png", "001.png", "a.jpg"]
    assert source.example(0).caption == ""


def broken_folder(folder: Path) -> Path:
    """Five good pictures, and one of every kind that is not."""
    make_folder(folder, 5)
    (folder / "corrupt.png").write_bytes(b"no picture")
    picture(40, 1, 1).save(folder / "tiny.png")
    picture(41).save(folder / "empty.png")
    (folder / "empty.txt").write_text(" \n")
    picture(42).save(folder / "none.png")
    picture(43).save(folder / "binary.png")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\xff")
    for name in ("corrupt", "tiny"):
        (folder / f"{name}.txt").write_text("what could be seen")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


WHY = {
    "unreadable picture": 1,
    "picture too small": 1,
    "empty caption": 1,
    "no caption": 1,
    "unreadable caption": 1,
}


def test_what_cannot_be_used_is_replaced_and_told_once(tmp_path: Path) -> None:
    source = FolderSource(broken_folder(tmp_path), 16, seed=1)
    epochs = [keys(source, range(10 * e, 10 * e + 10)) for e in range(4)]
    for epoch in epochs:
        assert set(epoch) == {f"{i:03d}.png" for i in range(5)}
    skips = source.take_skips()
    assert Counter(skip.reason for skip in skips) == WHY and source.take_skips() == []
    assert {Path(skip.name).stem for skip in skips} == {"corrupt", "tiny", "empty", "none", "binary"}
    # whoever begins elsewhere meets the same replacements
    later = FolderSource(tmp_path, 16, seed=1)
    assert keys(later, range(20, 40)) == epochs[2] + epochs[3]


def test_the_replacement_is_the_next_good_one_of_the_epoch(tmp_path: Path) -> None:
    make_folder(tmp_path, 6)
    before = keys(FolderSource(tmp_path, 16), range(6))
    (tmp_path / before[2]).write_bytes(b"")
    (tmp_path / before[5]).write_bytes(b"")
    assert keys(FolderSource(tmp_path, 16), range(6)) == [*before[:2], before[3], *before[3:5], before[0]]


def test_metadata_with_gaps(tmp_path: Path) -> None:
    make_folder(tmp_path, 2)
    rows = [{"file_name": "000.png", "text": "zero"}, {"file_name": "001.png", "text": "  "}]
    rows += [{"file_name": "gone.png", "text": "gone"}, {"file_name": "null.png", "text": None}]
    rows += [{"file_name": "silent.png"}, {"file_name": "000.png", "text": "again"}]
    write_metadata(tmp_path, rows)
    source = FolderSource(tmp_path, 16)
    assert set(keys(source, range(8))) == {"000.png"}
    reasons = {Path(skip.name).name: skip.reason for skip in source.take_skips()}
    assert reasons == {
        "001.png": "empty caption",
        "gone.png": "unreadable file",
        "null.png": "no caption",
        "silent.png": "no caption",
        "metadata.jsonl, line 6": "duplicate name",
    }
    assert source.example(0).caption == "zero"  # the first line counts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", 'line 2 must be an object with a string "file_name"'),
        ('{"text": "a"}', 'line 2 must be an object with a string "file_name"'),
        ('{"file_name": "../a.png", "text": "a"}', "line 2: file_name must lie in the folder"),
        ('{"file_name": "/a.png", "text": "a"}', "line 2: file_name must lie in the folder"),
        ('{"file_name": "a.png", "text": 3}', "line 2: 'text' must be a string, got 3"),
    ],
)
def test_malformed_metadata_is_refused(tmp_path: Path, line: str, message: str) -> None:
    make_folder(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "zero"}\n' + line)
    with pytest.raises(ValueError, match=message):
        FolderSource(tmp_path, 16)


def test_folders_without_anything_usable_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a folder of pictures"):
        FolderSource(tmp_path / "missing", 16)
    with pytest.raises(ValueError, match="has no pictures that can be used"):
        FolderSource(tmp_path, 16)
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    source = FolderSource(tmp_path, 16, captions=False)
    for _ in range(2):  # the reasons are known the second time too
        with pytest.raises(ValueError, match="none of the 3 pictures .* can be used: 3 x unreadable picture"):
            source.example(0)
    write_metadata(tmp_path, [{"file_name": "0.png", "text": ""}])
    with pytest.raises(ValueError, match="can be used: 1 x empty caption"):
        FolderSource(tmp_path, 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_and_the_main_process_knows(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = settings("folder", broken_folder(tmp_path), workers=workers)
    with make_loader(data, batch_size=4) as loader:
        batches = list(islice(loader, 20))
    assert all(len(batch.keys) == 4 and all(batch.captions) for batch in batches)
    assert loader.skipped == WHY
    messages = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(messages) == 5 and any("tiny.png is left out: picture too small (1 x 1" in text for text in messages)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_usable_stops_with_the_reasons(tmp_path: Path, workers: int) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    data = settings("folder", tmp_path, workers=workers)
    with make_loader(data, batch_size=1, captions=False) as loader, pytest.raises(ValueError, match="1 x unreadable"):
        next(loader)

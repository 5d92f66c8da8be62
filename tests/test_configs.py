"""The table of configurations: what is picked for a size and a GPU, and the files of tuned ones."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path

import pytest
import torch

from dcar_fast.kernels import configs
from dcar_fast.kernels.configs import Config, Rule, Table

SMALL, WIDE, OTHER = (Config({"BLOCK": block}, num_warps=4) for block in (16, 64, 128))
CPU = torch.device("cpu")


def table(name: str = "fake") -> Table:
    return Table(
        name,
        shipped={
            "datacenter": (Rule({"rows": 100, "channels": 32}, SMALL), Rule({"channels": 32}, WIDE), Rule({}, OTHER)),
            "consumer": (Rule({}, SMALL),),
            "sm_80": (Rule({}, OTHER),),
        },
        candidates=(SMALL, WIDE),
        scaling=("rows",),
    )


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """(what ships with the package, the user's cache), both empty."""
    monkeypatch.setattr(configs, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = tmp_path / "shipped", configs.cache_folder()
    for folder in found:
        folder.mkdir(parents=True)
    configs.forget()
    yield found
    configs.forget()


def put(folder: Path, tables: dict, gpu: str = "cpu") -> Path:
    path = folder / f"{gpu}.json"
    path.write_text(json.dumps({"tables": tables}))
    configs.forget()
    return path


def entry(config: Config, **sizes: int) -> dict:
    return {"sizes": sizes, "blocks": dict(config.blocks), **config.options}


@pytest.mark.parametrize(
    ("capability", "sizes", "wanted"),
    [
        (90, {"rows": 100, "channels": 32}, SMALL),
        (90, {"rows": 101, "channels": 32}, WIDE),
        (90, {"rows": 100, "channels": 33}, OTHER),
        (100, {"rows": 1, "channels": 1}, SMALL),
        (89, {"rows": 10**6, "channels": 10**6}, SMALL),
        (120, {"rows": 101, "channels": 32}, SMALL),
        (80, {"rows": 1, "channels": 1}, OTHER),
    ],
)
def test_the_first_rule_that_fits_ships(capability: int, sizes: dict, wanted: Config) -> None:
    assert table().ship(capability, **sizes) == wanted


def test_classes_of_gpus() -> None:
    """Blocks with 99 KiB or less are a consumer's; so is a GPU that nobody listed."""
    assert {c: configs.gpu_class(c) for c in (80, 90, 100, 103)} == dict.fromkeys((80, 90, 100, 103), "datacenter")
    assert {c: configs.gpu_class(c) for c in (86, 89, 120, 75, 999)} == dict.fromkeys(
        (86, 89, 120, 75, 999), "consumer"
    )


def test_what_the_offline_compiler_builds() -> None:
    sizes = {"rows": 101, "channels": 32}
    assert table().configs(90, False, **sizes) == [WIDE]
    assert table().configs(90, True, **sizes) == [WIDE, SMALL]
    assert table().configs(80, True, **sizes) == [OTHER, SMALL, WIDE]


def test_buckets() -> None:
    buckets = {rows: dict(table().bucket({"rows": rows, "channels": 5}))["rows"] for rows in (0, 1, 2, 3, 4, 5, 4097)}
    assert buckets == {0: 1, 1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 4097: 8192}
    assert table().bucket({"rows": 3, "channels": 5}) == table().bucket({"channels": 5, "rows": 4})
    assert table().bucket({"rows": 3, "channels": 5}) != table().bucket({"rows": 3, "channels": 6})
    assert json.dumps(table().bucket({"guided": True})) == '[["guided", 1]]', "a file holds integers"


def test_launch_arguments() -> None:
    config = Config({"BLOCK_M": 64, "BLOCK_N": 32}, 8, 3)
    assert config.launch == {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3}
    assert str(config) == "64x32 w8 s3"


def test_tuned_comes_before_shipped_and_the_users_before_ours(folders) -> None:
    ours, users = folders
    sizes = {"rows": 300, "channels": 32}
    assert table().pick(CPU, **sizes) == WIDE
    put(ours, {"fake": [entry(SMALL, rows=512, channels=32)], "another": [entry(OTHER, rows=512, channels=32)]})
    assert table().pick(CPU, **sizes) == SMALL
    put(users, {"fake": [entry(OTHER, rows=512, channels=32)]})
    assert table().pick(CPU, **sizes) == OTHER
    assert table().pick(CPU, rows=513, channels=32) == WIDE, "the next bucket was not tuned"
    assert table().pick(CPU, rows=300, channels=31) == WIDE
    assert table("another").pick(CPU, **sizes) == OTHER, "ours still holds where the user's file says nothing"
    put(users, {"fake": [entry(OTHER, rows=512, channels=32)]}, gpu="nvidia-h200").rename(users / "nvidia-h200.json")
    (users / "cpu.json").unlink()
    configs.forget()
    assert table().pick(CPU, **sizes) == SMALL, "another GPU's file"


def test_a_table_remembers(folders) -> None:
    kept = table()
    assert kept.pick(CPU, rows=300, channels=32) == WIDE
    put(folders[1], {"fake": [entry(OTHER, rows=512, channels=32)]})
    assert kept.pick(CPU, rows=300, channels=32) == WIDE
    assert kept.pick(CPU, channels=300, rows=32) == OTHER, "the same numbers for other sizes are another launch"


def test_tiles_of_another_version_are_ignored_with_a_warning(folders, caplog: pytest.LogCaptureFixture) -> None:
    old = Config({"BLOCK_OLD": 8}, 4)
    put(folders[1], {"fake": [entry(old, rows=512, channels=32)]})
    with caplog.at_level(logging.WARNING):
        assert table().pick(CPU, rows=300, channels=32) == WIDE
    (record,) = caplog.records
    assert "fake: the tuned configuration {'BLOCK_OLD': 8} is ignored" in record.getMessage()


def test_round_trip(tmp_path: Path) -> None:
    tables = {
        "b": {(("rows", 4),): Config({"X": 1, "Y": 2}, 8, 3)},
        "a": {(("channels", 0), ("rows", 4)): SMALL, (("channels", 2), ("rows", 1)): WIDE},
    }
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"tables": configs.entries(tables), "gpu": "x", "more": [1]}))
    assert configs.read(path) == tables
    held = configs.entries(tables)
    held["a"][0]["date"] = "today"
    path.write_text(json.dumps({"tables": held}))
    assert configs.read(path) == tables, "keys of the tuner are not the table's business"


GOOD = entry(SMALL, rows=1)
BROKEN = {
    "empty": "",
    "cut": '{"tables": {"fake": [{"sizes": {"rows": 1',
    "list": "[]",
    "number": "3",
    "no tables": "{}",
    "tables is a list": '{"tables": []}',
    "entries are no list": '{"tables": {"fake": 3}}',
    "entry is no object": '{"tables": {"fake": ["x"]}}',
    "no warps": json.dumps({"tables": {"fake": [{k: v for k, v in GOOD.items() if k != "num_warps"}]}}),
    "text for a number": json.dumps({"tables": {"fake": [GOOD | {"num_stages": "2"}]}}),
    "half a warp": json.dumps({"tables": {"fake": [GOOD | {"num_warps": 0.5}]}}),
    "no warp": json.dumps({"tables": {"fake": [GOOD | {"num_warps": 0}]}}),
    "true": json.dumps({"tables": {"fake": [GOOD | {"blocks": {"BLOCK": True}}]}}),
    "negative size": json.dumps({"tables": {"fake": [GOOD | {"sizes": {"rows": -1}}]}}),
    "list as size": json.dumps({"tables": {"fake": [GOOD | {"sizes": {"rows": [1]}}]}}),
    "not text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(folders, name: str) -> None:
    path = folders[1] / "cpu.json"
    text = BROKEN[name]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    configs.forget()
    with pytest.raises(ValueError, match=f"^{path} is no file of tuned configurations .*delete it"):
        table().pick(CPU, rows=1, channels=1)


def test_a_folder_in_its_place(folders) -> None:
    (folders[1] / "cpu.json").mkdir()
    with pytest.raises(ValueError, match="cpu.json is no file of tuned configurations .IsADirectoryError"):
        table().pick(CPU, rows=1, channels=1)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert configs.cache_folder() == Path("/somewhere/dcar_fast/tuned")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert configs.cache_folder() == Path.home() / ".cache/dcar_fast/tuned"


def test_names_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configs.gpu_name(CPU) == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3 (MIG 1g.10gb)")
    assert configs.gpu_name(torch.device("cuda", 77)) == "nvidia-h100-80gb-hbm3-mig-1g-10gb"
    configs.gpu_name.cache_clear()


def test_cases_of_every_kernel() -> None:
    """Each case can be asked of its table on both classes of GPUs; labels are unique; nothing is allocated for it."""
    pytest.importorskip("triton", reason="triton is not installed")
    from dcar_fast.kernels.offline import kernel_names

    for op in kernel_names():
        cases = importlib.import_module(f"dcar_fast.kernels.{op}").cases()
        assert cases, f"{op} has no case for tuner and warm-up"
        labels = [(case.table.name, case.label) for case in cases]
        assert len(set(labels)) == len(labels), op
        for case in cases:
            assert case.table.name.partition(".")[0] == op
            assert set(case.table.scaling) <= set(case.sizes), f"{case.table.name} scales with what it is not asked"
            tiles = [case.table.ship(capability, **case.sizes) for capability in (80, 89, 90, 100, 120)]
            tiles += case.table.candidates
            assert len({frozenset(config.blocks) for config in tiles}) == 1, f"{case.table.name}: tiles differ in name"

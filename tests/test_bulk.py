"""Many prompts: jobs, ranks, files that are whole or not there, and results that depend on neither batch nor rank."""

import copy
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcar_fast import DCARPipeline
from dcar_fast.bulk.folder import fingerprint
from dcar_fast.bulk.jobs import Job, make_jobs, read_jobs
from dcar_fast.bulk.ranks import Rank
from dcar_fast.images import save_png

PROMPTS = [
    "a red circle",
    "a blue square to the left of a green triangle, and a white background",
    "x",
    "a large yellow square above a small red circle",
    "two circles",
    "a green triangle to the right of everything else in this picture",
    "blue",
]
FILES = [f"{i:05d}.png" for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def pipeline():
    return DCARPipeline.from_preset("shapes", seed=1)


@pytest.fixture
def drawn(monkeypatch):
    """The prompts of every batch that is drawn."""
    batches = []
    encode = DCARPipeline.encode_text

    def spy(self, prompts):
        batches.append(list(prompts))
        return encode(self, prompts)

    monkeypatch.setattr(DCARPipeline, "encode_text", spy)
    return batches


def generate(pipeline, folder, prompts=PROMPTS, **options):
    return pipeline.generate_to(folder, prompts, **{"seed": 7, "num_steps": 2, "progress": False, **options})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_same_run(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    """The same files; ids are the same, but pixels may be rounded to another level where batches differ."""
    assert one.keys() == other.keys() and one["metadata.jsonl"] == other["metadata.jsonl"]
    for name in one.keys() - {"metadata.jsonl"}:
        a, b = (Image.open(BytesIO(files[name])) for files in (one, other))
        assert a.info == b.info
        assert np.abs(np.array(a).astype(int) - np.array(b)).max() <= 1


# ---- jobs


def test_jobs_get_seeds_and_names():
    assert make_jobs(["a", "b"], 5) == [Job("a", 5, "00000.png"), Job("b", 6, "00001.png")]
    assert make_jobs(["a", "b"], [9, 3], ["cat", None]) == [Job("a", 9, "cat.png"), Job("b", 3, "00001.png")]
    assert make_jobs(["a"], np.int64(1), ["b.PNG"]) == [Job("a", 1, "b.PNG")]
    assert make_jobs(["p"] * 100_001)[-1].file_name == "100000.png"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([],), "got an empty list"),
        (("text",), "prompts must be a list of strings, got str"),
        ((["a", None],), r"prompts\[1\] must be a string"),
        ((["a"], None), "seed must be given"),
        ((["a"], -1), "0 <= seed < 2\\^63, got -1"),
        ((["a", "b"], 2**63 - 1), "0 <= seed < 2\\^63"),
        ((["a", "b"], [1]), "1 seeds came for 2 prompts"),
        ((["a"], 0, "b"), "names must be a list of file names, got str"),
        ((["a"], 0, []), "0 names came for 1 prompts"),
        ((["a"], 0, ["a/b"]), r"names\[0\] must be a plain file name of at most 200 bytes without folder, got 'a/b'"),
        ((["a"], 0, [".."]), r"names\[0\] must be"),
        ((["a"], 0, [""]), r"names\[0\] must be"),
        ((["a"], 0, ["a\nb"]), r"names\[0\] must be"),
        ((["a"], 0, ["é" * 101]), r"names\[0\] must be"),
        ((["a"], 0, [3]), r"names\[0\] must be"),
        ((["a", "b", "c"], 0, ["x", "y", "X.png"]), "names must differ: prompts 0 and 2 both go to X.png"),
        ((["a", "b"], 0, ["00001", None]), "names must differ: prompts 0 and 1 both go to 00001.png"),
    ],
)
def test_bad_jobs(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_jobs(*arguments)


def test_prompt_files(tmp_path):
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_bytes("\ufeffa cat\r\nein Bär, 猫\u2028 still the same line".encode())
    assert read_jobs(text, 3) == [
        Job("a cat", 3, "00000.png"),
        Job("ein Bär, 猫\u2028 still the same line", 4, "00001.png"),
    ]
    lines.write_text('{"prompt": "a"}\n{"prompt": "b", "seed": 40, "name": "bear"}\n{"prompt": "c"}\n')
    assert read_jobs(lines, 3) == [Job("a", 3, "00000.png"), Job("b", 40, "bear.png"), Job("c", 5, "00002.png")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", b"", "p.txt is empty"),
        ("p.txt", b"a\n \nb\n", "p.txt, line 2 is empty, every line must hold a prompt"),
        ("p.txt", b"a\n\n", "p.txt, line 2 is empty"),
        ("p.txt", b"\xff\xfe", "p.txt cannot be read: .*utf-8"),
        ("p.jsonl", b"\n", "p.jsonl, line 1 is empty"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', "p.jsonl, line 2 is no JSON"),
        ("p.jsonl", b'["a"]', 'p.jsonl, line 1 must be an object with a string "prompt"'),
        ("p.jsonl", b'{"prompt": 1}', "line 1 must be an object"),
        ("p.jsonl", b'{"prompt": " "}', "line 1 has an empty prompt"),
        (
            "p.jsonl",
            b'{"prompt": "a", "sed": 1}',
            r"line 1: unknown field 'sed', allowed are \['prompt', 'seed'",
        ),
        ("p.jsonl", b'{"prompt": "a", "seed": "1"}', "line 1: .*0 <= seed"),
        ("p.jsonl", b'{"prompt": "a", "seed": null}', "line 1: .*0 <= seed"),
        ("p.jsonl", b'{"prompt": "a", "name": "../b"}', r"p.jsonl: names\[0\] must be a plain file name"),
        ("p.jsonl", b'{"prompt": "a", "name": "b"}\n{"prompt": "c", "name": "b"}', "p.jsonl: names must differ"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_jobs(tmp_path / name)


def test_missing_prompt_files(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            read_jobs(path)


# ---- ranks


def test_rank_of_the_environment():
    assert Rank.from_environment({}) == Rank(0, 1, 0)
    assert Rank.from_environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Rank(5, 8, 1)


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, so RANK must be an integer, got None"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE must be an integer, got 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK must be an integer"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "index must be 0..count - 1"),
        ({"WORLD_SIZE": "0", "RANK": "0", "LOCAL_RANK": "0"}, "index must be 0..count - 1"),
    ],
)
def test_bad_environments(environment, message):
    with pytest.raises(ValueError, match=message):
        Rank.from_environment(environment)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("items", [0, 1, 2, 13, 100])
def test_shares_are_balanced_and_together_everything(count, items):
    costs = list(range(items, 0, -1))
    shares = [Rank(i, count).share(costs) for i in range(count)]
    assert sorted(sum(shares, [])) == sorted(costs)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    whole = [sum(share) for share in shares]
    assert max(whole) - min(whole) <= items, "by no more than the longest item"
    if items % (2 * count) == 0:
        assert max(whole) == min(whole), "dealt back and forth"
    assert all(share == sorted(share, reverse=True) for share in shares)


@pytest.mark.parametrize(
    "rank, name, gpu, expected",
    [
        (Rank(), "auto", False, "cpu"),
        (Rank(), "auto", True, "cuda"),
        (Rank(), "cuda", True, "cuda"),
        (Rank(5, 8, 1), "auto", True, "cuda:1"),
        (Rank(5, 8, 1), "cuda", True, "cuda:1"),
        (Rank(5, 8, 1), "cuda:0", True, "cuda:0"),
        (Rank(5, 8, 1), "auto", False, "cpu"),
        (Rank(5, 8, 1), "cpu", True, "cpu"),
    ],
)
def test_devices_of_ranks(rank, name, gpu, expected):
    assert rank.device(name, gpu) == expected


# ---- a run


def test_files_metadata_and_order(pipeline, tmp_path, drawn):
    report = generate(pipeline, tmp_path / "new" / "out", batch_size=3)
    folder = report.folder
    assert sorted(contents(folder)) == [*FILES, "metadata.jsonl"]
    assert (report.total, report.share, report.made, report.found, report.complete) == (7, 7, 7, 0, True)
    assert report.seconds > 0 and report.images_per_second == 7 / report.seconds
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == FILES and [row["prompt"] for row in rows] == PROMPTS
    assert [row["seed"] for row in rows] == list(range(7, 14)) and len(rows[0]) == 3
    for row in rows:
        with Image.open(folder / row["file_name"]) as image:
            assert image.size == (64, 64) and image.info["prompt"] == row["prompt"]
            assert image.info["seed"] == str(row["seed"]) and json.loads(image.info["settings"])["num_steps"] == 2
    by_length = sorted(PROMPTS, key=len, reverse=True)
    assert drawn == [by_length[:3], by_length[3:6], by_length[6:]], "prompts of about equal length share a batch"


def test_an_image_depends_on_prompt_and_seed_alone(pipeline, tmp_path, monkeypatch):
    """Bit-equal ids whatever the batches and the ranks, and the ids that the pipeline itself draws."""
    found = []
    make = DCARPipeline.generate

    def spy(self, text, noise, *args, **options):
        sample = make(self, text, noise, *args, **options)
        found[-1].update(zip(noise, sample.ids.tolist(), strict=True))
        return sample

    monkeypatch.setattr(DCARPipeline, "generate", spy)
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 100}):
        found.append({})
        generate(pipeline, tmp_path / str(len(found)), **options)
    found.append({})
    for index in range(3):
        generate(pipeline, tmp_path / "ranks", batch_size=2, rank=Rank(index, 3))
    found.append({})
    pipeline(PROMPTS, seed=7, num_steps=2, progress=False)
    assert len(found[0]) == len(PROMPTS) and len({tuple(ids) for ids in found[0].values()}) == len(PROMPTS)
    assert all(other == found[0] for other in found[1:])


def test_a_second_run_draws_what_is_missing_or_damaged(pipeline, tmp_path, drawn, caplog):
    generate(pipeline, tmp_path)
    before = contents(tmp_path)
    drawn.clear()
    assert generate(pipeline, tmp_path).made == 0 and not drawn
    (tmp_path / FILES[0]).unlink()
    (tmp_path / FILES[2]).write_bytes(before[FILES[2]][:-5])  # the header is whole, the end is not
    (tmp_path / FILES[4]).write_bytes(b"")
    spoilt = bytearray(before[FILES[6]])
    spoilt[len(spoilt) // 2] ^= 1
    (tmp_path / FILES[6]).write_bytes(spoilt)
    with caplog.at_level(logging.WARNING):
        report = generate(pipeline, tmp_path, batch_size=2)
    assert (report.made, report.found) == (4, 3)
    assert sorted(sum(drawn, [])) == sorted(PROMPTS[i] for i in (0, 2, 4, 6))
    check_same_run(contents(tmp_path), before)
    damaged = [r.getMessage() for r in caplog.records if "is damaged and counts as missing" in r.getMessage()]
    assert len(damaged) == 3


def test_more_prompts_later(pipeline, tmp_path):
    generate(pipeline, tmp_path, PROMPTS[:4])
    assert generate(pipeline, tmp_path).made == 3
    assert len((tmp_path / "metadata.jsonl").read_text().splitlines()) == 7


OTHERS = [
    ({"prompts": ["other", PROMPTS[1]]}, "its prompt is 'a red circle', this run's is 'other'"),
    ({"seed": 8}, "its seed is '7', this run's is '8'"),
    ({"num_steps": 3}, "its num_steps is 2, this run's is 3"),
    ({"temperature": 1.0}, "its temperature is 1.5, this run's is 1.0"),
    ({"height": 128}, "its height is 64, this run's is 128"),
]


@pytest.mark.parametrize("change, message", OTHERS, ids=[list(change)[0] for change, _ in OTHERS])
def test_images_of_another_run_are_in_the_way(pipeline, tmp_path, drawn, change, message):
    change = {"prompts": PROMPTS[:2], **change}
    generate(pipeline, tmp_path, PROMPTS[:2])
    before = contents(tmp_path)
    drawn.clear()
    with pytest.raises(ValueError, match=f"00000.png is in the way: {message}; choose another folder, or overwrite"):
        generate(pipeline, tmp_path, **change)
    assert not drawn and contents(tmp_path) == before
    report = generate(pipeline, tmp_path, **change, overwrite=True)
    assert report.made == 2 and report.complete
    assert generate(pipeline, tmp_path, **change).made == 0


def test_images_of_another_model_are_in_the_way(pipeline, tmp_path):
    generate(pipeline, tmp_path, PROMPTS[:1])
    with pytest.raises(ValueError, match="its model is '[0-9a-f]{16}', this run's is"):
        generate(DCARPipeline.from_preset("shapes", seed=2), tmp_path, PROMPTS[:1])
    again = DCARPipeline.from_preset("shapes", seed=1, engine="reference")
    assert generate(again, tmp_path, PROMPTS[:1]).made == 0, "the same weights, whatever the engine"
    changed = again.text_encoder.t5.shared.weight
    models = [again.tokenizer, again.generator, again.text_encoder]
    old = fingerprint(models)
    with torch.no_grad():
        changed.mul_(1.001)
    assert fingerprint(models) != old


def test_foreign_files_are_in_the_way(pipeline, tmp_path, drawn):
    picture = Image.new("RGB", (64, 64))
    foreign = {"PNG": picture, "JPEG": picture}
    for kind, image in foreign.items():
        image.save(tmp_path / FILES[3], format=kind)
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=f"00003.png is in the way: this {kind} comes from elsewhere"):
            generate(pipeline, tmp_path)
        assert contents(tmp_path) == before
    (tmp_path / FILES[3]).unlink()
    (tmp_path / FILES[3]).mkdir()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="00003.png .*directory"):
            generate(pipeline, tmp_path, overwrite=overwrite)
    assert not drawn


def test_an_interrupted_run_leaves_whole_files_and_goes_on(pipeline, tmp_path, monkeypatch):
    generate(pipeline, tmp_path / "whole", batch_size=2)
    decode, calls = DCARPipeline.decode, []

    def interrupted(self, sample, grid):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(self, sample, grid)

    monkeypatch.setattr(DCARPipeline, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, tmp_path / "parts", batch_size=2)
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert len(parts) == 4 and parts.items() <= whole.items(), "two batches, no temporary file, no metadata"
    assert generate(pipeline, tmp_path / "parts", batch_size=2).made == 3
    assert contents(tmp_path / "parts") == whole


def test_a_full_disk_is_reported(pipeline, tmp_path, monkeypatch):
    def full(image, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dcar_fast.bulk.folder.save_png", full)
    with pytest.raises(ValueError, match=r"0000\d.png cannot be written: No space left on device"):
        generate(pipeline, tmp_path, batch_size=2)
    assert not contents(tmp_path)


def test_a_write_that_fails_ends_the_run(pipeline, tmp_path, monkeypatch, drawn):
    def full_once(image, path):
        if path.name == FILES[1]:  # of the first batch
            raise OSError(28, "No space left on device")
        save_png(image, path)

    monkeypatch.setattr("dcar_fast.bulk.folder.save_png", full_once)
    with pytest.raises(ValueError, match="00001.png cannot be written: No space left on device"):
        generate(pipeline, tmp_path, batch_size=1)
    assert len(drawn) <= 2
    left = contents(tmp_path)
    assert FILES[1] not in left and "metadata.jsonl" not in left


def test_images_do_not_stay_in_memory(pipeline, tmp_path, monkeypatch):
    """Two batches at most: the one that is drawn and the one that is written, however slow writing is."""
    made, most, third, early = [], [], threading.Event(), []
    make = DCARPipeline._to_images

    def spy(self, *args):
        images = make(self, *args)
        made.extend(weakref.ref(image) for image in images)
        most.append(sum(image() is not None for image in made))
        if len(most) == 3:
            third.set()
        return images

    def slow(image, path):
        if len(early) < 2:  # the first batch
            early.append(third.wait(2.0))
        save_png(image, path)

    monkeypatch.setattr(DCARPipeline, "_to_images", spy)
    monkeypatch.setattr("dcar_fast.bulk.folder.save_png", slow)
    generate(pipeline, tmp_path, ["p"] * 12, num_steps=1, batch_size=2)
    assert len(most) == 6 and max(most) <= 4
    assert early == [False, False], "the third batch was drawn before the first was written"


BAD = [
    ({"prompts": []}, "empty list"),
    ({"prompts": ["a", 1]}, r"prompts\[1\] must be a string"),
    ({"seed": None}, "seed must be given"),
    ({"names": ["a"]}, "1 names came for 7 prompts"),
    ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
    ({"batch_size": True}, "batch_size must be a positive integer"),
    ({"num_steps": 0}, "num_steps must be 1..256"),
    ({"height": 500}, "height must be a multiple of 8"),
    ({"folder": "/proc/nowhere"}, "/proc/nowhere/metadata.jsonl cannot be written"),
    ({"folder": __file__}, "cannot be written: (File exists|Not a directory)"),
]


@pytest.mark.parametrize("change, message", BAD, ids=range(len(BAD)))
def test_bad_input_before_any_work(pipeline, tmp_path, drawn, change, message):
    options = {"folder": tmp_path / "out", **change}
    with pytest.raises(ValueError, match=message):
        generate(pipeline, options.pop("folder"), **options)
    assert not drawn and not list(tmp_path.glob("out/*"))


# ---- several processes


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_last_rank_writes_the_metadata(pipeline, tmp_path, overwrite):
    generate(pipeline, tmp_path / "one")
    if overwrite:
        generate(pipeline, tmp_path / "three", seed=1)
        (tmp_path / "three" / "metadata.jsonl").unlink()
    for index in (2, 0, 1):
        report = generate(pipeline, tmp_path / "three", rank=Rank(index, 3), overwrite=overwrite)
        assert report.complete == (tmp_path / "three" / "metadata.jsonl").exists() == (index == 1)
        assert report.share == report.made == (3 if index == 0 else 2) and report.total == 7
    check_same_run(contents(tmp_path / "three"), contents(tmp_path / "one"))


def command(tmp_path, *args):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return ["-m", "dcar_fast", "generate", str(tmp_path / "prompts.txt"), "--num-steps", "2", "--device", "cpu", *args]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1])])}


def test_two_processes_of_torchrun(tmp_path):
    pytest.importorskip("tyro", reason="the command line needs it")
    single, double = tmp_path / "single", tmp_path / "double"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    runs = [
        subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in (
            [sys.executable, *command(tmp_path, "-o", str(single))],
            [*torchrun, *command(tmp_path, "-o", str(double), "--batch-size", "2")],
        )
    ]
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
    assert "rank 0 of 2: wrote 3 images" in out and "rank 1 of 2: wrote 4 images" in out
    check_same_run(contents(single), contents(double))
    assert len(contents(double)) == 8


def test_ctrl_c_leaves_whole_files_only(tmp_path):
    pytest.importorskip("tyro", reason="the command line needs it")
    runs = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / number.name
        line = [sys.executable, *command(tmp_path, "-o", str(folder), "--batch-size", "1", "--num-steps", "256")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        runs[number] = folder, subprocess.Popen(line, env=ENVIRONMENT, text=True, **pipes)
    waiting, deadline = dict(runs), time.monotonic() + 100
    while waiting:
        assert time.monotonic() < deadline
        for number, (folder, run) in list(waiting.items()):
            if list(folder.glob("0*.png")) or run.poll() is not None:
                run.send_signal(number)
                del waiting[number]
        time.sleep(0.01)
    for folder, run in runs.values():
        _, err = run.communicate(timeout=120)
        assert run.returncode == 130 and err.rstrip().endswith("dcar-fast: interrupted"), err
        left = contents(folder)
        assert 1 <= len(left) < len(PROMPTS) and set(left) <= set(FILES)
        for name in left:
            with Image.open(folder / name) as image:
                image.load()


@pytest.mark.gpu
def test_two_ranks_that_share_a_gpu(pipeline, tmp_path, monkeypatch):
    generate(pipeline, tmp_path / "cpu")
    gpu = copy.deepcopy(pipeline).to(Rank(1, 2, 0).device("auto", torch.cuda.is_available()))
    assert gpu.device == torch.device("cuda:0")
    for rank in range(2):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", 0)):
            monkeypatch.setenv(name, str(value))
        assert generate(gpu, tmp_path / "gpu").complete == (rank == 1)
    cpu, gpu = contents(tmp_path / "cpu"), contents(tmp_path / "gpu")
    assert cpu.keys() == gpu.keys() and cpu["metadata.jsonl"] == gpu["metadata.jsonl"]
    for name in FILES:
        a, b = (Image.open(BytesIO(files[name])) for files in (cpu, gpu))
        assert a.info == b.info, "weights look the same on every device"
        assert np.abs(np.array(a).astype(int) - np.array(b)).mean() < 1  # convolutions may round to TF32 there

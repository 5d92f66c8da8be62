"""The command line, called in process; one test runs the installed command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcar_fast import DCARPipeline
from dcar_fast.cli import main
from dcar_fast.config import SamplingConfig

SIZE = (64, 64)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "in.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return path


def test_sample_writes_prompt_seed_and_settings(tmp_path, capsys):
    out = tmp_path / "new folder" / "a.png"
    assert main(["sample", "a red circle", "-o", str(out), "--seed", "3", "--num-steps", "2"]) == 0
    captured = capsys.readouterr()
    assert f"wrote {out}" in captured.out
    with Image.open(out) as image:
        assert image.size == SIZE
        assert image.text["prompt"] == "a red circle" and image.text["seed"] == "3"
        assert json.loads(image.text["settings"])["num_steps"] == 2


def test_several_prompts_are_numbered_and_reproducible(tmp_path):
    out = tmp_path / "a.png"
    assert main(["sample", "one", "two", "-o", str(out), "--seed", "5", "--num-steps", "2"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-0.png", "a-1.png"]
    assert main(["sample", "two", "-o", str(out), "--seed", "6", "--num-steps", "2"]) == 0
    second, alone = (np.array(Image.open(p)).astype(int) for p in (tmp_path / "a-1.png", out))
    assert np.abs(second - alone).max() <= 1


def test_flags_that_are_not_given_are_as_in_the_models_folder(tmp_path):
    pipeline = DCARPipeline.from_preset("shapes", seed=1)
    pipeline.sampling = SamplingConfig(num_steps=2, guidance_scale=1.25, anneal_softmax=False)
    pipeline.save_pretrained(tmp_path / "model")
    out = tmp_path / "a.png"
    for flags, expected in (
        ([], (2, 1.25, False)),
        (["--num-steps", "1", "--guidance-scale", "4.5", "--anneal-softmax", "True"], (1, 4.5, True)),
    ):
        assert main(["sample", "x", "--model", str(tmp_path / "model"), "-o", str(out), "--seed", "1", *flags]) == 0
        found = json.loads(Image.open(out).text["settings"])
        assert (found["num_steps"], found["guidance_scale"], found["anneal_softmax"]) == expected


def test_reconstruct_inpaint_variation(tmp_path, picture):
    mask = tmp_path / "mask.png"
    Image.new("L", SIZE, 255).save(mask)
    out = tmp_path / "out.png"
    common = ["-o", str(out), "--seed", "1", "--num-steps", "2"]
    for command in (
        ["reconstruct", str(picture), "-o", str(out)],
        ["reconstruct", str(picture), "--mode", "discrete", "-o", str(out)],
        ["inpaint", str(picture), str(mask), "a hole", *common],
        ["inpaint", str(picture), str(mask), "a hole", "--paste", *common],
        ["variation", str(picture), "other", "--strength", "0.3", *common],
    ):
        out.unlink(missing_ok=True)
        assert main(command) == 0
        assert Image.open(out).size == SIZE


def test_both_engines(tmp_path, picture):
    pixels = []
    for engine in ("fast", "reference"):
        out = tmp_path / f"{engine}.png"
        assert main(["reconstruct", str(picture), "-o", str(out), "--engine", engine]) == 0
        pixels.append(np.array(Image.open(out)).astype(int))
        assert main(["sample", "x", "-o", str(out), "--engine", engine, "--num-steps", "1", "--seed", "1"]) == 0
        assert Image.open(out).text["software"].endswith(f", {engine} engine")
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_generate_draws_a_file_of_prompts_and_resumes(tmp_path, capsys):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "new folder"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two", "seed": 40, "name": "second"}\n{"prompt": "three"}\n')
    args = ["generate", str(prompts), "-o", str(out), "--seed", "5", "--num-steps", "2", "--batch-size", "2"]
    assert main(args) == 0
    captured = capsys.readouterr()
    assert f"wrote 3 images to {out} in " in captured.out and "3/3 [" in captured.err and "images/s" in captured.err
    assert sorted(p.name for p in out.iterdir()) == ["00000.png", "00002.png", "metadata.jsonl", "second.png"]
    assert [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()] == [
        {"file_name": "00000.png", "prompt": "one", "seed": 5},
        {"file_name": "second.png", "prompt": "two", "seed": 40},
        {"file_name": "00002.png", "prompt": "three", "seed": 7},
    ]
    (out / "second.png").unlink()
    assert main(args) == 0
    assert "wrote 1 images" in (line := capsys.readouterr().out) and "2 were there" in line
    own = json.loads(Image.open(out / "second.png").text["settings"])["guidance_scale"]
    assert main([*args, "--guidance-scale", "7"]) == 2
    assert f"00000.png is in the way: its guidance_scale is {own}, this run's is 7.0" in capsys.readouterr().err
    assert main([*args, "--guidance-scale", "7", "--overwrite"]) == 0
    assert json.loads(Image.open(out / "second.png").text["settings"])["guidance_scale"] == 7
    alone = tmp_path / "alone.png"
    assert main(["sample", "three", "-o", str(alone), "--seed", "7", "--num-steps", "2", "--guidance-scale", "7"]) == 0
    assert np.abs(np.array(Image.open(alone)).astype(int) - np.array(Image.open(out / "00002.png"))).max() <= 1


def test_generate_checks_before_the_model_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dcar_fast.pipeline.DCARPipeline.from_preset", lambda *a, **k: pytest.fail("worked first"))
    good, empty, twice = tmp_path / "p.txt", tmp_path / "empty.txt", tmp_path / "twice.jsonl"
    good.write_text("a\n")
    empty.write_text("")
    twice.write_text('{"prompt": "a", "name": "x"}\n' * 2)
    out = str(tmp_path / "out")
    for args, message in (
        ([str(empty), "-o", out], "empty.txt is empty"),
        ([str(tmp_path / "none"), "-o", out], "none cannot be read: No such file"),
        ([str(twice), "-o", out], "names must differ: prompts 0 and 1 both go to x.png"),
        ([str(good), "-o", "/proc/nowhere"], "cannot be written"),
        ([str(good), "-o", str(empty)], "cannot be written"),
        ([str(good), "-o", out, "--batch-size", "0"], "batch_size must be a positive integer, got 0"),
        ([str(good), "-o", out, "--seed", "-1"], "0 <= seed < 2^63"),
        ([str(good), "-o", out, "--num-steps", "0"], "num_steps must be 1..256"),
        ([str(good), "-o", out, "--device", "cuda:99"], "device cuda:99 cannot be used"),
    ):
        assert main(["generate", *args]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["generate", str(good), "-o", out]) == 2
    assert "WORLD_SIZE is set, so RANK must be an integer" in capsys.readouterr().err


def test_saved_model_folder(tmp_path, picture):
    from dcar_fast import DCARPipeline

    DCARPipeline.from_preset("shapes", seed=9).save_pretrained(tmp_path / "model")
    out = tmp_path / "r.png"
    assert main(["reconstruct", str(picture), "--model", str(tmp_path / "model"), "-o", str(out)]) == 0
    assert out.exists()


def test_convert_reads_released_checkpoints(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    from tests import tiny_t5

    golden = Path(__file__).parent / "golden"
    for name in ("generator", "tokenizer"):
        tensors = load_file(golden / f"{name}.safetensors")
        state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
        save_file(state, tmp_path / f"{name}.safetensors")
        config = json.loads((golden / f"{name}.json").read_text())["config"]
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    tiny_t5.save(tmp_path / "t5")
    out = tmp_path / "model"
    args = ["convert", "--text-encoder", str(tmp_path / "t5"), "-o", str(out)]
    args += [x for n in ("generator", "tokenizer") for x in (f"--{n}", str(tmp_path / f"{n}.safetensors"))]
    assert main(args) == 2 and "config must be given" in capsys.readouterr().err
    args += [x for n in ("generator", "tokenizer") for x in (f"--{n}-config", str(tmp_path / f"{n}.json"))]
    assert main(args) == 0
    picture = tmp_path / "a.png"
    assert main(["sample", "a", "--model", str(out), "--num-steps", "3", "--seed", "0", "-o", str(picture)]) == 0
    with Image.open(picture) as image:
        assert image.size == (128, 128) and json.loads(image.text["settings"])["height"] == 128


def test_outputs_are_checked_before_the_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "a-1.png").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("dcar_fast.pipeline.DCARPipeline.from_preset", lambda *a, **k: pytest.fail("worked first"))
    assert main(["sample", "x", "y", "-o", str(tmp_path / "a.png")]) == 2
    assert "a-1.png is a folder" in capsys.readouterr().err
    assert main(["convert", "--generator", "g", "--tokenizer", "t", "-o", str(tmp_path / "file")]) == 2
    assert "is a file, the output is a folder" in capsys.readouterr().err


BAD = [
    (["sample", "x", "--height", "500", "--width", "512"], "height must be a multiple of 8"),
    (["sample", "x", "--guidance-scale", "nan"], "guidance_scale must be a finite number >= 0"),
    (["sample", "x", "--guidance-scale", "-2"], "guidance_scale must be"),
    (["sample", "x", "--num-steps", "0"], "num_steps must be 1..256"),
    (["sample", "x", "--num-steps", "300"], "num_steps must be 1..256"),
    (["sample", "x", "--seed", "-1"], "seed"),
    (["sample", "x", "-o", "x.jpg"], "output must end in .png"),
    (["sample", "x", "-o", "/proc/nowhere/x.png"], "cannot be written"),
    (["sample", "x", "--model", "/no/such/folder"], "neither a folder nor a reachable hub repository"),
    (["sample", "x", "--device", "cuda:99"], "device cuda:99 cannot be used"),
    (["sample"], "empty list"),
    (["reconstruct", "/no/such/picture.png"], "no readable image"),
    (["convert", "--generator", "/no/a.bin", "--tokenizer", "/no/b", "-o", "/tmp/x"], "/no/a.bin does not exist"),
]


@pytest.mark.parametrize("args, message", BAD, ids=[" ".join(args)[:50] for args, _ in BAD])
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(args) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("dcar-fast: error:")]
    assert len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.glob("*.png")), "nothing is left behind"


def test_mask_of_another_size(tmp_path, picture, capsys):
    mask = tmp_path / "mask.png"
    Image.new("L", (64, 32)).save(mask)
    assert main(["inpaint", str(picture), str(mask), "x", "-o", str(tmp_path / "o.png")]) == 2
    assert "mask must be as large as the image" in capsys.readouterr().err


def test_odd_pictures_need_pad(tmp_path, capsys):
    Image.new("RGB", (30, 21), "blue").save(tmp_path / "odd.png")
    args = ["reconstruct", str(tmp_path / "odd.png"), "-o", str(tmp_path / "o.png")]
    assert main(args) == 2
    assert "sides must be multiples of 8, got 30 x 21" in capsys.readouterr().err
    assert main([*args, "--pad"]) == 0
    assert Image.open(tmp_path / "o.png").size == (30, 21)


def test_doctor_names_every_op_and_backend(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "vq_lookup", "add_residual", "native", "triton", "cuda", "reference"):
        assert word in out
    assert main(["doctor", "--device", "cuda:99"]) == 2


@pytest.mark.parametrize("module", ["dcar_fast", "dcar_fast.cli"])
def test_the_module_runs_as_a_command(tmp_path, module):
    result = subprocess.run(
        [sys.executable, "-m", module, "sample", "--num-steps", "0", "x"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert result.returncode == 2 and result.stderr.startswith("dcar-fast: error: SamplingConfig.num_steps")

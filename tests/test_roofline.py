"""roofline.py as its users run it."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.benchmark_scripts import run


def test_roofline():
    done = run("roofline.py", "--preset", "dc-ar-512", "--gpu", "h200")
    assert done.returncode == 0, done.stderr
    assert "790 TFLOP/s (measured), 4.3 TB/s (measured)" in done.stdout
    rows = {line[:18].strip(): line[18:].split() for line in done.stdout.splitlines()}
    assert list(rows)[3:10] == [
        "stage",
        "text encoder",
        "text keys, values",
        "trunk",
        "logits",
        "diffusion head",
        "decoder",
    ]
    assert float(rows["trunk"][0]) == pytest.approx(6.646, rel=1e-3)  # TFLOP
    assert float(rows["decoder"][0]) == pytest.approx(2.769, rel=1e-3)
    parts = [float(rows[name][3]) for name in list(rows)[4:10]]
    assert float(rows["all"][3]) == pytest.approx(sum(parts), rel=0.02)  # milliseconds
    assert float(rows["all"][3]) >= float(rows["all"][0]) / 790 * 1e3 * 0.99


def test_roofline_with_own_ceilings_and_bad_ones():
    own = ("--preset", "shapes", "--gpu", "a100", "--tflops", 100, "--bandwidth", 0.5, "--dtype", "float32")
    done = run("roofline.py", *own)
    assert done.returncode == 0, done.stderr
    assert "100 TFLOP/s (given), 0.5 TB/s (given)" in done.stdout
    done = run("roofline.py", "--tflops", "nan")
    assert done.returncode == 2
    assert done.stderr == "roofline.py: error: argument --tflops: must be a number above 0, got 'nan'\n"


def test_roofline_png(tmp_path):
    """The picture, or one line that says what is missing."""
    picture = tmp_path / "roofline.png"
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "matplotlib.py").write_text("raise ModuleNotFoundError('no matplotlib')\n")
    done = run("roofline.py", "--preset", "shapes", "--png", picture, PYTHONPATH=str(hidden))
    assert done.returncode == 2 and not picture.exists()
    assert done.stderr.startswith("roofline.py: error: argument --png: needs matplotlib")
    if importlib.util.find_spec("matplotlib") is None:
        return
    done = run("roofline.py", "--preset", "shapes", "--png", picture)
    assert done.returncode == 0, done.stderr
    from PIL import Image

    with Image.open(picture) as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 800
        colours = image.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 50  # something was drawn


ROW = {"name": "fast-bfloat16", "dtype": "bfloat16", "median_s": 0.03, "p20_s": 0.029, "p80_s": 0.031}
ROW |= {"images_per_s": 66.7, "peak_bytes": 2**30}
ROW |= {"stages": {"text": 0.001, "unmask": 0.02, "head": 0.005, "decode": 0.007}}
RESULT = {"benchmark": "latency --prompt-tokens 16", "preset": "dc-ar-512", "batch": 2, "height": 512, "width": 256}
RESULT |= {"steps": 8, "device": "NVIDIA H200", "versions": {}, "commit": None, "time": "2026-01-02T03:04:05"}
OTHERS = [ROW | {"name": "eager-float32", "dtype": "float32"}, ROW | {"name": "compile", "unavailable": "no"}]
RESULT |= {"rows": [*OTHERS, ROW]}


def test_roofline_with_what_was_measured(tmp_path):
    """The work, the dtype and the GPU are those of the result, which the suite may have written, too."""
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"steps": [{"result": None}, {"result": RESULT}]}))
    done = run("roofline.py", "--measured", file)
    assert done.returncode == 0, done.stderr
    work = "dc-ar-512, 256 x 512 px, batch 2, 8 steps, prompt of 16 tokens, bfloat16"
    assert work in done.stdout and "H200: 790 TFLOP/s" in done.stdout
    assert "measured: fast-bfloat16 on NVIDIA H200, 2026-01-02: 30 ms" in done.stdout
    rows = {line[:16].strip(): line[16:].split() for line in done.stdout.splitlines()}
    floors = {line[:18].strip(): line[18:].split() for line in done.stdout.splitlines()}
    whole = sum(float(floors[name][3]) for name in ("text keys, values", "trunk", "logits"))
    assert float(rows["unmasking steps"][0]) == pytest.approx(whole, rel=0.02)
    assert rows["unmasking steps"][2:4] == ["20", "ms"]
    assert float(rows["unmasking steps"][4][:-1]) == pytest.approx(20 / whole, rel=0.02)
    done = run("roofline.py", "--measured", file, "--row", "eager-float32")
    assert "measured: eager-float32" in done.stdout and "67 TFLOP/s" in done.stdout


def test_roofline_with_results_that_do_not_fit(tmp_path):
    file = tmp_path / "result.json"
    cases = [
        (RESULT, ("--row", "fast"), "argument --row: "),
        (RESULT | {"device": "AMD EPYC, 2 threads"}, (), "argument --measured: it ran on AMD EPYC, 2 threads, whose"),
        (RESULT | {"rows": []}, (), "argument --measured: nothing was measured in"),
        ({"benchmark": "vq_lookup"}, (), f"argument --measured: {file} holds no result"),
        ({**RESULT, "commit": 3}, (), f"argument --measured: {file} is no benchmark result"),
    ]
    for content, more, message in cases:
        file.write_text(json.dumps(content))
        done = run("roofline.py", "--measured", file, *more)
        assert done.returncode == 2 and done.stderr.startswith(f"roofline.py: error: {message}"), done.stderr
        assert done.stderr.count("\n") == 1


def test_roofline_draws_what_was_measured(tmp_path):
    """A stage that took twice as long has an outline twice as long."""
    pytest.importorskip("matplotlib")
    import numpy as np
    from PIL import Image

    file, widths = tmp_path / "result.json", []
    for seconds in (0.02, 0.04):
        stages = ROW["stages"] | {"unmask": seconds, "decode": 0.05}  # the longest bar stays as it is
        file.write_text(json.dumps(RESULT | {"rows": [ROW | {"stages": stages}]}))
        done = run("roofline.py", "--measured", file, "--png", tmp_path / "r.png")
        assert done.returncode == 0, done.stderr
        with Image.open(tmp_path / "r.png") as image:
            pixels = np.asarray(image.convert("RGB"))[image.height // 2 :, image.width * 9 // 16 :]
        trunk = np.nonzero((pixels == (0x00, 0x72, 0xB2)).all(axis=-1))[1]
        widths.append(trunk.max() - trunk.min())
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.02)

"""PIL, tensors, masks, PNG text chunks."""

import numpy as np
import pytest
import torch
from PIL import Image

from dcar_fast import images


def _gradient(width, height, mode="RGB"):
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def test_pixels_survive_the_round_trip():
    image = _gradient(48, 32)
    tensor = images.image_to_tensor(image)
    assert tensor.shape == (1, 3, 32, 48) and tensor.min() >= -1 and tensor.max() <= 1
    assert np.array_equal(images.tensor_to_pixels(tensor)[0].numpy(), np.array(image))


def test_pixels_are_rounded_and_clamped():
    values = torch.tensor([-5.0, -1.0, -0.5, 0.0, 0.5, 1.0, 7.0])
    pixels = images.tensor_to_pixels(values.view(1, 1, 1, -1).expand(1, 3, 1, -1))
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 64, 128, 191, 255, 255]  # 63.75, 127.5 to even, 191.25


def test_other_modes_become_rgb():
    assert images.image_to_tensor(_gradient(8, 8, "L")).shape == (1, 3, 8, 8)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert torch.all(images.image_to_tensor(clear) == 1), "transparent pixels are white"


def test_sixteen_bits_are_scaled_and_unknown_ranges_refused(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    wide, narrow = Image.fromarray(ramp), Image.fromarray((ramp / 257).round().astype(np.uint8))
    assert torch.equal(images.image_to_tensor(wide), images.image_to_tensor(narrow))
    assert torch.equal(images.mask_to_tensor(wide, (64, 64)), images.mask_to_tensor(narrow, (64, 64)))
    wide.save(tmp_path / "wide.png")
    assert torch.equal(images.image_to_tensor(images.open_image(tmp_path / "wide.png")), images.image_to_tensor(narrow))
    for name, read in (("image", images.image_to_tensor), ("mask", lambda m: images.mask_to_tensor(m, (4, 4)))):
        for mode in ("F", "I"):
            with pytest.raises(ValueError, match=f"{name} has 32 bits per pixel"):
                read(Image.new(mode, (4, 4)))


def test_padding_repeats_edges():
    image = _gradient(50, 33)
    padded = images.image_to_multiple(image, 32, pad=True)
    assert padded.shape == (1, 3, 64, 64)
    plain = images.image_to_tensor(image)
    assert torch.equal(padded[:, :, :33, :50], plain)
    assert torch.equal(padded[:, :, 40, :50], plain[:, :, 32]) and torch.equal(padded[:, :, 5, 60], plain[:, :, 5, 49])
    with pytest.raises(ValueError, match="multiples of 32, got 50 x 33; crop to 32 x 32"):
        images.image_to_multiple(image, 32, pad=False)
    with pytest.raises(ValueError, match="at most 4096"):
        images.image_to_multiple(Image.new("L", (4128, 32)), 32, pad=False)


@pytest.mark.parametrize(
    "pixel, tokens",
    [((0, 0), {(0, 0), (0, 1), (1, 0), (1, 1)}), ((20, 12), {(y, x) for y in (0, 1, 2) for x in (1, 2, 3)})],
)
def test_mask_marks_overlapped_tokens_and_their_neighbours(pixel, tokens):
    mask = torch.zeros(32, 40, dtype=torch.bool)
    mask[pixel[1], pixel[0]] = True
    marked = images.mask_to_tokens(mask, 8)
    assert marked.shape == (4, 5)
    assert {tuple(position) for position in marked.nonzero().tolist()} == tokens


def test_mask_must_fit_the_image():
    with pytest.raises(ValueError, match=r"mask must be as large as the image .* \(64, 32\), got \(32, 64\)"):
        images.mask_to_tensor(Image.new("L", (32, 64)), (64, 32))
    with pytest.raises(ValueError, match="mask must be a PIL image, got str"):
        images.mask_to_tensor("mask.png", (64, 32))
    grey = Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8))
    assert images.mask_to_tensor(grey, (4, 1)).tolist() == [[False, False, True, True]]


def test_png_carries_its_text_and_replaces_atomically(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "image.png"
    image = _gradient(8, 8)
    image.info = {"prompt": "ein roter Kreis, 赤い円", "seed": "7"}
    images.save_png(image, path)
    with Image.open(path) as saved:
        assert saved.text == image.info and np.array_equal(np.array(saved), np.array(image))
    before = path.read_bytes()

    def interrupted(self, file, **options):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        images.save_png(image, path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["image.png"]


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n broken"])
def test_unreadable_images(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no readable image"):
        images.open_image(path)
    with pytest.raises(ValueError, match="no readable image"):
        images.open_image(tmp_path / "missing.png")


def test_truncated_image_is_refused(tmp_path):
    path = tmp_path / "x.png"
    _gradient(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="no readable image"):
        images.open_image(path)


def test_photos_are_turned_upright(tmp_path):
    image = _gradient(16, 8)
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 270 degrees to view
    image.save(tmp_path / "x.png", exif=exif)
    assert images.open_image(tmp_path / "x.png").size == (8, 16)

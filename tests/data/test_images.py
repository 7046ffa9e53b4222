"""Images of every kind, made here, are read as they are meant or refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from unirefiner_hf.data.folders import list_images
from unirefiner_hf.data.images import (
    ImageError,
    default_reference,
    load_rgb,
)
from unirefiner_hf.data.pixels import PixelReading

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)


def gradient(width=40, height=30):
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 255 - x], -1).round().astype(np.uint8))


def encoded(image, kind="png", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def close(image, expected, tolerance=12):
    difference = np.asarray(image, float) - np.asarray(expected, float)
    return np.abs(difference).mean() < tolerance


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "tiff", "gif"])
def test_common_formats(kind):
    image = load_rgb(encoded(gradient(), kind))
    assert image.mode == "RGB" and image.size == (40, 30)
    assert close(image, gradient())


def test_cmyk_and_palette_are_converted():
    assert close(load_rgb(encoded(gradient().convert("CMYK"), "jpeg")), gradient())
    palette = gradient().convert("P", palette=Image.Palette.ADAPTIVE)
    assert close(load_rgb(encoded(palette)), gradient())


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode):
    image = Image.new("RGB", (20, 20), "black").convert(mode)
    image.putalpha(Image.new("L", (20, 20), 0))
    assert load_rgb(encoded(image)).getextrema() == ((255, 255),) * 3


def test_a_transparent_palette_colour_is_white():
    image = Image.new("P", (20, 20), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((3, 3), 1)
    read = load_rgb(encoded(image, transparency=0))
    assert read.getpixel((0, 0)) == (255, 255, 255) and read.getpixel((3, 3)) == (
        255,
        0,
        0,
    )


def test_16_bit_grey_keeps_its_range():
    ramp = np.linspace(0, 65535, 40).round().astype(np.uint16)[None].repeat(20, 0)
    read = np.asarray(load_rgb(encoded(Image.fromarray(ramp))))
    assert read.min() == 0 and read.max() == 255
    assert abs(int(read[0, 20, 0]) - 131) <= 1


def test_1_bit_and_float_images():
    assert load_rgb(encoded(Image.new("1", (20, 20), 1))).getpixel((0, 0)) == (255,) * 3
    floats = Image.fromarray(np.full((20, 20), 0.5, dtype=np.float32))
    assert load_rgb(floats).getpixel((0, 0)) == (128,) * 3


def test_exif_orientation_is_applied():
    image = gradient()
    exif = Image.Exif()
    exif[0x0112] = 6
    read = load_rgb(encoded(image, "jpeg", exif=exif))
    assert read.size == (30, 40)
    assert close(read, image.transpose(Image.Transpose.ROTATE_270))


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert load_rgb(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "content,reason",
    [
        (b"", "not an image|empty"),
        (b"hello", "not an image"),
        (encoded(gradient(400, 400))[:900], "cannot be decoded"),
        (encoded(gradient(400, 400), "jpeg")[:1500], "cannot be decoded"),
        (encoded(Image.new("RGB", (1, 1))), "shorter than 16 pixels .1x1"),
        (encoded(Image.new("RGB", (300, 15))), "shorter than 16 pixels .300x15"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, reason):
    file = tmp_path / "bad.png"
    file.write_bytes(content)
    with pytest.raises(ImageError, match=f"bad.png: .*({reason})") as caught:
        load_rgb(file)
    assert str(tmp_path) not in str(caught.value)


def test_a_decompression_bomb_is_refused():
    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    with pytest.raises(ImageError, match="bomb.*Scale it down"):
        load_rgb(bomb)


def test_a_missing_file_is_named():
    with pytest.raises(ImageError, match="nowhere.png: there is no such file"):
        load_rgb("nowhere.png")


def test_pixels_and_back():
    image = gradient(64, 48)
    reading = PixelReading(MEAN, STD)
    pixels = reading(image, (48, 64))
    assert pixels.shape == (3, 48, 64) and pixels.dtype == torch.float32
    assert torch.allclose(pixels[1, 0, 0], torch.tensor((0.0 - 0.5) / 0.3))
    assert np.array_equal(reading.denormalised(pixels), np.asarray(image))
    assert reading(image, (28, 14)).shape == (3, 28, 14)


def test_list_images_is_sorted_and_recursive(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.JPG", "a.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    names = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert names == ["a.png", "b/2.JPG"]


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ImageError, match="only files with .txt"):
        list_images(tmp_path)
    with pytest.raises(ImageError, match="no such folder"):
        list_images(tmp_path / "missing")


def test_the_reference_has_many_regions():
    reference = default_reference()
    assert min(reference.size) >= 512
    small = np.asarray(reference.resize((16, 16)), float).reshape(-1, 3)
    assert small.std(axis=0).min() > 40

"""Damaged files: an RGB image or the one error, whatever the bytes, and soon."""

import random
import time
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.kinds import RGB, encoded
from unirefiner_hf.data.images import ImageError, load_rgb
from unirefiner_hf.data.labelled import LabelError, read_map
from unirefiner_hf.data.values import DARKEST

SECONDS, LONGEST = 30, 5
"""Of the whole fuzz, and of one file."""
EXIF = Image.Exif()
EXIF[0x0112] = 6
SEEDS = {
    "jpeg": [{"quality": 90}, {"progressive": True, "exif": EXIF}],
    "png": [{}, {"exif": EXIF, "optimize": True}],
    "tiff": [{}, {"compression": "tiff_lzw", "exif": EXIF}, {"compression": "jpeg"}],
    "webp": [{"lossless": True}, {"quality": 50, "exif": EXIF}],
    "gif": [{}],
    "bmp": [{}],
    "ppm": [{}],
    "jpeg2000": [{}],
    "avif": [{"speed": 10}],
}


def valid_files():
    image = Image.fromarray(RGB)
    for kind, variants in SEEDS.items():
        for options in variants:
            yield encoded(image, kind, **options)
    yield encoded(image.convert("P"), "png", transparency=3)
    yield encoded(image.convert("CMYK"), "jpeg")
    yield encoded(Image.fromarray(RGB[..., 0].astype(np.uint16) * 257), "png")
    yield encoded(Image.fromarray(RGB[..., 0].astype(np.float32)), "tiff")
    yield encoded(image, "gif", save_all=True, append_images=[image.rotate(90)])


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut, doubled or moved; headers more often than the rest."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 4, 16])):
        end = draw.choice([64, len(data)])
        place = draw.randrange(max(1, min(end, len(data))))
        how = draw.randrange(6)
        if how == 0:
            data[place : place + 1] = bytes([draw.randrange(256)])
        elif how == 1:
            data[place : place + 4] = draw.choice(
                [b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff", b"\0\0\xff\xff"]
            )
        elif how == 2:
            data = data[:place]
        elif how == 3:
            data[place:place] = data[place : place + draw.randrange(1, 64)]
        elif how == 4:
            del data[place : place + draw.randrange(1, 64)]
        elif place < len(data):
            data[place] ^= 1 << draw.randrange(8)
    return bytes(data)


def test_damaged_files_give_an_image_or_the_one_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    draw = random.Random(0)
    seeds, read, refused = list(valid_files()), 0, 0
    for content in seeds:
        assert load_rgb(content).size in ((24, 16), (16, 24))
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(8_000):
            content = damaged(seeds[number % len(seeds)], draw)
            began = time.monotonic()
            try:
                image = load_rgb(content, "x")
                assert image.mode == "RGB" and min(image.size) >= 16
                read += 1
            except ImageError as problem:
                assert str(problem).startswith("x: ")
                refused += 1
            if number % 4 == 0:
                try:
                    read_map(content, "x")
                except LabelError as problem:
                    assert str(problem).startswith("x: ")
            assert time.monotonic() - began < LONGEST, content
            if time.monotonic() - start > SECONDS:
                break
    assert read > 100 and refused > 100


def test_an_error_of_our_own_is_not_taken_for_a_damaged_file(monkeypatch):
    from unirefiner_hf.data import images

    def defect(*_, **__):
        raise KeyError("a defect")

    grey = encoded(Image.fromarray(RGB[..., 0].astype(np.uint16) * 257))
    monkeypatch.setattr(images, "to_eight_bits", defect)
    with pytest.raises(KeyError, match="a defect"):
        load_rgb(grey)


WIDE = {
    "I;16": (np.uint16, 65535),
    "I": (np.int32, 2**31 - 1),
    "F": (np.float32, 1e6),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    mode=st.sampled_from(list(WIDE)),
    width=st.integers(16, 40),
    height=st.integers(16, 40),
    low=st.floats(-0.1, 1),
    high=st.floats(0, 1),
    exponent=st.integers(0, 9),
)
def test_wide_values_keep_their_range_or_are_refused(
    mode, width, height, low, high, exponent
):
    """In memory or encoded: the same pixels, spread over their range, or an error."""
    kind, most = WIDE[mode]
    top = min(most, 10**exponent)
    ramp = np.linspace(low * top, high * top, width)[None].repeat(height, 0)
    values = ramp.clip(0 if mode == "I;16" else None).astype(kind)
    image = Image.fromarray(values)
    assert image.mode == mode
    outcomes = []
    for source in (image, encoded(image, "tiff")):
        try:
            outcomes.append(np.asarray(load_rgb(source, "x")))
        except ImageError as problem:
            outcomes.append(str(problem))
    if isinstance(outcomes[0], str):
        assert outcomes[0] == outcomes[1]
        return
    assert np.array_equal(*outcomes)
    brightest = outcomes[0].max()
    assert values.min() >= 0
    assert brightest >= 255 // DARKEST or values.max() == 0


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    mode=st.sampled_from(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"]),
    width=st.integers(16, 30),
    height=st.integers(16, 30),
    orientation=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_every_mode_is_read_alike_from_memory_and_file(
    mode, width, height, orientation, seed
):
    random = np.random.default_rng(seed)
    colours = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(colours).convert("RGBA" if mode.endswith("A") else "RGB")
    image = image.convert("LA").convert("PA") if mode == "PA" else image.convert(mode)
    kind = "png" if mode in ("1", "L", "LA", "P", "RGB", "RGBA") else "tiff"
    exif = Image.Exif()
    exif[0x0112] = orientation
    if mode == "PA":
        assert load_rgb(image).mode == "RGB"
        return
    content = encoded(image, kind, exif=exif)
    read = load_rgb(content)
    assert read.size == ((height, width) if orientation >= 5 else (width, height))
    image.getexif()[0x0112] = orientation
    assert np.array_equal(read, load_rgb(image))

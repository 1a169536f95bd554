import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from visalign.images import (
    check_images,
    check_pixels,
    images_to_numpy,
    images_to_pil,
    picture_files,
    pil_to_images,
    read_picture,
    to_uint8,
)


def test_every_uint8_level_survives_the_round_trip_through_pil():
    levels = torch.arange(256).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    back = pil_to_images(images_to_pil(levels / 255))
    assert back.dtype == torch.float32
    torch.testing.assert_close(back * 255, levels.float(), rtol=0, atol=1e-4)


def test_channels_rows_and_columns_keep_their_places():
    images = torch.zeros(1, 3, 4, 6)
    images[0, 1, 2, 5] = 1.0
    assert images_to_pil(images)[0].getpixel((5, 2)) == (0, 255, 0)
    assert images_to_numpy(images)[0, 2, 5].tolist() == [0, 255, 0]


def test_pixels_are_rounded_and_clamped_not_wrapped():
    images = torch.tensor([-0.0005, 0.4999, 0.5001, 1.0005]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert to_uint8(images)[0, 0, 0].tolist() == [0, 127, 128, 255]


@pytest.mark.parametrize(
    "images, says",
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "got torch.uint8, expected floats"),
        (torch.zeros(2, 1, 8, 8), "greyscale"),
        (torch.zeros(2, 4, 8, 8), "RGBA"),
        (torch.zeros(3, 8, 8), "expected \\(N, 3, H, W\\)"),
        (torch.zeros(2, 5, 3, 8, 8), "expected \\(N, 3, H, W\\)"),
        (torch.zeros(0, 3, 8, 8), "at least one image"),
        (np.zeros((2, 3, 8, 8)), "got ndarray"),
    ],
)
def test_unusable_images_are_refused(images, says):
    with pytest.raises(ValueError, match=says):
        check_images(images)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 1.5])
def test_bad_pixels_are_refused_with_the_sample(value):
    images = torch.rand(3, 3, 8, 8)
    images[2, 1, 3, 4] = value
    with pytest.raises(ValueError, match="in sample 2, expected within"):
        check_pixels(images)


def test_pictures_of_two_sizes_or_another_mode_are_refused():
    with pytest.raises(ValueError, match="sizes"):
        pil_to_images([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))])
    for mode in ("L", "RGBA", "P"):
        with pytest.raises(ValueError, match=f"mode '{mode}' at 1"):
            pil_to_images([Image.new("RGB", (8, 8)), Image.new(mode, (8, 8))])
    with pytest.raises(ValueError, match="got none"):
        pil_to_images([])


# Files of others ------------------------------------------------------------------------------------------------------


def saved(path, image, **options):
    image.save(path, **options)
    return path


def pixels(image):
    return np.asarray(image).tolist()


def test_a_picture_that_lies_on_its_side_is_turned(tmp_path):
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter clockwise
    for name, lossless in (("a.png", True), ("a.jpg", False)):
        turned = read_picture(saved(tmp_path / name, image, exif=exif))
        assert turned.size == (2, 4)
        assert not lossless or turned.getpixel((1, 0)) == (255, 0, 0)


def test_sixteen_bits_become_eight_by_their_value(tmp_path):
    ramp = (np.arange(64, dtype=np.uint16) * 1040)[None]
    image = read_picture(saved(tmp_path / "ramp.png", Image.fromarray(ramp)))
    assert image.mode == "RGB" and len(set(np.asarray(image)[0, :, 0].tolist())) == 64
    grey = read_picture(saved(tmp_path / "grey.png", Image.fromarray(np.full((2, 2), 32768, np.uint16))))
    assert pil_to_images([grey]).mean().item() == pytest.approx(0.5, abs=3e-3)


def test_what_is_transparent_lies_on_white_and_other_modes_are_converted(tmp_path):
    clear = saved(tmp_path / "rgba.png", Image.new("RGBA", (1, 1), (0, 0, 0, 0)))
    half = saved(tmp_path / "la.png", Image.new("LA", (1, 1), (0, 128)))
    palette = Image.new("P", (1, 1))
    palette.putpalette([255, 0, 0] + [0] * 765)
    assert pixels(read_picture(clear)) == [[[255] * 3]] and pixels(read_picture(half)) == [[[127] * 3]]
    assert pixels(read_picture(saved(tmp_path / "p.png", palette))) == [[[255, 0, 0]]]
    assert pixels(read_picture(saved(tmp_path / "t.png", palette, transparency=0))) == [[[255] * 3]]
    assert pixels(read_picture(saved(tmp_path / "l.png", Image.new("L", (1, 1), 9)))) == [[[9] * 3]]
    assert read_picture(saved(tmp_path / "c.jpg", Image.new("CMYK", (1, 1)))).mode == "RGB"
    assert read_picture(io.BytesIO(clear.read_bytes())).mode == "RGB"


def test_what_is_no_picture_or_too_large_a_one_is_one_line(tmp_path):
    saved(tmp_path / "wide.png", Image.new("1", (60000, 10)))
    bomb = bytearray((tmp_path / "wide.png").read_bytes())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bytes(bomb))
    (tmp_path / "x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n%%EndComments\nshowpage\n")
    (tmp_path / "cut.png").write_bytes((tmp_path / "wide.png").read_bytes()[:60])
    for name, says in (
        ("bomb.png", "more pixels|expected at most"),
        ("x.eps", "is no picture of PNG"),
        ("cut.png", "is broken"),
        ("none.png", "there is no such file"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*({says})"):
            read_picture(tmp_path / name)
    with pytest.raises(ValueError, match="got 60000 x 10 pixels, expected at most 1,000 in all"):
        read_picture(tmp_path / "wide.png", most_pixels=1000)


def test_frames_come_in_natural_order_without_the_desktops_files(tmp_path):
    for name in (
        "frame_10.png",
        "frame_2.png",
        "frame_1.PNG",
        ".DS_Store",
        "Thumbs.db",
        "._frame_3.png",
        "desktop.ini",
    ):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in picture_files(tmp_path)] == ["frame_1.PNG", "frame_2.png", "frame_10.png"]

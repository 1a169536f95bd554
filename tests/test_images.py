import numpy as np
import pytest
import torch
from PIL import Image

from visalign.images import check_images, check_pixels, images_to_numpy, images_to_pil, pil_to_images, to_uint8


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

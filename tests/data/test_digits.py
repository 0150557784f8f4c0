"""32 x 32 digits: SVHN's format 2 windows, and other data sets in their place."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import FakeData
from torchvision.transforms import Compose, Normalize, ToTensor

from lipguide.data import Scene, SyntheticHouseNumbers, digits
from lipguide.data.crops import cut
from lipguide.data.windows import to_pixels

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


def scene_with(pixels: np.ndarray, *boxes: tuple[float, ...]) -> Scene:
    height, width = pixels.shape[:2]
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    corners = torch.tensor(boxes, dtype=torch.float32) / torch.tensor([width, height, width, height])
    return Scene(image, corners, torch.arange(len(boxes)), None)


@PROPERTY
@given(st.integers(12, 40), st.floats(0.3, 0.9), st.integers(90, 160), st.integers(90, 120), st.data())
def test_the_window_is_square_centred_and_undistorted(tall, aspect, width, height, data):
    """A disc in the middle of its box stays a disc of the right size in the middle of the crop."""
    x = data.draw(st.integers(tall, width - tall))
    y = data.draw(st.integers(tall, height - tall))
    yy, xx = np.mgrid[:height, :width] + 0.5
    radius = 0.15 * tall
    disc = np.clip(radius + 0.5 - np.hypot(xx - x, yy - y), 0, 1)
    pixels = np.repeat((255 * disc)[..., None], 3, 2).astype(np.uint8)
    wide = aspect * tall
    images, _ = digits([scene_with(pixels, (x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2))])
    grey = images[0, 0].double()
    total = float(grey.sum())
    along = torch.arange(32, dtype=torch.float64) + 0.5
    cy, cx = float(grey.sum(1) @ along) / total, float(grey.sum(0) @ along) / total
    assert abs(cx - 16) < 0.5 and abs(cy - 16) < 0.5
    vy, vx = float(grey.sum(1) @ (along - cy) ** 2), float(grey.sum(0) @ (along - cx) ** 2)
    assert abs(vx / vy - 1) < 0.15
    assert abs(total / (np.pi * (radius * 32 / tall) ** 2) - 1) < 0.2


def test_beyond_the_picture_its_edge_is_repeated():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 200
    images, labels = digits([scene_with(pixels, (0, 5, 8, 35))])
    assert images.shape == (1, 3, 32, 32) and labels.tolist() == [0]
    torch.testing.assert_close(images[:, :, :, :16], torch.full((1, 3, 32, 16), 200 / 255))


def test_every_digit_comes_once_in_order():
    data = SyntheticHouseNumbers("train", 15, seed=2, cache=False)
    images, labels = digits(data)
    assert labels.tolist() == [d for k in range(15) for d in data[k].labels.tolist()]
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
    some, _ = digits(Subset(data, [3, 8]))
    start = sum(len(data[k].labels) for k in range(3))
    torch.testing.assert_close(some[0], images[start], rtol=0, atol=0)


def test_pictures_of_32_by_32_are_taken_as_they_are():
    fake = FakeData(size=6, image_size=(3, 32, 32), num_classes=10)
    images, labels = digits(fake)
    tensors, again = digits(FakeData(size=6, image_size=(3, 32, 32), num_classes=10, transform=ToTensor()))
    assert torch.equal(images, tensors) and torch.equal(labels, again)
    assert torch.equal(images[2], ToTensor()(fake[2][0])) and labels[2] == fake[2][1]


def test_what_is_no_digit_is_refused():
    with pytest.raises(ValueError, match="item 0 is"):
        digits(FakeData(size=1, image_size=(3, 28, 28)))
    spread = Compose([ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)])
    with pytest.raises(ValueError, match="not normalised"):
        digits(FakeData(size=1, image_size=(3, 32, 32), transform=spread))
    with pytest.raises(ValueError, match="item 0: digits need bytes"):
        digits([(torch.zeros(3, 32, 32, dtype=torch.int64), 1)])


def test_no_scenes_give_no_digits():
    images, labels = digits([])
    assert images.shape == (0, 3, 32, 32) and labels.shape == (0,)


@PROPERTY
@given(st.integers(1, 30), st.integers(1, 30), st.integers(-40, 40), st.integers(-40, 40), st.integers(1, 50))
def test_windows_anywhere_are_cut(height, width, left, top, side):
    pixels = np.arange(height * width, dtype=np.uint8).reshape(height, width)
    found = cut(pixels, (left, top, left + side, top + side), side, smooth=False)
    rows = np.clip(np.arange(top, top + side), 0, height - 1)
    columns = np.clip(np.arange(left, left + side), 0, width - 1)
    np.testing.assert_array_equal(found, pixels[rows][:, columns])


def test_a_picture_goes_from_the_file_to_the_crop_as_bytes():
    """Without floats between: Pillow's crop of the decoded file, its edge repeated where the square sticks out."""
    data = SyntheticHouseNumbers("test", 20, seed=3, cache=False)
    images, _ = digits(data, dtype=torch.uint8)
    assert images.dtype == torch.uint8
    expected = []
    for index in range(len(data)):
        picture = Image.open(io.BytesIO(data._pages[index].picture)).convert("RGB")
        room = max(picture.size)
        wide = Image.fromarray(np.pad(np.asarray(picture), ((room, room), (room, room), (0, 0)), mode="edge"))
        corners = data[index].boxes.double().numpy() * [*picture.size, *picture.size]
        for x0, y0, x1, y1 in corners:
            half = max(x1 - x0, y1 - y0) / 2
            x, y = (x0 + x1) / 2 + room, (y0 + y1) / 2 + room
            crop = wide.resize((32, 32), Image.Resampling.BICUBIC, box=(x - half, y - half, x + half, y + half))
            expected.append(np.asarray(crop))
    found = images.permute(0, 2, 3, 1).numpy()
    assert found.shape == np.stack(expected).shape
    assert np.abs(found.astype(int) - np.stack(expected)).max() <= 1  # the box is rounded elsewhere on a wider picture
    assert (found == np.stack(expected)).mean() > 0.999


@pytest.mark.parametrize("data", [SyntheticHouseNumbers("train", 6, cache=False), FakeData(4, (3, 32, 32))])
def test_floats_are_the_bytes_over_255(data):
    assert torch.equal(digits(data).images, digits(data, dtype=torch.uint8).images.float() / 255)


def test_pixels_survive_the_way_through_floats():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 255
    np.testing.assert_array_equal(to_pixels(image), pixels)

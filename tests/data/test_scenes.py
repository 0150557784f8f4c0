"""Square scenes: the Tinier SSD recipe's window, the full frame, and boxes and class maps that follow the picture."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from lipguide.data import BACKGROUND, Scene, SyntheticHouseNumbers, digits, scenes
from lipguide.data.crops import number_window

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def numbers(draw):
    """A picture's size and the corners of one to four boxes in it."""
    width, height = draw(st.integers(30, 300)), draw(st.integers(20, 150))
    tall = draw(st.integers(8, height))
    count = draw(st.integers(1, 4))
    wide = draw(st.integers(3, max(3, min(tall, width // count))))
    assume(count * wide <= width)
    x = draw(st.integers(0, width - count * wide))
    y = draw(st.integers(0, height - tall))
    boxes = [[x + k * wide, y, x + (k + 1) * wide, y + tall] for k in range(count)]
    return width, height, np.array(boxes, dtype=float)


@PROPERTY
@given(numbers(), st.integers(0, 1000))
def test_the_window_is_a_square_in_the_picture_around_every_box(number, seed):
    width, height, corners = number
    found = number_window(width, height, corners, np.random.default_rng(seed))
    least = int(max(corners[-1, 2] - corners[0, 0], corners[0, 3] - corners[0, 1]))
    if found is None:
        assert least > min(width, height)
        return
    left, top, side = found
    assert left >= 0 and top >= 0 and left + side <= width and top + side <= height
    assert left <= corners[0, 0] and top <= corners[0, 1]
    assert left + side >= corners[-1, 2] and top + side >= corners[0, 3]
    assert least <= side <= least + 2 * round(0.15 * least)


def test_with_room_the_square_grows_by_thirty_percent():
    corners = np.array([[480.0, 490, 510, 530], [510, 490, 540, 530]])
    sides = {number_window(1000, 1000, corners, np.random.default_rng(k))[2] for k in range(20)}
    assert sides == {60 + 2 * 9}


def test_the_square_slides_over_all_places_that_fit():
    corners = np.array([[400.0, 450, 500, 490]])
    tops = [number_window(1000, 1000, corners, np.random.default_rng(k))[1] + 15 for k in range(600)]
    assert min(tops) < 395 and max(tops) > 445 and min(tops) >= 390 and max(tops) <= 450
    assert abs(np.mean(tops) - 420) < 3


def painted(width: int, height: int, corners: np.ndarray) -> Scene:
    """A black picture with a white rectangle for every box, and their mask."""
    image, mask = (torch.zeros(*shape, height, width, dtype=torch.uint8) for shape in ((3,), ()))
    for k, (x0, y0, x1, y1) in enumerate(corners.astype(int)):
        image[:, y0:y1, x0:x1] = 255
        mask[y0:y1, x0:x1] = k + 1
    scale = torch.tensor([width, height, width, height], dtype=torch.float32)
    return Scene(image, torch.from_numpy(corners).float() / scale, torch.arange(len(corners)) + 3, mask)


@pytest.mark.parametrize("view", ["number", "frame"])
@PROPERTY
@given(number=numbers(), seed=st.integers(0, 99))
def test_boxes_and_masks_follow_the_picture(view, number, seed):
    """What was white lies in the boxes, and what was black outside, in the scaled picture too."""
    scene = painted(*number)
    images, boxes, labels, masks = scenes([scene], size=74, view=view, seed=seed)
    if not len(images):
        assert view == "number"
        return
    assert images.shape == (1, 3, 74, 74) and masks.shape == (1, 74, 74)
    assert labels[0].tolist() == scene.labels.tolist()
    x = torch.arange(74) + 0.5
    shown = (boxes[0][0] * 74).tolist()
    box = number[2][0]
    near = 2 * max((shown[2] - shown[0]) / (box[2] - box[0]), (shown[3] - shown[1]) / (box[3] - box[1]), 1.0)
    outside = torch.ones(74, 74, dtype=torch.bool)
    for box, label in zip(boxes[0] * 74, labels[0], strict=True):
        inner = (x[None] > box[0] + near) & (x[None] < box[2] - near)
        inner = inner & (x[:, None] > box[1] + near) & (x[:, None] < box[3] - near)
        outer = (x[None] > box[0] - near) & (x[None] < box[2] + near)
        outer = outer & (x[:, None] > box[1] - near) & (x[:, None] < box[3] + near)
        outside &= ~outer
        assert (masks[0][inner] == label).all() and (images[0][:, inner] > 0.9).all()
    assert (masks[0][outside] == BACKGROUND).all() and (images[0][:, outside] < 0.1).all()


@pytest.fixture(scope="module")
def data():
    return SyntheticHouseNumbers("train", 60, seed=12, cache=False)


def test_scenes_keep_the_contract(data):
    images, boxes, labels, masks = scenes(data)
    assert images.shape[1:] == (3, 74, 74) and images.dtype == torch.float32
    assert len(images) == len(boxes) == len(labels) == len(masks) and 40 <= len(images) <= 60
    assert masks.dtype == torch.int64 and set(masks.unique().tolist()) <= set(range(11))
    for own, names, classes in zip(boxes, labels, masks, strict=True):
        assert own.shape == (len(names), 4) and own.dtype == torch.float32 and names.dtype == torch.int64
        assert (own >= 0).all() and (own <= 1).all() and (own[:, 2:] > own[:, :2]).all()
        assert set(classes.unique().tolist()) <= {*names.tolist(), BACKGROUND}


@pytest.mark.parametrize("view", ["number", "frame"])
def test_a_picture_goes_from_the_file_to_the_square_as_bytes(data, view):
    """Without floats between: the same bytes as Pillow's own resizing of the decoded file."""
    images = scenes(data, 74, view, seed=4, dtype=torch.uint8).images
    expected = []
    for index in range(len(data)):
        picture = Image.open(io.BytesIO(data._pages[index].picture)).convert("RGB")
        box = (0, 0, *picture.size)
        if view == "number":
            corners = data[index].boxes.double().numpy() * [*picture.size, *picture.size]
            window = number_window(*picture.size, corners, np.random.default_rng((4, index)))
            if window is None:
                continue
            left, top, side = window
            box = (left, top, left + side, top + side)
        expected.append(np.asarray(picture.resize((74, 74), Image.Resampling.BICUBIC, box=box)))
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), np.stack(expected))


@pytest.mark.parametrize("view", ["number", "frame"])
def test_floats_are_the_bytes_over_255(data, view):
    bytes_, floats = (scenes(data, 40, view, dtype=kind) for kind in (torch.uint8, torch.float32))
    assert bytes_.images.dtype == torch.uint8 and floats.images.dtype == torch.float32
    assert torch.equal(floats.images, bytes_.images.float() / 255)
    assert bytes_.masks.dtype == torch.uint8 and torch.equal(floats.masks, bytes_.masks.long())


def test_scenes_hold_bytes_and_show_floats(data):
    scene = data[0]
    image, boxes, labels, mask = scene
    assert scene.pixels.dtype == torch.uint8 and torch.equal(image, scene.pixels.float() / 255)
    assert boxes is scene.boxes and labels is scene.labels and mask is scene.mask
    with pytest.raises(ValueError, match=r"bytes \(3, H, W\), not torch.float32"):
        Scene(image, boxes, labels, mask)
    with pytest.raises(ValueError, match=r"not torch.uint8 \(20, 40, 3\)"):
        Scene(torch.zeros(20, 40, 3, dtype=torch.uint8), boxes, labels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, None])
def test_other_types_of_pictures_are_refused_before_any_is_read(dtype):
    class Unread:
        def __len__(self):
            return pytest.fail("read")

    for hand_out in (scenes, digits):
        with pytest.raises(ValueError, match="torch.uint8"):
            hand_out(Unread(), dtype=dtype)


@pytest.mark.parametrize("value", [-1, None, 2.5, "74"])
@pytest.mark.parametrize("name", ["size", "seed"])
def test_what_is_no_whole_number_is_named(data, name, value):
    for those in (data, []):
        with pytest.raises(ValueError, match=f"{name} is .*whole number"):
            scenes(those, **{name: value})
    with pytest.raises(ValueError, match="size is 0"):
        scenes([], size=0)


def test_the_frame_drops_nothing(data):
    images, boxes, _, masks = scenes(data, size=50, view="frame")
    assert images.shape == (60, 3, 50, 50) and len(masks) == 60
    assert torch.allclose(boxes[7], data[7].boxes)


def test_the_seed_decides_where_windows_lie_scene_by_scene(data):
    first, again, other = (scenes(data, seed=s).images for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    few = scenes([data[k] for k in range(10)])
    assert torch.equal(few.images, first[: len(few.images)])


def test_scenes_without_masks_have_none(data):
    bare = [replace(data[k], mask=None) for k in range(4)]
    assert scenes(bare, view="frame").masks is None
    with pytest.raises(ValueError, match="all need one, or none"):
        scenes([*bare, data[5]], view="frame")


def test_bad_views_and_empty_sets():
    with pytest.raises(ValueError, match="view must be"):
        scenes([], view="full")
    images, boxes, labels, masks = scenes([])
    assert images.shape == (0, 3, 74, 74) and boxes == labels == [] and masks is None

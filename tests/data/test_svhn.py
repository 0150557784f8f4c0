"""Real SVHN folders: digitStruct.mat as MATLAB 7.3 writes it, and what happens to damaged and foreign files."""

from __future__ import annotations

import cProfile
import pstats
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lipguide.data import SVHN, PictureError, SyntheticHouseNumbers
from lipguide.data.items import Annotation, make_scene
from lipguide.data.svhn import digit_struct as module
from lipguide.data.svhn.digit_struct import DigitStructError, load_digit_struct, read_digit_struct, write_digit_struct
from lipguide.data.svhn.lone_numbers import LoneNumbers

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


pytestmark = pytest.mark.usefixtures("own_cache")


def note(name: str, boxes: list, labels: list) -> Annotation:
    return Annotation(name, 0, 0, np.array(boxes, dtype=float).reshape(-1, 4), np.array(labels))


PAIR = [note("1.png", [[246, 77, 81, 219], [323, 81, 96, 219]], [1, 9]), note("2.png", [[-1, -5, 40, 60]], [0])]


def many(times: int) -> list[Annotation]:
    """The pair again and again, each time for other pictures."""
    return [replace(item, name=f"{k + 1}.png") for k, item in enumerate(PAIR * times)]


digit = st.tuples(
    st.integers(0, 9), st.tuples(*[st.integers(-30, 900)] * 2, *[st.integers(1, 500)] * 2).map(lambda b: list(b))
)
numbers = st.lists(st.lists(digit, min_size=1, max_size=6), min_size=1, max_size=5)


# Reading what MATLAB writes


@PROPERTY
@given(numbers)
def test_whatever_is_written_is_read(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("mat") / "digitStruct.mat"
    notes = [note(f"{k + 1}.png", [b for _, b in number], [d for d, _ in number]) for k, number in enumerate(found)]
    write_digit_struct(path, notes)
    data = read_digit_struct(path)
    assert data.names == [n.name for n in notes]
    assert np.diff(data.digits).tolist() == [len(n.labels) for n in notes]
    np.testing.assert_array_equal(data.boxes, np.concatenate([n.boxes for n in notes]))
    np.testing.assert_array_equal(data.labels, np.concatenate([n.labels for n in notes]))


def test_the_layout_is_matlabs(tmp_path):
    path = tmp_path / "digitStruct.mat"
    write_digit_struct(path, PAIR)
    assert path.read_bytes().startswith(b"MATLAB 7.3 MAT-file") and path.read_bytes()[124:128] == b"\x00\x02IM"
    with h5py.File(path) as file:
        assert file.userblock_size == 512
        assert file["digitStruct/name"].shape == file["digitStruct/bbox"].shape == (2, 1)
        name = file[file["digitStruct/name"][0, 0]]
        assert name.dtype == np.uint16 and name.shape == (5, 1) and bytes(name[:, 0].astype(np.uint8)) == b"1.png"
        many, single = (file[file["digitStruct/bbox"][k, 0]] for k in (0, 1))
        assert sorted(many) == ["height", "label", "left", "top", "width"]
        assert many["left"].shape == (2, 1) and h5py.check_ref_dtype(many["left"].dtype) is h5py.Reference
        assert file[many["left"][1, 0]][()].tolist() == [[323.0]]
        assert single["label"].dtype == np.float64 and single["label"][()].tolist() == [[10.0]]


def rewrite(path: Path, **options) -> None:
    """The same annotations in another make: types, storage and file version that HDF5 allows."""
    libver = options.pop("libver", "earliest")
    kind = options.pop("kind", np.float64)
    with h5py.File(path, "w", userblock_size=512, libver=libver) as file:
        pool = file.create_group("#refs#")
        names, boxes = [], []
        for k, item in enumerate(many(3)):
            names.append(pool.create_dataset(f"n{k}", data=np.array([[ord(c)] for c in item.name], np.uint16)).ref)
            group = pool.create_group(f"b{k}")
            boxes.append(group.ref)
            columns = [*item.boxes.T, np.where(item.labels == 0, 10, item.labels)]
            for field, values in zip(("left", "top", "width", "height", "label"), columns, strict=True):
                cells = [np.array([[v]], dtype=kind) for v in values]
                if len(cells) == 1:
                    group.create_dataset(field, data=cells[0], **options)
                    continue
                own = [pool.create_dataset(f"v{k}{field}{j}", data=c, **options) for j, c in enumerate(cells)]
                own[0].attrs["MATLAB_class"] = np.bytes_("double")  # a header of another length
                column = group.create_dataset(field, (len(own), 1), dtype=h5py.ref_dtype)
                column[:, 0] = [data.ref for data in own]
        for field, references in (("name", names), ("bbox", boxes)):
            column = file.create_dataset(f"digitStruct/{field}", (len(references), 1), dtype=h5py.ref_dtype)
            column[:, 0] = references


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": np.int32},
        {"kind": np.float32},
        {"chunks": (1, 1)},
        {"chunks": (1, 1), "compression": "gzip"},
        {"libver": "latest"},
    ],
    ids=["plain", "int32", "float32", "chunked", "compressed", "latest"],
)
def test_other_makes_of_the_same_file_read_the_same(tmp_path, options):
    path = tmp_path / "digitStruct.mat"
    rewrite(path, **options)
    data = read_digit_struct(path)
    assert data.boxes.tolist() == [[246, 77, 81, 219], [323, 81, 96, 219], [-1, -5, 40, 60]] * 3
    assert data.labels.tolist() == [1, 9, 0] * 3


def test_the_fast_way_reads_what_hdf5_reads(tmp_path, monkeypatch):
    path = tmp_path / "digitStruct.mat"
    rng = np.random.default_rng(0)
    notes = [note(f"{k + 1}.png", rng.normal(9, 2, (3, 4)) ** 2, rng.integers(0, 10, 3)) for k in range(50)]
    write_digit_struct(path, notes)
    used = []
    plain = LoneNumbers.read
    monkeypatch.setattr(LoneNumbers, "read", lambda self, a: used.append(plain(self, a)) or used[-1])
    fast = read_digit_struct(path)
    assert len(used) == 1 and used[0][1].all()  # every single number was fetched in bulk
    monkeypatch.setattr(LoneNumbers, "usable", False)
    slow = read_digit_struct(path)
    assert (fast.boxes == slow.boxes).all() and (fast.labels == slow.labels).all() and fast.names == slow.names


def test_reading_asks_little_of_each_scene(tmp_path):
    """The 33,402 scenes of train take 17 s of one core like that; every number fetched by itself, three times as long.

    Calls are counted, for seconds depend on what else the machine does.
    """
    rng = np.random.default_rng(1)
    counts = rng.choice([1, 2, 3, 4], 150, p=[0.154, 0.543, 0.26, 0.043])
    notes = [note(f"{k + 1}.png", rng.integers(1, 90, (n, 4)), rng.integers(0, 10, n)) for k, n in enumerate(counts)]
    calls = []
    for number in (50, 150):
        path = tmp_path / f"{number}.mat"
        write_digit_struct(path, notes[:number])
        profile = cProfile.Profile()
        data = profile.runcall(read_digit_struct, path)
        assert len(data.labels) == counts[:number].sum()
        calls.append(pstats.Stats(profile).total_calls)
    assert (calls[1] - calls[0]) / 100 < 180


# Damaged and foreign files


@PROPERTY
@given(st.floats(0, 0.9999))
def test_a_truncated_file_is_never_taken_for_a_whole_one(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("cut")
    whole, path = folder / "whole.mat", folder / "digitStruct.mat"
    write_digit_struct(whole, many(20))
    content = whole.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DigitStructError, match=r"digitStruct\.mat"):
        read_digit_struct(path)


@PROPERTY
@given(st.integers(512, 30_000), st.integers(1, 255))
def test_a_flipped_byte_gives_an_error_or_numbers_that_are_boxes(tmp_path_factory, position, change):
    path = tmp_path_factory.mktemp("flip") / "digitStruct.mat"
    write_digit_struct(path, many(5))
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= change
    path.write_bytes(content)
    try:
        data = read_digit_struct(path)
    except DigitStructError:
        return
    assert len(data.boxes) == len(data.labels) == data.digits[-1]
    assert np.isfinite(data.boxes).all() and (data.boxes[:, 2:] > 0).all()
    assert np.isin(data.labels, range(10)).all()


def breaks(change):
    """A file whose third entry (of six) is changed by `change(file, group of the bbox, name)`."""

    def make(path: Path) -> None:
        rewrite(path)
        with h5py.File(path, "r+") as file:
            change(file, file[file["digitStruct/bbox"][2, 0]], file["digitStruct/name"])

    return make


def put(group, field, value):
    del group[field]
    group.create_dataset(field, data=value)


def first(file, group, field, value):
    file[group[field][0, 0]][...] = value


def table(file):
    return file.create_dataset("table", data=np.ones((2, 2))).ref


FAULTS = {
    "label 11": breaks(lambda f, g, n: first(f, g, "label", 11)),
    "label 0": breaks(lambda f, g, n: first(f, g, "label", 0)),
    "half a label": breaks(lambda f, g, n: first(f, g, "label", 2.5)),
    "not a number": breaks(lambda f, g, n: first(f, g, "left", np.nan)),
    "infinite": breaks(lambda f, g, n: first(f, g, "height", np.inf)),
    "no width": breaks(lambda f, g, n: first(f, g, "width", 0)),
    "negative height": breaks(lambda f, g, n: first(f, g, "height", -3)),
    "missing field": breaks(lambda f, g, n: g.__delitem__("top")),
    "text for a number": breaks(lambda f, g, n: put(g, "top", np.bytes_("abc"))),
    "lengths differ": breaks(lambda f, g, n: put(g, "top", np.array([[1.0]]))),
    "a number that is three": breaks(lambda f, g, n: put(g, "left", np.ones((3, 1)))),
    "a table for a number": breaks(
        lambda f, g, n: g["left"].__setitem__((0, 0), f.create_dataset("t", data=np.ones((2, 2))).ref)
    ),
    "a group for a number": breaks(lambda f, g, n: g["left"].__setitem__((0, 0), g.ref)),
    "no reference": breaks(lambda f, g, n: g["left"].__setitem__((0, 0), h5py.Reference())),
    "name of a path": breaks(lambda f, g, n: f[n[2, 0]].__setitem__((slice(None), 0), [ord(c) for c in "../x."])),
    "name of numbers": breaks(lambda f, g, n: n.__setitem__((2, 0), g.ref)),
    "many digits": breaks(lambda f, g, n: put(g, "left", np.full((5000, 1), g["left"][0, 0], h5py.ref_dtype))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_entry_is_named(tmp_path, fault):
    path = tmp_path / "digitStruct.mat"
    FAULTS[fault](path)
    with pytest.raises(DigitStructError) as error:
        read_digit_struct(path)
    assert "digitStruct.mat" in str(error.value) and "entry 3 of 6" in str(error.value)


@pytest.mark.parametrize("far", [1, 3], ids=["neighbours", "far apart"])
def test_two_entries_of_one_picture_are_refused(tmp_path, far):
    path = tmp_path / "digitStruct.mat"
    write_digit_struct(path, [note(f"{k}.png", [[1, 2, 3, 4]], [k]) for k in (1, 2, 3, far)])
    with pytest.raises(DigitStructError, match=rf"entry 4 of 4: its picture is {far}\.png.* of entry {far} already"):
        read_digit_struct(path)


def test_names_stay_as_they_are_written(tmp_path):
    """1.png and 01.png are two pictures, the second time too, when the index is read."""
    path = tmp_path / "digitStruct.mat"
    names = ["1.png", "01.png", "123456789.png", "000000000.png"]
    write_digit_struct(path, [note(name, [[1, 2, 3, 4]], [5]) for name in names])
    assert load_digit_struct(path).names == load_digit_struct(path).names == names


@pytest.mark.parametrize("entries", [2000, 10**6, 10**12, 2**59])
@pytest.mark.parametrize("options", [{}, {"chunks": (1024, 1)}, {"chunks": (1024, 1), "compression": "gzip"}])
def test_entries_that_the_file_cannot_hold_are_refused(tmp_path, entries, options):
    path = tmp_path / "digitStruct.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        for field in ("name", "bbox"):
            file.create_dataset(f"digitStruct/{field}", (entries, 1), dtype=h5py.ref_dtype, **options)
    with pytest.raises(DigitStructError, match=rf"digitStruct\.mat claims {entries} entries"):
        read_digit_struct(path)


@PROPERTY
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(0, 2**64 - 1))
def test_no_size_in_a_file_is_believed(tmp_path_factory, place, length, value):
    """Any eight bytes may claim any size: what comes is an error or numbers, never a lack of memory."""
    path = tmp_path_factory.mktemp("sizes") / "digitStruct.mat"
    write_digit_struct(path, PAIR)
    content = bytearray(path.read_bytes())
    place = 512 + place % (len(content) - 512 - length)
    content[place : place + length] = value.to_bytes(8, "little")[:length]
    path.write_bytes(content)
    try:
        assert np.isfinite(read_digit_struct(path).boxes).all()
    except DigitStructError as error:
        assert "digitStruct.mat" in str(error)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "digitStruct.mat"
    with pytest.raises(FileNotFoundError, match=r"digitStruct\.mat is missing"):
        read_digit_struct(path)
    for content in (b"", b"not HDF5 at all", b"\x89HDF\r\n\x1a\n" + bytes(200)):
        path.write_bytes(content)
        with pytest.raises(DigitStructError, match=r"digitStruct\.mat"):
            read_digit_struct(path)
    for contents in ({}, {"digitStruct/name": [1.0], "digitStruct/bbox": [2.0]}, {"digitStruct": [3]}):
        with h5py.File(path, "w") as file:
            for name, value in contents.items():
                file[name] = value
        with pytest.raises(DigitStructError, match="not SVHN's"):
            read_digit_struct(path)


# The index


def test_the_second_time_the_index_is_used(tmp_path, monkeypatch):
    path = tmp_path / "digitStruct.mat"
    write_digit_struct(path, PAIR)
    first_time = load_digit_struct(path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_digit_struct", lambda _: pytest.fail("read again"))
        second = load_digit_struct(path)
    assert second.names == first_time.names
    assert all(np.array_equal(a, b) for a, b in zip(second[1:], first_time[1:], strict=True))
    write_digit_struct(path, PAIR[1:])
    assert load_digit_struct(path).names == ["2.png"]


def test_a_damaged_index_is_made_again(tmp_path):
    path = tmp_path / "digitStruct.mat"
    write_digit_struct(path, PAIR)
    load_digit_struct(path)
    (index,) = (tmp_path / "cache").rglob("*.npz")
    index.write_bytes(index.read_bytes()[:100])
    assert load_digit_struct(path).labels.tolist() == [1, 9, 0]


def test_without_a_cache_there_is_a_warning(tmp_path, monkeypatch):
    path = tmp_path / "digitStruct.mat"
    write_digit_struct(path, PAIR)
    monkeypatch.setenv("LIPGUIDE_CACHE", str(path / "cache"))
    with pytest.warns(UserWarning, match="read anew each time"):
        assert load_digit_struct(path).labels.tolist() == [1, 9, 0]


# Pictures


@pytest.fixture
def root(tmp_path):
    SyntheticHouseNumbers("train", 4, seed=6, cache=False).save(tmp_path / "root")
    return tmp_path / "root"


def test_a_missing_picture_is_named_at_once(root):
    (root / "train" / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.png is missing \(entry 3"):
        SVHN(root, "train")


def test_a_missing_folder_says_how_to_get_it(root):
    with pytest.raises(FileNotFoundError, match="python -m lipguide data svhn"):
        SVHN(root, "test")
    with pytest.raises(ValueError, match="split must be one of"):
        SVHN(root, "validation")


@PROPERTY
@given(st.floats(0, 0.98))
def test_a_truncated_picture_is_named(tmp_path_factory, share):
    root = tmp_path_factory.mktemp("root")
    SyntheticHouseNumbers("train", 2, seed=6, cache=False).save(root)
    path = root / "train" / "2.png"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    data = SVHN(root, "train")
    assert data[0].image.shape[0] == 3
    with pytest.raises(PictureError, match=r"2\.png \(entry 2\)"):
        data[1]


def png(width: int, height: int, data: bytes = zlib.compress(bytes(100))) -> bytes:
    """A PNG of one-byte grey whose header claims a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(5000, 5000), (12000, 12000), (2**31 - 1, 2**31 - 1), (10**6, 1), (0, 5)])
def test_a_picture_of_a_size_that_its_file_cannot_hold_is_refused(root, size):
    (root / "train" / "2.png").write_bytes(png(*size))
    data = SVHN(root, "train")
    for look in (data.__getitem__, data.annotation):
        with pytest.raises(PictureError, match=r"2\.png \(entry 2\)"):
            look(1)


def test_an_even_picture_is_small_and_read(root):
    """Nothing packs better than one colour."""
    Image.new("1", (3000, 3000)).save(root / "train" / "1.png")
    (root / "train" / "1.mask.png").unlink()
    assert SVHN(root, "train")[0].pixels.shape == (3, 3000, 3000)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "EPS", "TIFF"])
def test_other_formats_are_refused_whatever_their_name(root, kind):
    path = root / "train" / "1.png"
    Image.open(path).convert("RGB").save(path, format=kind)
    with pytest.raises(PictureError, match=r"1\.png \(entry 1\)"):
        SVHN(root, "train")[0]


@PROPERTY
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_damaged_picture_is_an_error_or_a_picture(tmp_path_factory, place, value):
    """A byte is changed and its checksum set right, so that what reads the chunks meets it."""
    root = tmp_path_factory.mktemp("root")
    SyntheticHouseNumbers("train", 1, seed=6, cache=False).save(root)
    path = root / "train" / "1.png"
    content = bytearray(path.read_bytes())
    place = 8 + place % min(60, len(content) - 8)
    content[place] = value
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    try:
        assert SVHN(root, "train")[0].pixels.dtype == torch.uint8
    except PictureError as error:
        assert "entry 1" in str(error)


def test_a_foreign_mask_is_named(root):
    shutil.copy(root / "train" / "1.mask.png", root / "train" / "2.mask.png")
    Image.fromarray(np.full((5, 5), 7, np.uint8)).save(root / "train" / "1.mask.png")
    data = SVHN(root, "train")
    for index in (0, 1):
        with pytest.raises(PictureError, match=f"entry {index + 1}"):
            data[index]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_pictures_of_any_mode_come_as_colour(root, mode):
    path = root / "train" / "1.png"
    Image.open(path).convert(mode).save(path)
    image = SVHN(root, "train")[0].image
    assert image.shape[0] == 3 and image.dtype == torch.float32


def test_without_masks_the_mask_is_none(root):
    for path in (root / "train").glob("*.mask.png"):
        path.unlink()
    assert SVHN(root, "train")[2].mask is None


def test_boxes_that_stick_out_are_cut_off_and_boxes_outside_left_out():
    pixels, mask = np.zeros((50, 100, 3), np.uint8), np.zeros((50, 100), np.uint8)
    mask[:10, :10], mask[20:30, 50:60] = 1, 3
    boxes = np.array([[-10, -5, 30, 20], [200, 10, 10, 10], [50, 20, 80, 60]])
    scene = make_scene(pixels, boxes, np.array([4, 5, 6]), mask)
    torch.testing.assert_close(scene.boxes, torch.tensor([[0, 0, 0.2, 0.3], [0.5, 0.4, 1, 1]]))
    assert scene.labels.tolist() == [4, 6]
    assert scene.mask[5, 5] == 1 and scene.mask[25, 55] == 2 and set(scene.mask.unique().tolist()) == {0, 1, 2}


def test_annotations_keep_the_published_boxes(tmp_path):
    folder = tmp_path / "root" / "test"
    folder.mkdir(parents=True)
    write_digit_struct(folder / "digitStruct.mat", PAIR)
    for name, size in (("1.png", (741, 350)), ("2.png", (50, 60))):
        Image.new("RGB", size).save(folder / name)
    data = SVHN(tmp_path / "root", "test")
    assert data.annotation(1).boxes.tolist() == [[-1, -5, 40, 60]]
    assert (data.annotation(0).width, data.annotation(0).height) == (741, 350)
    assert data[1].boxes.min() == 0 and data[1].labels.tolist() == [0]
    with pytest.raises(IndexError, match="scene 2 of a data set of 2"):
        data[2]

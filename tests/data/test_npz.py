"""Files of arrays: whole, or refused by name; no size is believed that the file itself cannot hold."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from lipguide.data.npz import DamagedFile, load_arrays, save_arrays

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True)
tables = st.sampled_from([np.uint8, np.int64, np.float64, "S5"]).flatmap(
    lambda kind: arrays(kind, array_shapes(min_side=0, max_dims=3))
)


@PROPERTY
@given(st.dictionaries(st.sampled_from("abc"), tables))
def test_what_is_saved_is_loaded(tmp_path_factory, named):
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    save_arrays(path, named)
    found = load_arrays(path, named)
    assert found.keys() == named.keys()
    for name, array in named.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_order_in_memory_does_not_matter(tmp_path):
    table = np.asfortranarray(np.arange(6).reshape(2, 3))
    save_arrays(tmp_path / "a.npz", {"a": table})
    np.testing.assert_array_equal(load_arrays(tmp_path / "a.npz", ["a"])["a"], table)


@PROPERTY
@given(st.data())
def test_a_damaged_file_is_refused_or_holds_the_same(tmp_path_factory, data):
    """A byte is changed, or the file is cut."""
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    table = np.arange(300, dtype=np.int32)
    save_arrays(path, {"a": table, "b": table[::2]})
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place:]
    path.write_bytes(content)
    try:
        found = load_arrays(path, ["a", "b"])
    except DamagedFile as error:
        assert str(path) in str(error)
    else:
        np.testing.assert_array_equal(found["a"], table)
        np.testing.assert_array_equal(found["b"], table[::2])


def claiming(shape: str, descr: str = "'<f8'") -> bytes:
    """An .npy whose header claims a shape, with sixteen bytes behind it."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(16)


@pytest.mark.parametrize(
    "content",
    [
        claiming("(10**12,)"),
        claiming("(1000000000000,)"),
        claiming("(3,)"),
        claiming("(1,)"),
        claiming("(-2,)"),
        claiming("(4294967296, 4294967296, 4294967296)"),
        claiming("(2,)", "'|O'"),
        claiming("(2,)", "'nothing'"),
        b"",
        b"\x93NUMPY\x01",
    ],
)
def test_what_a_header_claims_is_compared_with_what_is_there(tmp_path, content):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(DamagedFile, match=r"a\.npz is damaged"):
        load_arrays(tmp_path / "a.npz", ["a"])


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path):
    memory = io.BytesIO()
    np.lib.format.write_array(memory, np.zeros(10**7))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", memory.getvalue())
    with pytest.raises(DamagedFile, match="claims 80"):
        load_arrays(tmp_path / "a.npz", ["a"])


def test_missing_arrays_are_damage_and_missing_files_are_missing(tmp_path):
    save_arrays(tmp_path / "a.npz", {"a": np.zeros(2)})
    with pytest.raises(DamagedFile):
        load_arrays(tmp_path / "a.npz", ["b"])
    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path / "b.npz", ["a"])

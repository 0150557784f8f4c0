"""The ledger keeps finite numbers with their provenance, and its files are whole or absent."""

import math

import numpy as np
import pytest
import torch

from lipguide.book.ledger import Ledger, lookup, read
from lipguide.provenance import device_name


def test_provenance_is_complete(tmp_path):
    ledger = Ledger("chapter", "quick", "cpu", 7, folder=tmp_path)
    ledger.used("SHN", "abc")
    content = read(ledger.save())
    expected = {
        "commit",
        "lock",
        "profile",
        "device",
        "threads",
        "torch",
        "python",
        "seed",
        "data",
        "start",
        "seconds",
        "peak_memory_mib",
    }
    assert set(content["provenance"]) == expected
    assert content["provenance"]["seed"] == 7 and content["provenance"]["data"] == {"name": "SHN", "hash": "abc"}
    assert content["provenance"]["device"] == device_name("cpu") and content["provenance"]["peak_memory_mib"] > 10


def test_values_become_plain_numbers(tmp_path):
    ledger = Ledger("chapter", "quick", "cpu", 0, folder=tmp_path)
    ledger["a"] = {"t": torch.arange(2), "n": np.float32(0.5), "l": [1, (2.0, True)], "s": "text", "none": None}
    assert read(ledger.save())["results"]["a"] == {
        "t": [0, 1],
        "n": 0.5,
        "l": [1, [2.0, True]],
        "s": "text",
        "none": None,
    }
    assert ledger["a"]["s"] == "text"


@pytest.mark.parametrize("value", [math.nan, torch.tensor(math.inf), [1.0, -math.inf]])
def test_only_finite_numbers_go_on_record(tmp_path, value):
    with pytest.raises(ValueError, match="only finite numbers"):
        Ledger("chapter", "quick", "cpu", 0, folder=tmp_path)["x"] = value


def test_things_that_are_no_numbers_are_refused(tmp_path):
    with pytest.raises(TypeError, match="Linear"):
        Ledger("chapter", "quick", "cpu", 0, folder=tmp_path)["x"] = torch.nn.Linear(1, 1)


def test_the_folder_may_be_set_from_outside(tmp_path, monkeypatch):
    monkeypatch.setenv("LIPGUIDE_RESULTS", str(tmp_path / "there"))
    assert Ledger("c", "full", "cpu", 0).save() == tmp_path / "there" / "c.full.json"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"results": {}}', "\x00\x01"])
def test_damaged_ledgers_are_named(tmp_path, text):
    path = tmp_path / "c.quick.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="c.quick.json is not a ledger"):
        read(path)


def test_lookup_says_what_there_is():
    content = {"a": {"b": [1, 2]}, "x.y": 3}
    assert lookup(content, "a.b.1") == 2 and lookup(content, "x.y") == 3
    for key in ("a.c", "a.b.2", "z", "a.b.1.0"):
        with pytest.raises(KeyError):
            lookup(content, key)

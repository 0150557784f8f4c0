"""The ledger keeps finite numbers with their provenance, and its files are whole or absent."""

import json
import math
import multiprocessing
import subprocess

import numpy as np
import pytest
import torch

from lipguide.book.ledger import Ledger, device_name, lookup, read, write_json


def test_provenance_is_complete(tmp_path):
    ledger = Ledger("chapter", "quick", "cpu", 7, folder=tmp_path)
    ledger.used("SHN", "abc")
    content = read(ledger.save())
    expected = {
        "commit",
        "lock",
        "profile",
        "device",
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


def _write(path):
    for i in range(40):
        write_json(path, {"value": [i] * 2000})


def test_two_writers_never_leave_half_a_file(tmp_path):
    path = tmp_path / "shared.json"
    write_json(path, {"value": []})
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(w.is_alive() for w in writers):
        assert isinstance(json.loads(path.read_text())["value"], list)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError):
        write_json(path, {"x": math.nan})
    assert json.loads(path.read_text()) == {"x": 1} and list(tmp_path.iterdir()) == [path]


def test_what_runs_write_does_not_mark_a_commit_as_changed(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True
        )

    for name in ("book/results/a.json", "lipguide/weights/a.safetensors", "lipguide/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    monkeypatch.setattr("lipguide.book.ledger.PACKAGE", tmp_path / "lipguide")

    def marks():
        commits = (Ledger("a", profile, "cpu", 0).provenance["commit"] for profile in ("quick", "train"))
        return [commit.endswith("+") for commit in commits]

    assert marks() == [False, False]
    (tmp_path / "book/results/a.json").write_text("two")
    assert marks() == [False, False]
    (tmp_path / "lipguide/weights/a.safetensors").write_text("two")
    assert marks() == [True, False]
    (tmp_path / "lipguide/a.py").write_text("two")
    assert marks() == [True, True]

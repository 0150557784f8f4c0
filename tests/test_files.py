"""Files are whole or not there, whatever stops their writer and however many there are."""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from lipguide.files import cache_folder, replacing, write_json


def write(path):
    for i in range(40):
        write_json(path, {"value": [i] * 2000})


def test_two_writers_never_leave_half_a_file(tmp_path, forked):
    path = tmp_path / "shared.json"
    write_json(path, {"value": []})
    code = f"from pathlib import Path; from tests.test_files import write; write(Path({str(path)!r}))"
    with ThreadPoolExecutor(1) as pool:
        writers = pool.submit(forked.ranks, code, tmp_path)
        while not writers.done():
            assert isinstance(json.loads(path.read_text())["value"], list)
    for writer in writers.result():
        assert writer.returncode == 0, writer.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError):
        write_json(path, {"x": math.nan})
    assert json.loads(path.read_text()) == {"x": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_writer_that_is_stopped_leaves_the_old_file_and_nothing_else(tmp_path, stop):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(stop), replacing(path) as temporary:
        temporary.write_text("ne")
        raise stop
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def _write_json(path):
    write_json(path, 1)


def _write_checkpoint(path):
    with replacing(path) as temporary:
        torch.save({"a": torch.ones(1)}, temporary)


def _write_weights(path):
    with replacing(path) as temporary:
        save_file({"a": torch.ones(1)}, temporary)


@pytest.mark.parametrize("write", [_write_json, _write_checkpoint, _write_weights])
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_is_as_open_to_others_as_the_user_asks(tmp_path, write, umask, mode):
    before = os.umask(umask)
    try:
        write(tmp_path / "a")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


def test_the_cache_is_where_the_user_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LIPGUIDE_CACHE", raising=False)
    assert cache_folder("shn", "a") == tmp_path / "lipguide" / "shn" / "a"
    monkeypatch.setenv("LIPGUIDE_CACHE", str(tmp_path / "own"))
    assert cache_folder("shn", "a") == tmp_path / "own" / "shn" / "a"

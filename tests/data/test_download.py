"""Downloading SVHN: resumed, checked, unpacked whole or not at all. Every server here is this machine itself."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipguide.data import SVHN, SVHN_TERMS, DownloadError, SyntheticHouseNumbers, download_svhn
from lipguide.data.svhn import download as module
from lipguide.data.svhn.download import ARCHIVES, Archive

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)


def packed(files: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    """A .tar.gz of files; a TarInfo stands for itself (a link, a device)."""
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz") as archive:
        for name, content in files.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = 0 if isinstance(content, tarfile.TarInfo) else len(content)
            archive.addfile(info, None if isinstance(content, tarfile.TarInfo) else io.BytesIO(content))
    return memory.getvalue()


@pytest.fixture(scope="module")
def archive_bytes(tmp_path_factory):
    """train.tar.gz of a small data set, as the official site packs it."""
    root = tmp_path_factory.mktemp("made")
    folder = SyntheticHouseNumbers("train", 3, cache=False).save(root)
    return packed({f"train/{p.name}": p.read_bytes() for p in sorted(folder.iterdir())} | {"train/see.m": b"%"})


@pytest.fixture(scope="module")
def archive_file(archive_bytes, tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "train.tar.gz"
    path.write_bytes(archive_bytes)
    return path


class Server:
    """A site with one file. ranges: answers Range requests; stop: breaks off after so many bytes of an answer;
    status: answers with this status instead."""

    def __init__(self, content: bytes) -> None:
        self.content, self.ranges, self.stop, self.status, self.asked = content, True, None, None, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.headers.get("Range"))
                if outer.status:
                    self.send_error(outer.status)
                    return
                start = 0
                if outer.ranges and self.headers.get("Range"):
                    start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                body = outer.content[start:]
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(outer.content) - 1}/{len(outer.content)}")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: outer.stop])

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(archive_bytes):
    server = Server(archive_bytes)
    yield server
    server.http.shutdown()
    server.http.server_close()


def described(content: bytes, split: str = "train") -> list[Archive]:
    return [Archive(split, len(content), hashlib.md5(content).hexdigest())]


def get(server: Server, root: Path, content: bytes | None = None) -> list[Path]:
    return download_svhn(root, site=server.url, archives=described(server.content if content is None else content))


def test_the_published_sizes_and_sums_are_the_known_ones():
    assert {a.split: a.size for a in ARCHIVES.values()} == {"train": 404141560, "test": 276555967, "extra": 1955489752}
    assert all(len(a.md5) == 32 for a in ARCHIVES.values())
    assert "non-commercial use only" in SVHN_TERMS


def test_a_whole_download_is_a_whole_data_set(server, tmp_path, monkeypatch):
    monkeypatch.setenv("LIPGUIDE_CACHE", str(tmp_path / "cache"))
    assert get(server, tmp_path / "root") == [tmp_path / "root" / "train"]
    assert len(SVHN(tmp_path / "root", "train")) == 3
    assert get(server, tmp_path / "root") and len(server.asked) == 1
    assert sorted(p.name for p in (tmp_path / "root").iterdir()) == ["train", "train.tar.gz"]


@pytest.mark.parametrize("ranges", [True, False], ids=["resuming server", "server without ranges"])
def test_a_broken_download_goes_on(server, tmp_path, ranges):
    server.ranges, server.stop = ranges, 1000
    with pytest.raises(DownloadError, match="run the same command again"):
        get(server, tmp_path)
    assert not (tmp_path / "train").exists() and (tmp_path / "train.tar.gz.part").stat().st_size == 1000
    server.stop = None
    get(server, tmp_path)
    assert server.asked == [None, "bytes=1000-"] and (tmp_path / "train" / "3.png").exists()


def test_a_wrong_sum_removes_the_file_and_unpacks_nothing(server, tmp_path):
    wrong = bytes(len(server.content))
    with pytest.raises(DownloadError, match="is not the published file"):
        get(server, tmp_path, wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [lambda c: c[:-7], lambda c: c + b"more"], ids=["too short", "too long"])
def test_a_wrong_size_is_an_error(server, tmp_path, change):
    published = server.content
    server.content = change(published)
    with pytest.raises(DownloadError):
        get(server, tmp_path, published)
    assert not (tmp_path / "train").exists() and not (tmp_path / "train.tar.gz").exists()


def test_what_a_server_refuses_is_reported(server, tmp_path):
    server.status = 404
    with pytest.raises(DownloadError, match="answers 404"):
        get(server, tmp_path)


def test_without_a_network_the_error_says_so(tmp_path):
    with pytest.raises(DownloadError, match="cannot be reached"):
        download_svhn(tmp_path, site="http://127.0.0.1:9", archives=described(b"x"))


def test_a_full_disk_is_reported_before_and_while_writing(server, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda _: os.terminal_size((0, 0)) and type("U", (), {"free": 5}))
        with pytest.raises(DownloadError, match="no room"):
            get(server, tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_receive", full)
    with pytest.raises(DownloadError, match="is full; make room"):
        get(server, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(module.shutil, "copyfileobj", full)
    with pytest.raises(DownloadError, match="is full; nothing was kept"):
        get(server, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["train.tar.gz"]


def test_an_interrupted_unpacking_leaves_no_half_set(server, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.shutil, "copyfileobj", stop)
    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["train.tar.gz"]
    monkeypatch.undo()
    get(server, tmp_path)
    assert len(server.asked) == 1


def test_an_archive_brought_by_hand_will_do(server, tmp_path):
    (tmp_path / "train.tar.gz").write_bytes(server.content)
    get(server, tmp_path)
    assert server.asked == [] and (tmp_path / "train" / "1.png").exists()


# Hostile archives


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


names = st.one_of(
    st.sampled_from(
        ["../evil", "/tmp/evil", "train/../../evil", "train/..", "train/a/b", "test/1.png", "evil", "train/..\\evil"]
    ),
    st.text("./\\ab:", min_size=1, max_size=12).filter(lambda n: n.strip("/.") and not n.endswith("/")),
)
kinds = st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])


@PROPERTY
@given(names, kinds, st.sampled_from(["/etc/passwd", "../../evil", "digitStruct.mat"]))
def test_no_path_leaves_the_folder(tmp_path_factory, name, kind, target):
    outer = tmp_path_factory.mktemp("outer")
    root = outer / "root"
    root.mkdir()
    entry = b"evil" if kind == tarfile.REGTYPE else special(name, kind, target)
    path = root / "train.tar.gz"
    path.write_bytes(packed({"train/digitStruct.mat": b"x", name: entry}))
    try:
        module._unpack(path, "train", root)
    except DownloadError:
        assert [p.name for p in root.iterdir()] == ["train.tar.gz"]
    else:  # a plain file with a plain name in train/
        assert kind == tarfile.REGTYPE
        assert all(
            p.is_file() and not p.is_symlink() and p.parent == root / "train" for p in (root / "train").iterdir()
        )
    assert [p.name for p in outer.iterdir()] == ["root"]
    assert not Path("/tmp/evil").exists()


def test_the_named_tricks_are_refused(tmp_path):
    tricks = {
        "up": {"../evil.png": b"x"},
        "absolute": {"/evil.png": b"x"},
        "through": {"train/../../evil.png": b"x"},
        "link": {"l": special("train/1.png", tarfile.SYMTYPE, "/etc/passwd")},
        "hard link": {"l": special("train/1.png", tarfile.LNKTYPE, "../../evil")},
        "twice": {"train/1.png": b"x", "train/./1.png": b"y"},
        "nothing": {},
    }
    for name, files in tricks.items():
        path = tmp_path / "train.tar.gz"
        path.write_bytes(packed(files if name == "nothing" else {"train/digitStruct.mat": b"x", **files}))
        with pytest.raises(DownloadError):
            module._unpack(path, "train", tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["train.tar.gz"], name


@PROPERTY
@given(st.floats(0, 0.999))
def test_a_truncated_archive_leaves_nothing(tmp_path_factory, archive_file, share):
    root = tmp_path_factory.mktemp("root")
    path = root / "train.tar.gz"
    content = archive_file.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DownloadError, match="nothing was"):
        module._unpack(path, "train", root)
    assert [p.name for p in root.iterdir()] == ["train.tar.gz"]

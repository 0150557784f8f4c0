"""SVHN from its official site: resumed, checked, unpacked whole or not at all."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from tqdm import tqdm

__all__ = ["ARCHIVES", "SITE", "Archive", "DownloadError", "download_svhn"]

SITE = "http://ufldl.stanford.edu/housenumbers"
CHUNK = 1 << 20
TIMEOUT = 60.0


class DownloadError(RuntimeError):
    """A download did not end well; the message says why and what to do."""


@dataclass(frozen=True)
class Archive:
    """One split's archive: split.tar.gz of so many bytes with this MD5 sum.

    >>> ARCHIVES["train"].name
    'train.tar.gz'
    """

    split: str
    size: int
    md5: str

    @property
    def name(self) -> str:
        return f"{self.split}.tar.gz"


ARCHIVES = {
    "train": Archive("train", 404141560, "a649f4cb15c35520e8a8c342d4c0005a"),
    "test": Archive("test", 276555967, "790d9c8d42f1fcbd219b59956c853a81"),
    "extra": Archive("extra", 1955489752, "606f41243d71ca4d5fe66dbaf1f02bee"),
}


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _is_whole(path: Path, archive: Archive) -> bool:
    return path.is_file() and path.stat().st_size == archive.size and _md5(path) == archive.md5


def _receive(url: str, partial: Path, archive: Archive) -> None:
    """Fetch what is missing of a file, from where the last run stopped if the server can do that."""
    start = partial.stat().st_size if partial.exists() else 0
    if start >= archive.size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        if start and not (
            answer.status == 206 and str(answer.headers.get("Content-Range", "")).startswith(f"bytes {start}-")
        ):
            start = 0
        with (
            open(partial, "ab" if start else "wb") as file,
            tqdm(total=archive.size, initial=start, unit="B", unit_scale=True, desc=archive.name, disable=None) as bar,
        ):
            while file.tell() <= archive.size and (chunk := answer.read(CHUNK)):
                file.write(chunk)
                bar.update(len(chunk))


def _fetch(archive: Archive, root: Path, site: str) -> Path:
    """The archive in `root`, checked; what has arrived stays in NAME.part until it is whole."""
    path, partial = root / archive.name, root / f"{archive.name}.part"
    if _is_whole(path, archive):
        return path
    url = f"{site}/{archive.name}"
    have = partial.stat().st_size if partial.exists() else 0
    if shutil.disk_usage(root).free < archive.size - have:
        raise DownloadError(f"no room for {archive.name}: {root} has less than the {archive.size - have} bytes needed")
    resume = f"run the same command again to go on from what is in {partial}"
    try:
        _receive(url, partial, archive)
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise DownloadError(f"{url} cannot be reached or broke off ({reason}); with a network, {resume}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DownloadError(f"the disk of {root} is full; make room, then {resume}") from error
        raise DownloadError(f"{partial} cannot be written: {error}") from error
    size = partial.stat().st_size
    if size < archive.size:
        raise DownloadError(f"{url} broke off after {size} of {archive.size} bytes; {resume}")
    found = _md5(partial) if size == archive.size else "another size"
    if found != archive.md5:
        partial.unlink()
        raise DownloadError(f"{url} is not the published file: its MD5 is {found}, not {archive.md5}; it was removed")
    os.replace(partial, path)
    return path


def _unpack(path: Path, split: str, root: Path) -> Path:
    """Unpack an archive into root/split: first beside it, renamed when whole. Only plain files under `split/` are
    accepted: a link, a device or a path that leads elsewhere is an error, and nothing is left behind."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{split}.", suffix=".part", dir=root))
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in tqdm(archive, desc=f"unpacking {path.name}", unit="file", disable=None):
                where = PurePosixPath(member.name)
                parts = [part for part in where.parts if part != "."]
                if member.isdir() and parts in ([], [split]):
                    continue
                if not member.isreg() or where.is_absolute() or len(parts) != 2 or parts[0] != split:
                    raise DownloadError(
                        f"{path}: {member.name!r} is not a plain file in {split}/; nothing was unpacked"
                    )
                name = parts[1]
                if name in ("", "..") or "\\" in name or ":" in name or "\0" in name:
                    raise DownloadError(f"{path}: {member.name!r} is no name for a file; nothing was unpacked")
                with open(temporary / name, "xb") as file:
                    shutil.copyfileobj(archive.extractfile(member), file, CHUNK)
            while stream.read(CHUNK):  # to the end, where the checksum is
                pass
        if not (temporary / "digitStruct.mat").is_file():
            raise DownloadError(f"{path} holds no {split}/digitStruct.mat; nothing was unpacked")
        temporary.chmod(0o755)
        os.rename(temporary, root / split)
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        reason = f"the disk of {root} is full" if full else error
        raise DownloadError(f"{path} could not be unpacked: {reason}; nothing was kept") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root / split


def download_svhn(
    root: str | Path,
    extra: bool = False,
    site: str = SITE,
    archives: Sequence[Archive] | None = None,
) -> list[Path]:
    """Fetch and unpack train and test, and extra if asked for, into root/train, root/test, root/extra.

    A split whose folder is there already is left alone, and an archive that is there is not fetched again (so one
    that was brought by hand will do). Size and MD5 are checked before anything is unpacked. The archives stay in
    `root`; they may be deleted.

    Args:
        root: the folder of the splits.
        extra: whether to fetch extra too.
        site: a mirror of the official one.
        archives: what a mirror must hold.

    SVHN is for non-commercial use only: see `SVHN_TERMS`.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    wanted = archives or [ARCHIVES[split] for split in ("train", "test", *(("extra",) if extra else ()))]
    folders = []
    for archive in wanted:
        folder = root / archive.split
        if not folder.exists():
            _unpack(_fetch(archive, root, site), archive.split, root)
        folders.append(folder)
    return folders

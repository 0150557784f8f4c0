"""Synthetic House Numbers: the same scene everywhere, SVHN's geometry, masks that fit, a cache that keeps its word."""

from __future__ import annotations

import hashlib
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from lipguide.__main__ import VERSIONS
from lipguide.data import SVHN, Difficulty, SyntheticHouseNumbers, contact_sheet, geometry, geometry_table, svhn_facts
from lipguide.data.shn import cache as module
from lipguide.data.shn import processes, typefaces
from lipguide.data.shn.cache import PACKAGE, content_hash, load_pages, sources
from lipguide.data.shn.glyphs import glyphs_missing, keep_drawn, take_glyphs
from lipguide.data.shn.ink import sample_hand
from lipguide.data.shn.layout import sample_layout
from lipguide.data.shn.looks import DEFAULT, LOOKS, look_of
from lipguide.data.shn.pages import Pages
from lipguide.data.shn.rendering import render
from lipguide.data.shn.strokes import FLAT, skeleton
from lipguide.data.shn.typefaces import FACES
from tests.drawn import other_libraries_draw

EASY = Difficulty(blur=0.0, contrast=0.0, noise=0.0, occlusion=0.0)


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def some():
    return SyntheticHouseNumbers("train", 60, seed=3, cache=False)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# The same scene everywhere


def test_a_scene_depends_on_seed_split_and_index_alone(some):
    backwards = [render("train", 3, k, Difficulty()) for k in (40, 7, 0)]
    assert [e.picture for e in backwards] == [some._pages[k].picture for k in (40, 7, 0)]
    assert len({render(s, seed, 0, Difficulty()).picture for s in ("train", "test") for seed in (0, 1)}) == 4


def test_a_smaller_set_is_the_beginning_of_a_larger_one(some):
    few = SyntheticHouseNumbers("train", 5, seed=3)
    assert len(few) == 5 and all(same(few[k], some[k]) for k in range(5))


@pytest.mark.parametrize("version", LOOKS)
def test_the_number_of_processes_does_not_matter(version):
    size = module.BLOCK + 20
    alone = load_pages("test", size, 9, EASY, cache=False, workers=1, version=version)
    shared = load_pages("test", size, 9, EASY, cache=False, workers=2, version=version)
    assert len(shared) == size
    for name, array in alone.arrays.items():
        np.testing.assert_array_equal(array, shared.arrays[name])


# Code that draws, in a process that loads nothing but what draws.
ALONE = f"""
import sys
from types import ModuleType
for name, folder in (("lipguide", ""), ("lipguide.data", "/data"), ("lipguide.data.shn", "/data/shn")):
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [{str(PACKAGE)!r} + folder]
"""
HASH = f"""
{ALONE}
import hashlib
from lipguide.data.shn.difficulty import Difficulty
from lipguide.data.shn.rendering import render
digest = hashlib.sha256()
for index in range(8):
    scene = render("train", 11, index, Difficulty())
    digest.update(scene.picture + scene.mask)
print(digest.hexdigest())
"""


def test_processors_without_vector_units_make_the_same_pictures():
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    units = " ".join(name for name in __cpu_dispatch__ if __cpu_features__.get(name))
    if not units:
        pytest.skip("this processor has nothing to switch off")
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": units}
    done = subprocess.run([sys.executable, "-c", HASH], env=environment, capture_output=True, text=True, check=True)
    digest = hashlib.sha256()
    for index in range(8):
        scene = render("train", 11, index, Difficulty())
        digest.update(scene.picture + scene.mask)
    assert done.stdout.strip() == digest.hexdigest()


# Versions that are frozen

FROZEN = {
    1: "d134daa367355732a1b3be408d0189c8eab568a4d7c15bf429327781adfaac89",
    2: "483db2302993c3cba655b16f3028093a8348e3fea2843fad2bba832a7fb84946",
    3: "4e713fe6e53a8c4c0f1ec27b5c9145f3890edce2a7f4bd91f9d2cf3f4b60285e",
}


@pytest.mark.parametrize("version", LOOKS)
def test_a_version_draws_the_same_scenes_for_ever(version):
    """Weights were trained on them: what changes a pixel of a version belongs into another one."""
    if other_libraries_draw():
        pytest.skip("other versions of the libraries that draw may change single pixels")
    digest = hashlib.sha256()
    for split in ("train", "test"):
        for index in range(60):
            scene = render(split, 11, index, Difficulty(), version)
            digest.update(scene.picture + scene.mask + scene.boxes.tobytes() + scene.labels.tobytes())
    assert digest.hexdigest() == FROZEN[version]


def test_the_third_version_has_the_looks_of_the_first_and_of_the_second_in_turn():
    for index in range(4):
        earlier, later = look_of(1 + index % 2), look_of(3, index)
        differ = {field.name for field in fields(earlier) if getattr(earlier, field.name) != getattr(later, field.name)}
        assert differ == {"askew", "faces"}
    with pytest.raises(ValueError, match="version must be one of 1, 2, 3, not 4"):
        render("train", 0, 0, Difficulty(), 4)


def test_digits_askew_lean_and_rise_more_and_threes_have_flat_tops_more_often():
    for pair in ((look_of(1), look_of(3, 0)), (look_of(2), look_of(3, 1))):
        hands = [[sample_hand("train", 0.0, look, np.random.default_rng(k)) for k in range(400)] for look in pair]
        slants = np.array([[hand.slant for hand in some] for some in hands])
        rises = np.array([[hand.rise for hand in some] for some in hands])
        share = (slants[0] != slants[1]).mean()
        assert 0.2 < share < 0.4 and slants[1].std() > 1.2 * slants[0].std() and rises[1].std() > 2 * rises[0].std()
        flat = [np.mean([FACES[hand.face].kind == "flat" for hand in some]) for some in hands]
        assert flat[0] == 0 and 0.05 < flat[1] < 0.2
    for pen in FLAT:
        assert skeleton(3, pen)[0][:2, 1].tolist() == [0.0, 0.0]


def test_versions_differ_in_looks_and_not_in_geometry():
    sets = [SyntheticHouseNumbers("train", 40, seed=3, cache=False, version=version) for version in LOOKS]
    for scenes in zip(*sets, strict=True):
        for one, other in itertools.combinations(scenes, 2):
            assert torch.equal(one.boxes, other.boxes) and torch.equal(one.labels, other.labels)
            assert not torch.equal(one.pixels, other.pixels)
    assert [data.name for data in sets] == [f"Synthetic House Numbers {version}" for version in LOOKS]


def test_the_third_version_is_the_one_that_nobody_asks_for(some):
    asked = SyntheticHouseNumbers("train", 5, seed=3, cache=False, version=3)
    assert all(same(asked[k], some[k]) for k in range(5))


@pytest.mark.parametrize("version", [0, 4, "2", 1.5, None])
def test_a_version_that_there_is_not_is_refused(version):
    with pytest.raises(ValueError, match="version"):
        SyntheticHouseNumbers("train", 1, cache=False, version=version)


def test_the_command_line_offers_the_versions_that_there_are():
    assert tuple(LOOKS) == VERSIONS and VERSIONS[-1] == DEFAULT  # which is what it writes when nobody asks


def test_versions_do_not_mix_in_the_cache():
    for version in LOOKS:
        kept = SyntheticHouseNumbers("train", 3, seed=2, version=version)
        again = SyntheticHouseNumbers("train", 3, seed=2, version=version)
        fresh = SyntheticHouseNumbers("train", 3, seed=2, version=version, cache=False)
        assert all(same(kept[k], fresh[k]) and same(again[k], fresh[k]) for k in range(3))
    assert len({content_hash("train", 2, Difficulty(), version) for version in LOOKS}) == len(LOOKS)


# What an item is


def test_items_keep_the_contract(some):
    for index in range(len(some)):
        image, boxes, labels, mask = some[index]
        assert image.dtype == torch.float32 and image.ndim == 3 and image.shape[0] == 3
        assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.01
        assert boxes.shape == (len(labels), 4) and labels.dtype == torch.int64
        assert (boxes >= 0).all() and (boxes <= 1).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert ((labels >= 0) & (labels <= 9)).all()
        assert mask.dtype == torch.uint8 and mask.shape == image.shape[1:] and mask.max() <= len(labels)


@pytest.mark.parametrize("version", LOOKS)
def test_every_digit_has_ink_and_nearly_all_of_it_in_its_box(version):
    for _, boxes, labels, mask in SyntheticHouseNumbers("train", 60, seed=3, cache=False, version=version):
        height, width = mask.shape
        for k in range(len(labels)):
            rows, columns = torch.nonzero(mask == k + 1, as_tuple=True)
            x0, y0, x1, y1 = (boxes[k] * torch.tensor([width, height, width, height])).tolist()
            slack = 0.12 * (y1 - y0) + 1
            inside = (columns + 0.5 > x0 - slack) & (columns + 0.5 < x1 + slack)
            inside &= (rows + 0.5 > y0 - slack) & (rows + 0.5 < y1 + slack)
            assert len(rows) > 0.04 * (x1 - x0) * (y1 - y0)
            assert inside.float().mean() > 0.97


@pytest.mark.parametrize("version", LOOKS)
def test_masks_say_where_the_ink_is(version):
    """Without nuisances the pixels of the mask differ in brightness from those around them."""
    data = SyntheticHouseNumbers("train", 80, seed=5, difficulty=EASY, cache=False, version=version)
    differs = 0
    for index in range(len(data)):
        image, _, _, mask = data[index]
        grey, ink = image.mean(dim=0), mask > 0
        wide = torch.nn.functional.max_pool2d(ink[None].float(), 9, 1, 4)[0] > 0
        near = torch.nn.functional.max_pool2d(ink[None].float(), 3, 1, 1)[0] > 0
        differs += bool((grey[ink].mean() - grey[wide & ~near].mean()).abs() > 0.06)
    assert differs >= 76


def test_bad_arguments_are_refused(some):
    with pytest.raises(ValueError, match="split must be one of train, test"):
        SyntheticHouseNumbers("extra", 1)
    for index in (60, -1):
        with pytest.raises(IndexError, match="of 60"):
            some[index]


@pytest.mark.parametrize("value", [-1, 1.5, "3", True, float("nan")])
@pytest.mark.parametrize("name", ["size", "seed", "workers"])
def test_what_is_no_whole_number_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*give it a whole number"):
        SyntheticHouseNumbers("train", **{"size": 1, "cache": False, name: value})


def test_no_seed_and_no_process_make_no_scene():
    for arguments in ({"seed": None}, {"workers": 0}):
        with pytest.raises(ValueError, match="whole number"):
            SyntheticHouseNumbers("train", 1, cache=False, **arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 4.1, None, "1", np.nan])
@pytest.mark.parametrize("knob", ["blur", "contrast", "noise", "occlusion"])
def test_a_knob_is_a_number_from_0_to_4(knob, value):
    with pytest.raises(ValueError, match=rf"Difficulty\.{knob} must be a number between 0 and 4"):
        Difficulty(**{knob: value})


def test_an_empty_set_is_empty():
    empty = SyntheticHouseNumbers("train", 0)
    assert len(empty) == 0 and list(empty.annotations()) == []


# Difficulty


def _mean(difficulty: Difficulty, measure) -> float:
    data = SyntheticHouseNumbers("train", 40, seed=1, difficulty=difficulty, cache=False)
    return float(np.mean([measure(data[k].image.mean(dim=0)) for k in range(len(data))]))


def _detail(grey: torch.Tensor) -> float:
    return float((grey[:, 1:] - grey[:, :-1]).abs().mean())


def test_every_knob_does_what_it_says():
    sharp, soft = (_mean(Difficulty(blur=b, noise=0), _detail) for b in (0.3, 2.0))
    assert soft < 0.8 * sharp
    strong, faint = (_mean(Difficulty(contrast=c, noise=0), lambda g: float(g.std())) for c in (0.0, 2.0))
    assert faint < 0.85 * strong
    clean, noisy = (_mean(Difficulty(blur=2, noise=n), _detail) for n in (0.0, 2.0))
    assert noisy > 1.2 * clean
    bare = [render("train", 1, k, Difficulty(occlusion=0)).picture for k in range(40)]
    covered = [render("train", 1, k, Difficulty(occlusion=3)).picture for k in range(40)]
    assert sum(a != b for a, b in zip(bare, covered, strict=True)) > 15


def test_difficulty_changes_no_box_and_no_label():
    easy, hard = (render("test", 0, 4, d) for d in (EASY, Difficulty(2, 2, 2, 2)))
    assert (easy.boxes == hard.boxes).all() and (easy.labels == hard.labels).all()
    assert easy.mask == hard.mask and easy.picture != hard.picture


# Geometry


@pytest.mark.parametrize("split", ["train", "test"])
def test_geometry_follows_the_published_figures(split):
    layouts = [sample_layout(split, np.random.default_rng((8, k))) for k in range(4000)]
    figures, published = geometry(layouts), svhn_facts()[split]
    rows = geometry_table(figures, split)
    assert {row["figure"]: row["difference"] for row in rows if not row["difference"] < 0.12} == {}
    for name in ("label_counts", "digits_per_image"):
        total = sum(published[name].values())
        for key, count in published[name].items():
            ours = figures[name].get(key, 0) / sum(figures[name].values())
            assert abs(ours - count / total) < 0.02, (name, key)
    for key, aspect in published["median_aspect_by_label"].items():
        assert abs(figures["median_aspect_by_label"][key] - aspect) < 0.03


def test_geometry_of_a_known_scene():
    from types import SimpleNamespace

    note = SimpleNamespace(width=100, height=50, boxes=[[20, 10, 10, 25], [32, 15, 15, 25]], labels=[3, 0])
    figures = geometry([note])
    assert figures["gap_between_neighbours_over_height"] == [0.08] * 7
    assert figures["vertical_shift_between_neighbours_over_height"] == [0.2] * 7
    assert figures["number_width_over_image"] == [0.27] * 7
    assert figures["number_centre_x_over_image"] == [0.335] * 7
    assert figures["label_counts"]["10"] == 1 and figures["label_counts"]["3"] == 1


# The cache


def test_the_second_time_nothing_is_drawn(monkeypatch):
    first = SyntheticHouseNumbers("test", 6, seed=2)
    monkeypatch.setattr(module, "render", lambda *_: pytest.fail("drawn again"))
    again = SyntheticHouseNumbers("test", 6, seed=2)
    assert all(same(first[k], again[k]) for k in range(6))
    assert len(SyntheticHouseNumbers("test", 4, seed=2)) == 4


def test_a_cache_that_cannot_be_made_is_an_error_that_helps(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LIPGUIDE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="LIPGUIDE_CACHE"):
        SyntheticHouseNumbers("test", 1)


def test_without_the_cache_nothing_is_written(tmp_path):
    SyntheticHouseNumbers("test", 2, cache=False)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:500] + b"\xff" + b[501:]])
def test_a_damaged_block_is_made_again(tmp_path, damage):
    good = SyntheticHouseNumbers("train", 4, seed=2)
    (path,) = (tmp_path / "cache").rglob("*.npz")
    path.write_bytes(damage(path.read_bytes()))
    again = SyntheticHouseNumbers("train", 4, seed=2)
    assert all(same(good[k], again[k]) for k in range(4))
    assert len(Pages.load(path)) == 4


def test_an_interrupted_run_leaves_whole_blocks_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 3)
    drawn = []

    def stop_at_five(split, seed, index, *which):
        if index == 4 and len(drawn) < 6:
            drawn.append("stop")
            raise KeyboardInterrupt
        drawn.append(index)
        return render(split, seed, index, *which)

    monkeypatch.setattr(module, "render", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        load_pages("train", 8, 0, EASY)
    assert [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()] == ["00000-003.npz"]
    drawn.extend([None] * 6)
    pages = load_pages("train", 8, 0, EASY)
    assert drawn[-5:] == [3, 4, 5, 6, 7]
    assert pages[6].picture == render("train", 0, 6, EASY).picture


def test_the_key_covers_everything_a_picture_depends_on():
    keys = {content_hash(s, n, d) for s in ("train", "test") for n in (0, 1) for d in (EASY, Difficulty())}
    assert len(keys) == 8
    assert content_hash("train", 0, Difficulty(0.8, 0.4, 2, 3)) == content_hash("train", 0, Difficulty(noise=2.0))


def worker(task: dict, *options: str, **how) -> subprocess.CompletedProcess:
    """A process that makes blocks, as `load_pages` starts it."""
    python, *rest = processes.command(task)
    return subprocess.run([python, *options, *rest], capture_output=True, text=True, timeout=120, **how)


def one_scene(folder: Path) -> dict:
    what = {"split": "train", "seed": 0, "difficulty": {}, "version": 1, "parts": [[0, 1]]}
    return {"make": "scenes", "folder": str(folder), "glyphs": str(folder / "glyphs"), **what}


def test_processes_that_draw_import_nothing_that_only_networks_need(tmp_path):
    done = worker(one_scene(tmp_path), "-X", "importtime")
    assert done.returncode == 0 and done.stdout == "1\n"
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"numpy", "lipguide.data.shn.rendering"} <= imported
    assert not imported & {"torch", "torchvision", "torchmetrics", "h5py", "lipguide", "lipguide.data"}
    assert {"matplotlib.textpath", "scipy.spatial"} <= imported  # this one had to draw its glyphs
    assert Pages.load(tmp_path / "00000-001.npz")[0].picture == render("train", 0, 0, Difficulty(), version=1).picture


DRAWN = f"""
{ALONE}
import lipguide.data.shn.rendering
print(*(module.__file__ for name, module in sys.modules.items() if name.startswith("lipguide.") and module.__spec__))
"""


def test_the_key_hashes_every_file_that_draws_and_no_other():
    """What Python really loads to draw a scene, beside what is found by reading the source."""
    command = [sys.executable, "-c", DRAWN]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {str(path) for path in sources()} == {*loaded, str(PACKAGE / "data" / "svhn_facts.json")}
    assert not {"cache.py", "pages.py", "worker.py", "__init__.py"} & {path.name for path in sources()}


def test_a_process_alone_keeps_its_glyphs_for_the_next_one(tmp_path, monkeypatch):
    first = load_pages("train", module.MANY, 6, Difficulty())
    for path in (tmp_path / "cache").rglob("00000-*.npz"):
        path.unlink()
    monkeypatch.setattr(typefaces, "draw_glyph", lambda *_: pytest.fail("drawn again"))
    typefaces.GLYPHS.clear()
    again = load_pages("train", module.MANY, 6, Difficulty())
    np.testing.assert_array_equal(first.arrays["bytes"], again.arrays["bytes"])


def test_a_damaged_file_of_glyphs_is_made_again(tmp_path):
    before = {key: typefaces.glyph(*key) for key in ((0, 3), (30, 8))}
    keep_drawn(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:200])
    assert glyphs_missing(tmp_path) == list(range(len(typefaces.FACES)))
    keep_drawn(tmp_path)
    typefaces.GLYPHS.clear()
    take_glyphs(tmp_path)
    for key, glyph in before.items():
        assert np.array_equal(typefaces.GLYPHS[key].field, glyph.field) and typefaces.GLYPHS[key].cell == glyph.cell


def test_another_layout_of_the_files_is_another_folder(monkeypatch):
    key = content_hash("train", 0, EASY)
    monkeypatch.setattr(module, "BLOCK", 128)
    assert content_hash("train", 0, EASY) != key


def test_a_failing_process_is_reported(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 2)
    task = {**one_scene(Path("/nonexistent/folder")), "split": "sideways"}
    with module.tqdm(total=4, disable=True) as bar, pytest.raises(RuntimeError, match="sideways"):
        processes.share(task, [(0, 2), (1, 2)], 1, bar)


LOADS = f"""
{ALONE}
from lipguide.data.shn import cache
from lipguide.data.shn.difficulty import Difficulty
cache.BLOCK = 4
print("begins", flush=True)
pages = cache.load_pages("train", 24, 5, Difficulty())
import hashlib
print(hashlib.sha256(pages.arrays["bytes"].tobytes()).hexdigest())
"""


def loading(**how) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", LOADS], stdout=subprocess.PIPE, text=True, **how)


def test_two_processes_may_fill_the_same_cache(tmp_path):
    processes = [loading() for _ in range(2)]
    hashes = {process.communicate(timeout=120)[0] for process in processes}
    assert len(hashes) == 1 and all(process.returncode == 0 for process in processes)
    files = sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert files == [f"{block:05d}-004.npz" for block in range(6)]


def test_after_a_process_was_killed_the_next_finds_whole_blocks_only(tmp_path):
    process = loading()
    assert process.stdout.readline() == "begins\n"
    while not list((tmp_path / "cache").rglob("*.npz")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = list((tmp_path / "cache").rglob("*.npz"))
    assert 1 <= len(found) < 6 and all(len(Pages.load(path)) == 4 for path in found)
    again = loading().communicate(timeout=120)[0]
    fresh = loading(env={**os.environ, "LIPGUIDE_CACHE": str(tmp_path / "other")}).communicate(timeout=120)[0]
    assert again == fresh


@pytest.mark.parametrize("apart", [False, True], ids=["here", "in a process of its own"])
def test_a_full_disk_is_named_with_what_would_do(tmp_path, apart):
    """The system itself refuses to write more than so many bytes to a file."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    command = processes.command(one_scene(tmp_path / "cache"))
    if not apart:
        command = [sys.executable, "-c", "from lipguide.data import *; SyntheticHouseNumbers('train', 1)"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and str(tmp_path / "cache") in last and "set LIPGUIDE_CACHE to another" in last
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


READ_ONLY = """
import os
from lipguide.data import SyntheticHouseNumbers
from lipguide.data.shn import cache
SyntheticHouseNumbers("train", 2, seed=8)  # what is imported on the way
if os.geteuid() == 0:
    os.seteuid(65534)  # the administrator may write anywhere
print(len(SyntheticHouseNumbers("train", 2, seed=8)))
cache.render = lambda *_: print("drawn")
SyntheticHouseNumbers("train", 3, seed=8)
"""


def test_a_read_only_cache_is_read_and_its_error_comes_before_the_drawing(monkeypatch):
    folder = Path(tempfile.mkdtemp())  # not below a folder that pytest keeps to itself
    monkeypatch.setenv("LIPGUIDE_CACHE", str(folder))
    try:
        SyntheticHouseNumbers("train", 2, seed=8)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        done = subprocess.run([sys.executable, "-c", READ_ONLY], capture_output=True, text=True)
        assert done.stdout == "2\n" and done.returncode == 1, done.stderr
        assert f"scenes cannot be kept in {folder}" in done.stderr.splitlines()[-1]
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777)
        shutil.rmtree(folder)


def test_names_beyond_ascii_and_beyond_unicode_will_do(tmp_path, monkeypatch):
    for name in ("Straße Ångström 門牌", os.fsdecode(b"caf\xe9")):
        monkeypatch.setenv("LIPGUIDE_CACHE", str(tmp_path / name / "cache"))
        made = SyntheticHouseNumbers("train", 2, seed=1)
        made.save(tmp_path / name)
        for _ in range(2):  # the second time from the index
            read = SVHN(tmp_path / name, "train")
            assert all(same(made[k], read[k]) for k in range(2))
        done = worker(one_scene(tmp_path / name))
        assert done.returncode == 0 and (tmp_path / name / "00000-001.npz").exists()


# On disk


def test_round_trip_through_svhns_own_layout(tmp_path):
    for split in ("train", "test"):
        data = SyntheticHouseNumbers(split, 12, seed=4)
        folder = data.save(tmp_path / "root")
        assert {p.name for p in folder.iterdir()} >= {"1.png", "12.png", "1.mask.png", "digitStruct.mat"}
        read = SVHN(tmp_path / "root", split)
        assert len(read) == 12 and all(same(data[k], read[k]) for k in range(12))
        assert geometry(read.annotations()) == geometry(data.annotations())


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    from lipguide.data import shn as synthetic

    data = SyntheticHouseNumbers("train", 3)
    monkeypatch.setattr(synthetic, "write_digit_struct", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        data.save(tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "root" / "train").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        data.save(tmp_path / "root")


def test_a_contact_sheet_shows_boxes_and_masks(some):
    plain = np.asarray(contact_sheet(some, range(6), columns=3, boxes=False))
    boxed = np.asarray(contact_sheet(some, range(6), columns=3))
    masked = np.asarray(contact_sheet(some, range(6), columns=3, boxes=False, masks=True))
    assert plain.shape == boxed.shape == masked.shape == (2 * 72, 3 * 152, 3)
    assert (plain != boxed).any() and (plain != masked).any()
    for arguments in ({"columns": 0}, {"columns": None}, {"cell": (0, 5)}, {"cell": (5, -1)}):
        with pytest.raises(ValueError, match="whole number"):
            contact_sheet(some, **arguments)

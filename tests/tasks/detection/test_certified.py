"""The record of a certified detector, and the decision that it is of."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lipguide.__main__ import main
from lipguide.book.ledger import read
from lipguide.tasks import TEST_SEED
from lipguide.tasks.detection import certified as module
from lipguide.tasks.detection.boxes import Targets, unit_range
from lipguide.tasks.detection.certificates import answers, certified_ap, certified_recall, certify, curve, hunt
from lipguide.tasks.detection.certificates.summary import part_of
from lipguide.tasks.detection.certified import Plan, certified
from lipguide.tasks.detection.data import load_split
from lipguide.tasks.detection.reader import Detector
from lipguide.tasks.detection.scores import detections, score
from lipguide.tasks.harness import trained
from lipguide.tasks.weights import WEIGHTS, run_of

SHORT = Plan(
    ((0.05, None), (0.1, 2)), ((0.05, None), (0.1, 1)), (0.1,), ((0.05, 2, 1), (0.05, None, 2)), attacked=2, steps=1,
    smoothings=((0.1, 0.1, 40),), smoothed=1,
)  # fmt: skip
RECORD = Path(__file__).resolve().parents[3] / "book" / "results" / "certified.cpu.json"
THESE = {"weights": "these", "twin": "its own"}


@pytest.fixture(scope="module")
def scenes():
    return load_split("test", 24, TEST_SEED, torch.device("cpu"))


@pytest.fixture(scope="module")
def reader():
    return trained("detection-reader")[0]


def test_a_model_that_decides_for_itself_is_asked(reader, scenes):
    """By the rule that the certificates are of, not by overlap of boxes."""
    images = unit_range(scenes.images[:4])
    given = answers(reader, images)
    mine = given.detections(reader.least)
    for found, wanted in zip(detections(reader, images), mine, strict=True):
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    reader.least, kept = 0.3, reader.least
    fewer = sum(len(found["labels"]) for found in detections(reader, images))
    reader.least = kept
    assert fewer < sum(len(found["labels"]) for found in mine)


def test_pictures_of_nan_are_named_with_their_scene(reader, scenes):
    images = unit_range(scenes.images[:4]).clone()
    images[3] = float("nan")
    with pytest.raises(ValueError, match="scene 3: the detector's scores or boxes are not finite"):
        detections(reader, images, batch_size=2)


def test_a_look_into_what_ships_certifies_more_at_every_budget(reader):
    scenes = load_split("test", 120, TEST_SEED, torch.device("cpu"))
    looked = answers(reader, unit_range(scenes.images), look=True)
    for eps, many, gain in ((0.1, 120, 2), (0.25, 24, 2), (0.3, 24, 2)):  # at 0.1 few objects hang on the look
        given, targets = looked.part(slice(many)), scenes.part(slice(many)).targets
        far, near = (certify(its, targets, eps, reader.least) for its in (given._replace(inside=None), given))
        assert (near.heights >= far.heights).all() and certified_ap(near) > certified_ap(far)
        assert certified_recall(near) >= certified_recall(far) + gain


@pytest.mark.parametrize("eps", [0.1, 0.25])
def test_a_lower_threshold_certifies_no_less(reader, scenes, eps):
    given = answers(reader, unit_range(scenes.images))
    low, high = (certify(given, scenes.targets, eps, least) for least in (-0.2, 0.0))
    assert certified_recall(low) >= certified_recall(high) and certified_recall(low, 0.0) == certified_recall(high)
    assert certified_ap(low) >= certified_ap(high) - 1e-9
    with pytest.raises(ValueError, match="least is -0.2"):
        certified_recall(high, -0.2)


def test_what_ships_is_certified_below_what_it_scores(reader, scenes):
    given = answers(reader, unit_range(scenes.images))
    clean = score(given.detections(reader.least), scenes.targets)
    (none, some) = curve(given, scenes.targets, [0.0, 0.1], reader.least)
    assert clean.map50 + 1e-6 >= none["ap"] > some["ap"] > 0
    assert clean.recall + 1e-6 >= none["found"] > some["found"] > 20 and some["read"] >= some["found"]
    assert clean.detections <= none["possible"] < some["possible"]
    assert clean.false_positives <= none["alarms"] < some["alarms"] < some["possible"]
    assert some["ap"] > some["ap_of_all"] > 0


def test_a_hunt_without_prey_ends(reader, scenes):
    images, targets = unit_range(scenes.images[:1]), Targets(*(part[:1] for part in scenes.targets))
    certificate = certify(answers(reader, images), targets, 5.0, reader.least)
    assert hunt(reader, images, targets, certificate).hunted == 0


def test_the_record_has_what_it_names_and_each_part_is_made_once(scenes, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = Detector((8, 8, 8), 16, residual=True, block=True).eval()
    monkeypatch.setattr(module, "PIECE", 1)
    monkeypatch.setattr(module, "DEEP", 2)
    record = certified(model, model, scenes.part(slice(3)), SHORT, tmp_path, THESE)
    assert record["scenes"] == 3 and record["threshold"] == model.least and record["objects"] > 0
    for kind in ("certificates", "constants"):
        assert [row["eps"] for row in record[kind]] == [0.05, 0.1] and all(row["seconds"] > 0 for row in record[kind])
    assert [(row["eps"], row["scenes"]) for row in record["deep"]] == [(0.05, 3), (0.1, 1)]
    for near, deep in zip(record["certificates"][:1], record["deep"][:1], strict=True):
        assert deep["found"] >= near["found"] and deep["ap"] >= near["ap"] - 1e-9 and deep["seconds"] > 0
    (attacked,), (smoothed,) = record["attacked"], record["smoothed"]
    assert attacked["strongest"]["map50"] == min(one["map50"] for one in attacked["attacks"].values())
    assert [(hunted["scenes"], hunted["steps"]) for hunted in record["hunted"]] == [(2, 1), (3, 2)]
    assert not any(sum(hunted["fallen"].values()) for hunted in record["hunted"]) and smoothed["seconds"] > 0

    monkeypatch.setattr(module, "attack_l2", lambda *_: 1 / 0)
    monkeypatch.setattr(module, "hunt", lambda *_: 1 / 0)
    assert certified(model, model, scenes.part(slice(3)), SHORT, tmp_path, THESE) == record
    with pytest.raises(ValueError, match="was made by another run"):
        certified(model, model, scenes.part(slice(3)), SHORT, tmp_path, THESE | {"weights": "others"})
    with pytest.raises(ValueError, match="smoothed-0.1.json was made by another run"):
        certified(model, model, scenes.part(slice(3)), SHORT, tmp_path, THESE | {"twin": "another"})
    fewer = {"deep": ((0.05, 1),), "hunts": (), "smoothings": ()}
    for change in (fewer, {}, {"attacked": 1}):  # pieces of other sizes are not mixed
        changed = replace(SHORT, **change)
        monkeypatch.setattr(module, "PIECE", 2)
        with pytest.raises(ValueError, match="was made by another run"):
            certified(model, model, scenes.part(slice(3)), changed, tmp_path, THESE)
    monkeypatch.setattr(module, "PIECE", 1)
    (tmp_path / "smoothed-0.1.json").unlink()  # no other part has to do with the twin
    other = certified(model, model, scenes.part(slice(3)), SHORT, tmp_path, THESE | {"twin": "another"})
    assert other["smoothed"][0]["twin"] == "another" and other["certificates"] == record["certificates"]


def test_pieces_are_hunted_as_the_whole_is(reader, scenes):
    """Each with its own objects and alarms: what the hunt counts adds up, also of certificates that are wrong."""
    images, targets = unit_range(scenes.images), scenes.targets
    whole = certify(answers(reader, images), targets, 1e-6, reader.least)._replace(eps=0.5)
    pieces = [slice(0, 7), slice(7, 8), slice(8, 24)]
    found = [
        hunt(reader, images[some], Targets(*(part[some] for part in targets)), part_of(whole, some), 1)
        for some in pieces
    ]
    together = hunt(reader, images, targets, whole, 1)
    assert together.hunted == sum(one.hunted for one in found) > 20
    assert together.overrun == sum(one.overrun for one in found) > 0
    assert together.fallen == {aim: sum(one.fallen[aim] for one in found) for aim in together.fallen}


def test_what_is_hunted_has_to_be_certified(scenes, tmp_path):
    with pytest.raises(ValueError, match=r"hunts at 0.2 are of certificates that the plan has not"):
        certified(None, None, scenes, replace(SHORT, hunts=((0.2, None, 1),)), tmp_path, THESE)
    with pytest.raises(ValueError, match=r"hunts at 0.1 are of .* put 0.1 into deep, for 2 scenes"):
        certified(None, None, scenes, replace(SHORT, hunts=((0.1, 2, 1),)), tmp_path, THESE)
    with pytest.raises(ValueError, match=r"comparisons at 0.1 are of .* put 0.1 into deep, for 3 scenes"):
        certified(None, None, scenes, replace(SHORT, smoothed=3), tmp_path, THESE)


def test_real_scenes_are_certified_beside_the_others(scenes, tmp_path):
    torch.manual_seed(0)
    model = Detector((8, 8, 8), 16, residual=True, block=True).eval()
    plan = Plan(((0.1, None),), ((0.1, None),), (), (), smoothings=())
    real = scenes.part(slice(2, 6))._replace(hash="real")
    record = certified(model, model, scenes.part(slice(3)), plan, tmp_path, THESE, real)
    assert record["scenes"] == 3 and record["real"]["scenes"] == 4 and record["real"]["real"] == "real"
    assert [row["eps"] for row in record["real"]["certificates"]] == [0.1]
    assert [row["scenes"] for row in record["real"]["deep"]] == [4]
    assert "real" not in certified(model, model, scenes.part(slice(3)), plan, tmp_path, THESE)
    with pytest.raises(ValueError, match="was made by another run"):
        certified(model, model, scenes.part(slice(3)), plan, tmp_path, THESE, real._replace(hash="others"))


def test_certify_puts_it_on_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "Plan", lambda: SHORT)
    assert main(["certify", "--size", "3", "--device", "cpu", "--folder", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "certified.cpu.json").read_text())
    made = run_of(WEIGHTS / "detection-reader.safetensors")
    assert written["results"]["weights"]["steps"] == made["steps"] and written["provenance"]["data"]["hash"]
    assert "certified.cpu.json" in capsys.readouterr().out


def test_the_record_is_of_the_weights_that_ship_and_nothing_fell():
    record = read(RECORD)["results"]
    made = run_of(WEIGHTS / "detection-reader.safetensors")
    assert all(record["weights"][key] == made[key] for key in ("commit", "steps"))
    assert all(not any(hunt["fallen"].values()) and not hunt["overrun"] for hunt in record["hunted"])
    asked = [(at["eps"], at["scenes"]) for at in record["deep"]]
    assert asked == [(eps, many or record["scenes"]) for eps, many in Plan().deep]

"""The study: it resumes, it refuses what belongs to another one, and two processes agree with one."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lipguide.__main__ import main
from lipguide.detection import study as module
from lipguide.detection.boxes import Targets, unit_range
from lipguide.detection.evaluate import detections, score
from lipguide.detection.study import CONFIGURATIONS, PLANS, Plan, Split, configurations, load_split, study, weights_of
from lipguide.pretrained import WEIGHTS, load, trained

ROOT = Path(__file__).resolve().parents[1]
TINY = Plan(24, 12, 4, 1.0, 7, 2e-3, 4, 2, "float32")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def splits():
    return {split: load_split(split, 24 if split == "train" else 12, 0, CPU) for split in ("train", "test")}


@pytest.fixture(scope="module")
def whole(splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return study(TINY, **splits, folder=folder, only=["standard conv"]), folder


def measured(entries):
    """What does not depend on how busy the machine is."""
    return [{key: value for key, value in e.items() if "second" not in key} for e in entries]


def test_entry_has_the_columns_of_the_table(whole):
    (entry,), folder = whole
    wanted = {"name", "parameters", "clean_map50", "pgd_map50", "strongest_map50", "lipschitz_bound"}
    assert wanted <= set(entry) and entry["name"] == "standard conv" and entry["attacked_scenes"] == 4
    assert entry["lipschitz_bound"] > 0 and 0 <= entry["strongest_map50"] <= 100
    assert list(entry["attacks_map50"]) == ["training loss", "vanish", "fabricate", "mislabel"]
    assert entry["attacks_map50"]["training loss"] == entry["pgd_map50"]
    run = load("tinier-ssd-standard-conv", configurations(4)["standard conv"](), folder)
    assert run["steps"] == 3 and "train, 2" in run["data"]


def test_a_finished_configuration_is_not_trained_again(whole, splits, monkeypatch):
    entries, folder = whole
    monkeypatch.setattr(module, "fit", lambda *args, **kwargs: pytest.fail("trained again"))
    assert study(TINY, **splits, folder=folder, only=["standard conv"]) == entries


def test_results_of_another_plan_or_other_scenes_are_refused(whole, splits):
    _, folder = whole
    other = dataclasses.replace(TINY, rate=1e-3)
    with pytest.raises(ValueError, match="tinier-ssd-standard-conv.json belongs to another study"):
        study(other, **splits, folder=folder, only=["standard conv"])
    fewer = splits | {"train": splits["train"]._replace(hash="0")}
    with pytest.raises(ValueError, match="belongs to another study"):
        study(TINY, **fewer, folder=folder, only=["standard conv"])


def test_an_interrupted_study_ends_with_the_same_numbers(whole, splits, tmp_path, monkeypatch):
    """Stopped between training and evaluation, it goes on from the checkpoint."""
    entries, _ = whole

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            study(TINY, **splits, folder=tmp_path, only=["standard conv"])
    assert (tmp_path / "tinier-ssd-standard-conv.checkpoint").exists()
    assert measured(study(TINY, **splits, folder=tmp_path, only=["standard conv"])) == measured(entries)
    assert not (tmp_path / "tinier-ssd-standard-conv.checkpoint").exists()


def test_two_processes_under_torchrun_have_the_numbers_of_one(whole, splits, tmp_path):
    entries, folder = whole
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.test_detection_study import TINY, load_split\n"
        "from lipguide.detection.study import study\n"
        "from lipguide.training import start_distributed\n"
        "torch.set_num_threads(1)\n"
        "device = start_distributed('cpu')\n"
        "splits = {s: load_split(s, n, 0, device) for s, n in (('train', 24), ('test', 12))}\n"
        f"study(TINY, **splits, folder={str(tmp_path)!r}, only=['standard conv'])\n"
        "torch.distributed.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    entry = json.loads((tmp_path / "tinier-ssd-standard-conv.json").read_text())["entry"]
    for key in ("loss", "lipschitz_bound", "clean_map50", "pgd_map50"):
        assert entry[key] == pytest.approx(entries[0][key], rel=1e-4)
    one, two = (configurations(4)["standard conv"]() for _ in range(2))
    load("tinier-ssd-standard-conv", one, folder)
    load("tinier-ssd-standard-conv", two, tmp_path)
    for key, value in one.state_dict().items():  # Adam's first steps, 2e-3 each, magnify the rounding of tiny gradients
        torch.testing.assert_close(two.state_dict()[key], value, rtol=0, atol=1e-4)


def test_scenes_reach_the_score_in_their_order(splits, monkeypatch):
    """300 scenes in parts of 128: each detection is scored against its own scene."""
    targets = Targets(torch.tensor([0.0, 0.0, 0.5, 0.5]).expand(300, 1, 4), torch.arange(300)[:, None] % 10)
    images = (torch.arange(300) % 10).to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)

    def perfect(model, pictures):
        return [
            {
                "boxes": torch.tensor([[0.0, 0.0, 0.5, 0.5]]),
                "scores": torch.ones(1),
                "labels": (255 * p[:1, 0, 0]).round().long(),
            }
            for p in pictures
        ]

    monkeypatch.setattr(module, "detections", perfect)
    result, _ = module._scored(None, Split(images, targets, "", ""), lambda x, t: x)
    assert result.map50 == 100 and result.recall == 100


def test_each_attack_is_made_once_and_the_strongest_is_picked_from_those_very_pictures(splits, monkeypatch):
    """300 scenes in three parts: the four attacks of a part meet again, beside that part's own targets."""
    attacks = ("training loss", "vanish", "fabricate", "mislabel")
    images = (torch.arange(300) // 128).to(torch.uint8)[:, None, None, None].expand(-1, 3, 74, 74)
    split = Split(images, Targets(torch.zeros(300, 1, 4), (torch.arange(300) // 128)[:, None]), "", "")
    calls, picked = [], []

    def attack(model, pictures, targets, eps, name, steps):
        calls.append(name)
        return pictures + attacks.index(name)

    def strongest(model, pictures, targets, candidates):
        assert tuple(candidates) == attacks
        for name, moved in candidates.items():
            torch.testing.assert_close(moved, pictures + attacks.index(name))
        assert (targets.labels[:, 0] == (255 * pictures[:, 0, 0, 0]).round().long()).all()
        picked.append(len(pictures))
        return pictures

    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
    monkeypatch.setattr(module, "detections", lambda model, pictures: [dict(nothing) for _ in pictures])
    monkeypatch.setattr(module, "attack_l2", attack)
    monkeypatch.setattr(module, "strongest", strongest)
    plan = dataclasses.replace(TINY, attacked_scenes=None)
    module.evaluate(configurations(4)["standard conv"]().eval(), plan, split)
    assert sorted(calls) == sorted(3 * attacks) and picked == [128, 128, 44]


def test_unknown_configuration_is_named(splits, tmp_path):
    with pytest.raises(ValueError, match="no configuration 'big'; there are: naive, spectral-norm"):
        study(TINY, **splits, folder=tmp_path, only=["big"])


def test_command_line_reports_what_went_wrong(tmp_path, capsys):
    assert (
        main(["study", "--plan", "quick", "--device", "cpu", "--svhn", str(tmp_path), "--folder", str(tmp_path)]) == 1
    )
    assert "python -m lipguide study:" in capsys.readouterr().err


def test_plans_leave_room_for_the_whole_set():
    assert PLANS["full"].train_scenes is None and PLANS["full"].attacked_scenes is None


SHIPPED = [name for name in CONFIGURATIONS if (WEIGHTS / f"{weights_of(name)}.safetensors").exists()]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_detectors_score_what_their_run_says(name):
    """On the very scenes that were attacked: other scenes, or other weights, would not."""
    model, run = trained(weights_of(name), configurations(PLANS["cpu"].width)[name]().eval())
    attacked = run["attacked_scenes"]  # of those in which a window fits around the number, which are not all
    scenes = load_split("test", attacked + 100, run["seed"], CPU).part(slice(attacked))
    assert len(scenes.images) == attacked
    found = score(detections(model, unit_range(scenes.images)), scenes.targets)
    assert found.map50 == pytest.approx(run["clean_map50_of_attacked_scenes"], abs=0.05)

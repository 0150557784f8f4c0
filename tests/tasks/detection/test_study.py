"""The study: it resumes, it refuses what belongs to another one, and two processes agree with one."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jupytext
import pytest
import torch

from lipguide.__main__ import main
from lipguide.book.ledger import Ledger, lookup, read
from lipguide.bounds.network import lipschitz_bound
from lipguide.tasks.detection import attacks, data
from lipguide.tasks.detection import study as module
from lipguide.tasks.detection.attacks import attacked
from lipguide.tasks.detection.boxes import Targets, unit_range
from lipguide.tasks.detection.data import Split, load_split
from lipguide.tasks.detection.scores import detections, score
from lipguide.tasks.detection.study import CONFIGURATIONS, PLANS, Plan, configurations, study, weights_of
from lipguide.tasks.weights import WEIGHTS, load, run_of

ROOT = Path(__file__).resolve().parents[3]
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
    """What does not depend on when it ran and how busy the machine was."""
    return [{key: value for key, value in e.items() if "second" not in key and key != "run"} for e in entries]


def test_entry_has_the_columns_of_the_table(whole):
    (entry,), folder = whole
    wanted = {"name", "parameters", "clean_map50", "pgd_map50", "strongest_map50", "lipschitz_bound"}
    assert wanted <= set(entry) and entry["name"] == "standard conv" and entry["attacked_scenes"] == 4
    assert entry["lipschitz_bound"] > 0 and 0 <= entry["strongest_map50"] <= 100
    assert list(entry["attacks_map50"]) == ["training loss", "vanish", "fabricate", "mislabel"]
    assert entry["attacks_map50"]["training loss"] == entry["pgd_map50"]
    assert entry["blind_scenes"] == dict.fromkeys(entry["attacks_map50"], 0)
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
        "import json, sys, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.tasks.detection.test_study import TINY, load_split\n"
        "from lipguide.tasks.detection.study import study\n"
        "from lipguide.distributed import start\n"
        "torch.set_num_threads(1)\n"
        "device = start('cpu')\n"
        "splits = {s: load_split(s, n, 0, device) for s, n in (('train', 24), ('test', 12))}\n"
        f"entries = study(TINY, **splits, folder={str(tmp_path)!r}, only=['naive', 'standard conv'])\n"
        "rank = torch.distributed.get_rank()\n"
        f"json.dump(entries, open(f'{tmp_path}/{{rank}}.json', 'w'))\n"
        "torch.distributed.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # With batch norm too, both evaluate one detector: running statistics are not each process's own.
    ours, theirs = (measured(json.loads((tmp_path / f"{rank}.json").read_text())) for rank in (0, 1))
    assert ours == theirs and [entry["name"] for entry in ours] == ["naive", "standard conv"]
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
    names = ("training loss", "vanish", "fabricate", "mislabel")
    images = (torch.arange(300) // 128).to(torch.uint8)[:, None, None, None].expand(-1, 3, 74, 74)
    split = Split(
        images,
        Targets(torch.tensor([0.0, 0.0, 0.5, 0.5]).expand(300, 1, 4), (torch.arange(300) // 128)[:, None]),
        "",
        "",
    )
    calls, picked, looked = [], [], []

    def attack(model, pictures, targets, eps, name, steps):
        calls.append(name)
        return pictures + names.index(name)

    def strongest(model, pictures, targets, candidates):
        assert tuple(candidates) == names
        for name, moved in candidates.items():
            torch.testing.assert_close(moved, pictures + names.index(name))
        assert (targets.labels[:, 0] == (255 * pictures[:, 0, 0, 0]).round().long()).all()
        picked.append(len(pictures))
        return pictures

    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}

    def detections(model, pictures):
        looked.append(len(pictures))
        return [dict(nothing) for _ in pictures]

    monkeypatch.setattr(module, "detections", detections)
    monkeypatch.setattr(attacks, "attack_l2", attack)
    monkeypatch.setattr(module, "strongest", strongest)
    plan = dataclasses.replace(TINY, attacked_scenes=None)
    module.evaluate(configurations(4)["standard conv"]().eval(), plan, split)
    assert sorted(calls) == sorted(3 * names) and picked == [128, 128, 44]
    assert looked == 6 * [128, 128, 44]  # clean scenes once, though they are all attacked; four attacks; the strongest


def test_unknown_configuration_is_named(splits, tmp_path):
    with pytest.raises(ValueError, match="no configuration 'big'; there are: naive, spectral-norm"):
        study(TINY, **splits, folder=tmp_path, only=["big"])


def test_command_line_reports_what_went_wrong(tmp_path, capsys):
    assert (
        main(["study", "--plan", "quick", "--device", "cpu", "--svhn", str(tmp_path), "--folder", str(tmp_path)]) == 1
    )
    assert "python -m lipguide study:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], ["--plan cpu", "--device cpu", "days"]),
        (["--plan", "full", "--device", "auto"], ["--plan cpu"]),
        (["--plan", "cpu", "--device", "cuda"], ["no CUDA device", "--device cpu"]),
        (["--device", "cuda"], ["no CUDA device", "--plan cpu --device cpu"]),
    ],
)
def test_without_a_gpu_nothing_starts_that_needs_one(arguments, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(data, "load_split", lambda *args: pytest.fail("the study began"))
    assert main(["study", *arguments, "--folder", str(tmp_path / "study")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m lipguide study: ") and all(name in line for name in named)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--plan", "cpu"], ["--plan", "quick"]])
def test_a_cpu_is_used_where_it_was_asked_for(arguments, tmp_path, monkeypatch):
    """The full plan on a CPU for days too, if that is what somebody wants."""

    def begun(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(data, "load_split", begun)
    assert main(["study", *arguments, "--folder", str(tmp_path)]) == 130


def test_each_entry_keeps_the_provenance_of_its_own_run(splits, tmp_path, monkeypatch, capsys):
    """Also where a later call, at another commit, trains the next one; the time on record is that of all runs."""
    monkeypatch.setitem(PLANS, "quick", TINY)
    monkeypatch.setattr(data, "load_split", lambda split, *rest: splits[split])
    for commit, name in (("first", "standard conv"), ("second", "L2-normalised")):
        monkeypatch.setattr("lipguide.provenance.commit", lambda *_, commit=commit: commit)
        only = [name, "standard conv"]
        command = ["study", "--plan", "quick", "--device", "cpu", "--folder", str(tmp_path), "--only", *only]
        assert main(command) == 0
    record = read(tmp_path / "study.quick.json")
    entries = record["results"]["configurations"]
    assert [entry["run"]["commit"] for entry in entries] == ["first", "second"]
    assert record["provenance"]["seconds"] == pytest.approx(sum(entry["run"]["seconds"] for entry in entries), abs=0.1)
    assert str(tmp_path / "study.quick.json") in capsys.readouterr().out
    for entry in entries:
        assert run_of(tmp_path / f"{weights_of(entry['name'])}.safetensors")["commit"] == entry["run"]["commit"]


def test_the_run_on_record_is_that_of_the_code_that_began_it(splits, tmp_path, monkeypatch):
    """Hours later the checkout may be at another commit."""
    monkeypatch.setattr("lipguide.provenance.commit", lambda *_: "began")
    fit = module.fit

    def slow(*arguments, **options):
        history = fit(*arguments, **options)
        monkeypatch.setattr("lipguide.provenance.commit", lambda *_: "later")
        return history

    monkeypatch.setattr(module, "fit", slow)
    (entry,) = study(TINY, **splits, folder=tmp_path, only=["L2-normalised"])
    assert entry["run"]["commit"] == "began"
    assert entry["run"]["seconds"] == entry["train_seconds"] + entry["evaluate_seconds"]


def test_batch_norm_as_several_gpus_train_it_has_the_bound_of_batch_norm():
    torch.manual_seed(0)
    model = configurations(4)["naive"]().eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_var.uniform_(0.1, 2)
    known = lipschitz_bound(model, (3, 74, 74)).value
    assert lipschitz_bound(torch.nn.SyncBatchNorm.convert_sync_batchnorm(model), (3, 74, 74)).value == known


def test_scenes_on_which_an_attack_is_blind_are_counted_not_warned_of(splits, recwarn):
    """A warning on stderr would fail the chapter after hours of training."""
    model = configurations(4)["standard conv"]().eval()
    for head in model.class_heads:  # every prior is sure of background, so log p is below where "vanish" stops to look
        torch.nn.init.zeros_(head.weight)
        head.bias.data.view(4, 11)[:] = torch.tensor([0.0] * 10 + [1000.0])
    some = splits["test"].part(slice(3))
    _, blind = attacked(model, unit_range(some.images), some.targets, 0.5, "vanish", 2)
    assert blind == 3 and not recwarn.list
    plan = dataclasses.replace(TINY, attacked_scenes=3)
    assert module.evaluate(model, plan, splits["test"])["blind_scenes"]["vanish"] == 3


def test_other_warnings_of_an_attack_are_still_heard(splits, monkeypatch):
    def attack(model, images, *rest):
        warnings.warn("something else", RuntimeWarning, stacklevel=1)
        return images

    monkeypatch.setattr(attacks, "attack_l2", attack)
    with pytest.warns(RuntimeWarning, match="something else"):
        attacked(None, torch.zeros(1), None, 0.5, "vanish", 1)


RECORD = ROOT / "book" / "results" / "study.cpu.json"


def test_record_and_weights_come_from_the_same_runs():
    record = read(RECORD)
    entries = record["results"]["configurations"]
    assert [entry["name"] for entry in entries] == list(CONFIGURATIONS)
    for entry in entries:
        made = run_of(WEIGHTS / f"{weights_of(entry['name'])}.safetensors")
        data = record["provenance"]["data"]
        assert made["data"] == f"{data['name']}, {data['hash']}"
        # At first a header had no part "run", and its "start" was the time when all was done.
        wanted = made.get("run") or {
            **{key: made[key] for key in ("commit", "lock", "device")},
            "end": made["start"],
            "seconds": made["train_seconds"] + made["evaluate_seconds"],
        }
        assert entry["run"] == wanted | {"seconds": pytest.approx(wanted["seconds"], rel=1e-5)}
        for key in set(entry) - {"run", "name"}:
            assert entry[key] == approximately(made[key]), key
    seconds = sum(entry["run"]["seconds"] for entry in entries)
    assert record["provenance"]["seconds"] == pytest.approx(seconds, abs=0.1)


def approximately(value):
    """As the ledger keeps it: six digits."""
    if isinstance(value, dict):
        return {key: approximately(item) for key, item in value.items()}
    return pytest.approx(value, rel=1e-5)


CELLS = [c.source for c in jupytext.read(ROOT / "book" / "tinier-ssd.md").cells if c.cell_type == "code"]


@pytest.mark.parametrize("profile, real", [("quick", True), ("full", False), ("full", True)])
def test_the_chapter_shows_the_scenes_of_its_record(profile, real, splits, tmp_path, monkeypatch):
    """SVHN where it lies beside the book, all through; no later cell takes scenes from elsewhere."""
    (reader,) = [cell for cell in CELLS if "load_split(" in cell]
    used = []

    def load(split, count, seed, device, svhn=None):
        used.append(svhn)
        return splits[split]._replace(name=f"{svhn or 'SHN'}, {split}")

    monkeypatch.setattr(data, "load_split", load)
    monkeypatch.setattr(module, "study", lambda plan, train, test, folder, seed: [{"name": 0, "attacked_scenes": 4}])
    (tmp_path / "data" / "svhn").mkdir(parents=True)
    if not real:
        (tmp_path / "data" / "svhn").rmdir()
    (tmp_path / "book" / "results").mkdir(parents=True)
    (tmp_path / "book" / "results" / "study.cpu.json").write_text(RECORD.read_text())
    monkeypatch.chdir(tmp_path / "book")
    ledger = Ledger("tinier-ssd", profile, "cpu", 0)
    names = {"profile": profile, "device": "cpu", "seed": 0, "ledger": ledger}
    exec(reader, names)
    assert used == 2 * [Path("../data/svhn") if (profile, real) == ("full", True) else None]
    named = names["splits"]["train"]._asdict() if profile == "full" else read(RECORD)["provenance"]["data"]
    assert ledger.provenance["data"] == {key: named[key] for key in ("name", "hash")}


def test_the_chapter_can_be_rendered_where_a_detector_has_learned_nothing():
    """Every share in the text is on record, as a dash where there is no mAP to lose a share of."""
    entries = json.loads(RECORD.read_text())["results"]["configurations"]
    entries[3] |= {"clean_map50": 0.0, "clean_map50_of_attacked_scenes": 0.0, "pgd_map50": 0.0, "strongest_map50": 0.0}
    keys = dict(zip(CONFIGURATIONS, ("naive", "spectral", "standard", "l2"), strict=True))
    ledger = Ledger("tinier-ssd", "quick", "cpu", 0)
    names = {"entries": entries, "keys": keys, "ledger": ledger, "alarms": {"PGD": dict.fromkeys(keys.values(), 0)}}
    for start in ("published = ", "def lost"):
        exec(next(cell for cell in CELLS if cell.startswith(start)), names)
    text = (ROOT / "book" / "tinier-ssd.md").read_text()
    roles = re.findall(r"{ledger}`((?:lost|findings)\.[^:]*):([^`]*)`", text)
    shown = {key: format(lookup(ledger.results, key), form) for key, form in roles}
    assert shown["lost.pgd.l2"] == "–" and shown["lost.pgd.naive"] == "49 %" and shown["findings.stable"] == "no"


def test_plans_leave_room_for_the_whole_set():
    assert PLANS["full"].train_scenes is None and PLANS["full"].attacked_scenes is None


SHIPPED = [name for name in CONFIGURATIONS if (WEIGHTS / f"{weights_of(name)}.safetensors").exists()]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_detectors_score_what_their_run_says(name):
    """On the very scenes that were attacked: other scenes, or other weights, would not."""
    model = configurations(PLANS["cpu"].width)[name]().eval()
    run = load(weights_of(name), model)
    attacked = run["attacked_scenes"]  # of those in which a window fits around the number, which are not all
    scenes = load_split("test", attacked + 100, run["seed"], CPU).part(slice(attacked))
    assert len(scenes.images) == attacked
    found = score(detections(model, unit_range(scenes.images)), scenes.targets)
    assert found.map50 == pytest.approx(run["clean_map50_of_attacked_scenes"], abs=0.05)

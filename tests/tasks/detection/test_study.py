"""The study: it goes on where it stopped, refuses what belongs to another one, and two processes agree with one."""

import dataclasses
import json
import re
import threading
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jupytext
import pytest
import torch

from lipguide import deadline, tasks
from lipguide.__main__ import main
from lipguide.book.ledger import Ledger, lookup, read
from lipguide.bounds.network import lipschitz_bound
from lipguide.tasks.detection import attacks, evaluation, recipes
from lipguide.tasks.detection import study as module
from lipguide.tasks.detection.attacks import ATTACKS, TRAINING_LOSS, attacked
from lipguide.tasks.detection.boxes import Targets, unit_range
from lipguide.tasks.detection.data import Split, load_split
from lipguide.tasks.detection.losses import DetectionStep
from lipguide.tasks.detection.recipes import LARGE, RECIPES, TASK, build
from lipguide.tasks.detection.scores import detections, score
from lipguide.tasks.detection.study import CONFIGURATIONS, PLANS, Plan, entry_of, study, weights_of
from lipguide.tasks.weights import TEST_SEED, WEIGHTS, run_of
from tests.tasks.detection.counts import counts

ROOT = Path(__file__).resolve().parents[3]
TINY = Plan("-quick", 12, 4, 2, "float32")
CPU = torch.device("cpu")
AIMS = (TRAINING_LOSS, *ATTACKS)


def make_tiny(setitem):
    """The plan "quick" in toy size, by a function that sets an entry of a dictionary."""
    setitem(PLANS, "quick", TINY)
    for name in CONFIGURATIONS:
        recipe = LARGE[weights_of(name, "quick")]
        toy = dataclasses.replace(recipe, steps=3, batch_size=7, width=4, items=24, test_items=6)
        setitem(LARGE, weights_of(name, "quick"), toy)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        make_tiny(patch.setitem)
        yield


def tiny_study(folder, *only, **options):
    return study("quick", folder, "cpu", only=only or ["standard conv"], **options)


def untrained(name, width=4):
    return build(dataclasses.replace(RECIPES[weights_of(name)], width=width)).eval()


@pytest.fixture(scope="module")
def test_split():
    return load_split("test", 12, TEST_SEED, CPU)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return tiny_study(folder), folder


def measured(entries):
    """What does not depend on when it ran and how busy the machine was."""
    of_the_machine = ("run", "stages", "peak_memory_mib")
    return [{k: v for k, v in e.items() if "second" not in k and k not in of_the_machine} for e in entries]


def test_entry_has_the_columns_of_the_table(whole):
    (entry,), folder = whole
    wanted = {"name", "parameters", "clean_map50", "pgd_map50", "strongest_map50", "lipschitz_bound"}
    assert wanted <= set(entry) and entry["name"] == "standard conv" and entry["attacked_scenes"] == 4
    assert entry["lipschitz_bound"] > 0 and 0 <= entry["strongest_map50"] <= 100
    assert tuple(entry["attacks_map50"]) == AIMS
    assert entry["attacks_map50"][TRAINING_LOSS] == entry["pgd_map50"]
    assert entry["blind_scenes"] == dict.fromkeys(AIMS, 0)
    assert entry["test"]["seed"] == TEST_SEED
    assert entry["parameters"] == sum(p.numel() for p in untrained("standard conv").parameters())
    _, run = tasks.trained("tinier-ssd-standard-conv-quick", folder=folder)
    assert run["steps"] == entry["steps"] == 3 and run["data"] == entry["run"]["data"]
    assert run["loss"][-1][1] == entry["loss"] and run["lipschitz_bound"] == entry["lipschitz_bound"]


def test_nothing_but_weights_and_results_is_left(whole):
    _, folder = whole
    name = "tinier-ssd-standard-conv-quick"
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.json", f"{name}.safetensors"]


def test_a_finished_configuration_is_neither_trained_nor_attacked_again(whole, monkeypatch):
    entries, folder = whole
    monkeypatch.setattr(module, "ensure", lambda *args, **kwargs: pytest.fail("trained again"))
    monkeypatch.setattr(evaluation, "attacked", lambda *args, **kwargs: pytest.fail("attacked again"))
    assert tiny_study(folder) == entries


def test_results_of_another_recipe_plan_or_other_scenes_are_refused(whole, monkeypatch):
    _, folder = whole
    name = weights_of("standard conv", "quick")
    changes = [
        (LARGE, name, dataclasses.replace(LARGE[name], rate=1e-3)),
        (PLANS, "quick", dataclasses.replace(TINY, attack_steps=3)),
        (PLANS, "quick", dataclasses.replace(TINY, test_scenes=10)),
    ]
    for where, key, value in changes:
        with monkeypatch.context() as patch:
            patch.setitem(where, key, value)
            with pytest.raises(ValueError, match="tinier-ssd-standard-conv-quick.json belongs to another study"):
                tiny_study(folder)
    with pytest.raises(ValueError, match="belongs to another study"):
        tiny_study(folder, seed=1)


class Stop(BaseException):
    """As Ctrl-C."""


def stop_at(call, function):
    """The function, but the call of that number stops the program."""
    calls = []

    def stopping(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            raise Stop
        return function(*arguments, **options)

    return stopping


@pytest.mark.parametrize(
    "where, name, call, attacks_left",
    [
        (DetectionStep, "forward", 2, 4),  # inside the training
        (module, "trained", 1, 4),  # after it
        (evaluation, "attacked", 1, 4),
        (evaluation, "attacked", 3, 2),  # between two attacks
        (module, "write_json", 1, 0),  # before the results are on record
    ],
)
def test_an_interrupted_study_ends_with_the_same_numbers(where, name, call, attacks_left, whole, tmp_path, monkeypatch):
    entries, _ = whole
    with monkeypatch.context() as patch:
        patch.setattr(where, name, stop_at(call, getattr(where, name)))
        with pytest.raises(Stop):
            tiny_study(tmp_path)
    made = []

    def count(*arguments, **options):
        made.append(arguments)
        return attacked(*arguments, **options)

    monkeypatch.setattr(evaluation, "attacked", count)
    assert measured(tiny_study(tmp_path)) == measured(entries)
    assert len(made) == attacks_left
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_study_in_slices_says_what_is_left_and_ends_with_the_same_numbers(whole, tmp_path, monkeypatch, capsys):
    """From the command line; each slice ends when it has been asked for the time that often."""
    command = ["study", "--plan", "quick", "--only", "standard conv", "--device", "cpu", "--folder", str(tmp_path)]
    slices = [
        (2, "tinier-ssd-standard-conv-quick stopped before step 1 of 3"),
        (4, "stopped in clean, at scene 0"),
        (2, f"{TRAINING_LOSS} has not been evaluated"),
    ]
    for often, stopped in slices:
        asked = iter(range(often + 1))
        monkeypatch.setattr(deadline, "is_up", lambda asked=asked, often=often: next(asked) == often)
        assert main([*command, "--minutes", "60"]) == 75
        err = capsys.readouterr().err
        assert "1 of 1 configurations left (standard conv); " in err and stopped in err and err.count("\n") == 1
    monkeypatch.undo()
    assert measured(tiny_study(tmp_path)) == measured(whole[0])


def test_what_was_found_with_other_weights_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "attacked", stop_at(2, attacked))
        with pytest.raises(Stop):
            tiny_study(tmp_path)
    path = tmp_path / f"{weights_of('standard conv', 'quick')}.safetensors"
    path.unlink()
    tasks.train(path.stem, None, "cpu", 0, tmp_path)  # the same again: what was found with it stands
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "attacked", stop_at(1, attacked))
        with pytest.raises(Stop):
            tiny_study(tmp_path)
    model, run = tasks.trained(path.stem, "cpu", tmp_path)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    tasks.weights.save(path.stem, model, run, tmp_path)
    with pytest.raises(ValueError, match="belongs to other weights"):
        tiny_study(tmp_path)


def test_a_study_stopped_between_configurations_goes_on_with_the_next(whole, tmp_path, monkeypatch):
    first = tiny_study(tmp_path, "standard conv")
    trained = []
    ensure = module.ensure
    monkeypatch.setattr(module, "ensure", lambda name, *rest: trained.append(name) or ensure(name, *rest))
    entries = tiny_study(tmp_path, "L2-normalised", "standard conv")
    assert [entry["name"] for entry in entries] == ["standard conv", "L2-normalised"]  # the order of the study
    assert entries[0] == first[0] and trained == ["tinier-ssd-l2-normalised-quick"]


def test_two_processes_have_the_numbers_of_one(whole, forked, tmp_path):
    entries, folder = whole
    code = (
        "import json, torch\n"
        "from lipguide import distributed\n"
        "from tests.tasks.detection.test_study import make_tiny, tiny_study\n"
        "torch.set_num_threads(1)\n"
        "make_tiny(dict.__setitem__)\n"
        f"entries = tiny_study({str(tmp_path)!r}, 'naive', 'standard conv')\n"
        "rank, _ = distributed.rank_and_ranks()\n"
        f"json.dump(entries, open(f'{tmp_path}/{{rank}}.json', 'w'))\n"
        "distributed.finish()\n"
    )
    for done in forked.ranks(code, tmp_path):
        assert done.returncode == 0, done.stderr[-3000:]
    # With batch norm too, both evaluate one detector: running statistics are not each process's own.
    ours, theirs = (measured(json.loads((tmp_path / f"{rank}.json").read_text())) for rank in (0, 1))
    assert ours == theirs and [entry["name"] for entry in ours] == ["naive", "standard conv"]
    entry = entry_of(ours, "standard conv")
    for key in ("loss", "lipschitz_bound", "clean_map50", "pgd_map50"):
        assert entry[key] == pytest.approx(entries[0][key], rel=1e-4)
    one, _ = tasks.trained("tinier-ssd-standard-conv-quick", folder=folder)
    two, run = tasks.trained("tinier-ssd-standard-conv-quick", folder=tmp_path)
    assert run["processes"] == 2
    for key, value in one.state_dict().items():  # Adam's first steps, 2e-3 each, magnify the rounding of tiny gradients
        torch.testing.assert_close(two.state_dict()[key], value, rtol=0, atol=1e-4)


def test_scenes_reach_the_score_in_their_order(monkeypatch):
    """300 scenes in parts of 128: each detection is scored against its own scene."""
    targets = Targets(torch.tensor([0.0, 0.0, 0.5, 0.5]).expand(300, 1, 4), torch.arange(300)[:, None] % 10)
    images = (torch.arange(300) % 10).to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)

    def perfect(model, pictures, batch_size):
        labels = (255 * pictures[:, :1, 0, 0]).round().long()
        box = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
        return [{"boxes": box, "scores": torch.ones(1), "labels": label} for label in labels]

    monkeypatch.setattr(evaluation, "detections", perfect)
    found = evaluation._found(None, TINY, Split(images, targets, "", ""), None)
    result = score(found.scenes, targets)
    assert result.map50 == 100 and result.recall == 100


def test_each_attack_is_made_once_and_each_scene_counts_under_the_one_that_harms_it_most(tmp_path, monkeypatch):
    """300 scenes in three parts. Each attack spares all scenes but those whose number it divides with its own rest."""
    box = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    numbers = torch.arange(300)
    images = torch.stack([numbers // 100, numbers % 100, 0 * numbers], 1).to(torch.uint8)[:, :, None, None]
    split = Split(images.expand(-1, -1, 4, 4), Targets(box.expand(300, 1, 4), torch.zeros(300, 1).long()), "", "")
    calls = []

    def attack(model, pictures, targets, eps, name, steps):
        calls.append(name)
        moved = pictures.clone()
        moved[:, 2] = AIMS.index(name) + 1
        return moved, 0

    def detect(model, pictures, batch_size):
        found = []
        for picture in pictures:
            number = round(25500 * picture[0, 0, 0].item()) + round(255 * picture[1, 0, 0].item())
            aim = round(picture[2, 0, 0].item())
            lost = aim > 0 and number % 5 == aim - 1  # none of the four attacks harms those with a rest of 4
            found.append({"boxes": box, "scores": torch.ones(1), "labels": torch.tensor([int(lost)])})
        return found

    monkeypatch.setattr(evaluation, "detections", detect)
    monkeypatch.setattr(evaluation, "attacked", attack)
    monkeypatch.setattr(evaluation, "_suppression", lambda *_: 1.0)
    plan = dataclasses.replace(TINY, attacked_scenes=None)
    entry = evaluation.evaluate(untrained("standard conv"), plan, split, tmp_path)
    assert sorted(calls) == sorted(3 * AIMS)
    assert entry["clean"]["recall"] == 100 and entry["pgd"]["recall"] == 80
    assert entry["strongest"]["recall"] == 20


def test_one_attack_counts_for_all_scenes_where_that_leaves_a_lower_map(tmp_path, monkeypatch):
    """The mixture takes for each scene the fewest objects found, which need not be the lowest precision."""
    split = Split(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), Targets(torch.zeros(2, 1, 4), torch.zeros(2, 1)), "", "")
    maps = {TRAINING_LOSS: 30.0, "vanish": 10.0, "fabricate": 50.0, "mislabel": 40.0, "mixture": 20.0, "clean": 60.0}

    def found(path, model, plan, scenes, attack):
        return evaluation.Found(2 * [attack or "clean"], 0, 1.0)

    def rated(scenes, targets):
        return evaluation.Score(maps[scenes[0]], 0.0, 0.0, 0.0)

    monkeypatch.setattr(evaluation, "_kept", found)
    monkeypatch.setattr(evaluation, "score", rated)
    monkeypatch.setattr(evaluation, "_suppression", lambda *_: 1.0)
    monkeypatch.setattr(evaluation, "_mixture", lambda found, targets: ["mixture"])
    entry = evaluation.evaluate(untrained("standard conv"), TINY, split, tmp_path)
    assert entry["strongest_map50"] == 10 and entry["strongest_by"] == "vanish" and entry["pgd_map50"] == 30
    assert entry["mixture"]["map50"] == 20 and entry["attacks_map50"]["vanish"] == 10
    maps["mixture"] = 5.0
    entry = evaluation.evaluate(untrained("standard conv"), TINY, split, tmp_path)
    assert entry["strongest_map50"] == 5 and entry["strongest_by"] == "mixture"


def test_scenes_that_a_gpu_has_no_room_for_are_taken_in_halves(monkeypatch):
    """As many as the memory likes, and not one scene lost or moved."""
    box, sizes = torch.tensor([[0.0, 0.0, 0.5, 0.5]]), []
    images = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    split = Split(images, Targets(box.expand(100, 1, 4), torch.zeros(100, 1).long()), "", "")

    def detect(model, pictures, batch_size):
        sizes.append(len(pictures))
        if len(pictures) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        labels = (255 * pictures[:, :1, 0, 0]).round().long()
        return [{"boxes": box, "scores": torch.ones(1), "labels": label} for label in labels]

    monkeypatch.setattr(evaluation, "detections", detect)
    found = evaluation._found(None, TINY, split, None)
    assert sizes == [100, 50, 25, 25, 50, 25, 25]
    assert [int(scene["labels"]) for scene in found.scenes] == list(range(100))
    images = images[:1]
    monkeypatch.setattr(evaluation, "detections", lambda *_, **__: detect(None, torch.zeros(31, 3, 2, 2), 1))
    with pytest.raises(torch.OutOfMemoryError):
        evaluation._found(None, TINY, split.part(slice(1)), None)


def test_detections_are_rated_while_the_next_are_searched(tmp_path, monkeypatch):
    """The first score waits until the second search runs: if it were not made beside it, neither would end."""
    searching, rated = threading.Event(), []
    split = Split(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), Targets(torch.zeros(2, 1, 4), torch.zeros(2, 1)), "", "")

    def found(path, model, plan, scenes, attack):
        if attack == TRAINING_LOSS:
            searching.set()
        return evaluation.Found(2 * [attack], 0, 1.0)

    def slow(scenes, targets):
        rated.append(searching.wait(timeout=20))
        return evaluation.Score(1.0, 0.0, 0.0, 0.0)

    monkeypatch.setattr(evaluation, "_kept", found)
    monkeypatch.setattr(evaluation, "score", slow)
    monkeypatch.setattr(evaluation, "_suppression", lambda *_: 1.0)
    monkeypatch.setattr(evaluation, "_mixture", lambda found, targets: [])
    evaluation.evaluate(untrained("standard conv"), TINY, split, tmp_path)
    assert all(rated) and len(rated) == 3 + len(AIMS) + 1


def test_the_full_plan_runs_by_one_command_and_says_where_the_time_went(tmp_path, monkeypatch, capsys):
    """All of it in toy size: bfloat16, PGD on every scene of the test, the aimed attacks on the first ones.

    Without the proof of the bounds, which costs more than all the rest and has tests of its own."""
    for room in (evaluation, recipes):
        monkeypatch.setattr(room, "lipschitz_bound", lambda *_: SimpleNamespace(value=1.0))
    names = ["naive", "standard conv"]
    monkeypatch.setitem(
        PLANS, "full", dataclasses.replace(PLANS["full"], test_scenes=5, attacked_scenes=2, attack_steps=1)
    )
    for name in CONFIGURATIONS:
        recipe = LARGE[weights_of(name, "full")]
        toy = dataclasses.replace(recipe, steps=1, batch_size=4, width=4, items=6, test_items=2)
        monkeypatch.setitem(LARGE, weights_of(name, "full"), toy)
    assert main(["study", "--plan", "full", "--device", "cpu", "--folder", str(tmp_path), "--only", *names]) == 0
    said = capsys.readouterr().out
    entries = read(tmp_path / "study.full.json")["results"]["configurations"]
    assert [entry["name"] for entry in entries] == names
    stages = ("training", "clean", TRAINING_LOSS, *ATTACKS, "rated beside")
    for entry in entries:
        assert tuple(entry["stages"]) == stages and entry["peak_memory_mib"] is None
        assert entry["data_seconds"] > 0 and entry["suppress_scenes_per_second"] > 0
        assert all(entry["stages"][name]["seconds"] > 0 for name in stages)
        assert entry["attacked_scenes"] == 2 and entry["pgd_scenes"] == entry["stages"]["clean"]["scenes"] > 2
        assert entry["stages"][TRAINING_LOSS]["scenes"] == entry["pgd_scenes"]
        assert entry["stages"]["vanish"]["scenes"] == 2 and entry["learning_curve"][-1][1] == entry["loss"]
        figures = [*entry["attacks_map50"].values(), entry["mixture"]["map50"]]
        assert entry["strongest_map50"] == min(figures) <= entry["pgd_map50"] and len(figures) == 5
    table = said[said.index("stage  ") :].splitlines()
    assert [line[:16].strip() for line in table[1:10]] == ["data", *stages, "all"]
    in_all = sum(float(line[16:24]) for line in table[1:8])
    assert float(table[9][16:24]) == pytest.approx(in_all, abs=0.5)


def test_pgd_on_every_scene_stands_beside_the_figures_of_those_that_all_attacks_searched(tmp_path, monkeypatch):
    """In one row of the table all figures are of the same scenes: here the first two, which no attack harms."""
    box = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    split = Split(torch.zeros(6, 3, 4, 4), Targets(box.expand(6, 1, 4), torch.zeros(6, 1).long()), "", "")

    def found(path, model, plan, scenes, attack):
        number = len(scenes.images)
        labels = [torch.tensor([int(attack is not None and scene > 1)]) for scene in range(number)]
        return evaluation.Found([{"boxes": box, "scores": torch.ones(1), "labels": one} for one in labels], 0, 1.0)

    monkeypatch.setattr(evaluation, "_kept", found)
    monkeypatch.setattr(evaluation, "_suppression", lambda *_: 1.0)
    plan = dataclasses.replace(TINY, attacked_scenes=2, pgd_everywhere=True)
    entry = evaluation.evaluate(untrained("standard conv"), plan, split, tmp_path)
    assert entry["pgd"]["recall"] == entry["strongest"]["recall"] == 100 and entry["attacked_scenes"] == 2
    assert entry["pgd_everywhere"]["recall"] == pytest.approx(100 / 3) and entry["pgd_scenes"] == 6
    plan = dataclasses.replace(plan, pgd_everywhere=False)
    entry = evaluation.evaluate(untrained("standard conv"), plan, split, tmp_path)
    assert entry["pgd_everywhere"]["recall"] == 100 and entry["pgd_scenes"] == 2


# Operators of one training step, forward, loss and backward, with two scenes, and how often the step waits. What they
# were when they were written down, and a little more: on a GPU each is a kernel to launch, and they are its speed.
LIMITS = {"naive": (400, 0), "spectral-norm": (1170, 0), "standard conv": (640, 0), "L2-normalised": (720, 0)}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_training_step_calls_no_more_operators_than_it_did(name, test_split):
    model = untrained(name, width=8).train().to(memory_format=torch.channels_last)
    data = test_split.part(slice(2)).columns
    step = TASK.step(model, TASK.recipes[weights_of(name)], tasks.task.Data("two scenes", data, ""))

    def forward_and_back():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = step(model, data)
        loss.backward()

    operators, synchronisations = LIMITS[name]
    found = counts(forward_and_back)
    assert found.operators <= operators and found.synchronisations <= synchronisations, found


def test_what_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match="no configuration 'big'; there are: naive, spectral-norm"):
        tiny_study(tmp_path, "big")
    with pytest.raises(ValueError, match="no plan 'huge'; there are: quick, cpu, full"):
        study("huge", tmp_path, "cpu")
    with pytest.raises(ValueError, match="no data 'mnist'; there are: house-numbers, svhn"):
        tiny_study(tmp_path, data="mnist")
    with pytest.raises(ValueError, match="no entry of 'big'; there are: naive"):
        entry_of([{"name": "naive"}], "big")
    assert not list(tmp_path.iterdir())


def test_every_configuration_has_a_recipe_in_every_plan_and_for_both_kinds_of_scenes():
    for plan in PLANS:
        for data in ("house-numbers", "svhn"):
            for name, network in CONFIGURATIONS.items():
                recipe = TASK.recipe(weights_of(name, plan, data))
                assert recipe is not None and (recipe.network, recipe.data) == (network, data)
    for name in CONFIGURATIONS:
        ships = TASK.recipes[weights_of(name)]
        full = LARGE[weights_of(name, "full")]
        assert full.items is None and full.width == 256
        assert full.steps * full.batch_size > ships.steps * ships.batch_size


def test_command_line_reports_what_went_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["study", "--plan", "quick", "--device", "cpu", "--data", "svhn", "--folder", str(tmp_path)]
    assert main(command) == 1
    assert "python -m lipguide study: " in capsys.readouterr().err


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
    monkeypatch.setattr(module, "study", lambda *args: pytest.fail("the study began"))
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
    monkeypatch.setattr(module, "study", begun)
    assert main(["study", *arguments, "--folder", str(tmp_path)]) == 130


def test_each_entry_keeps_the_provenance_of_its_own_run(tmp_path, monkeypatch, capsys):
    """Also where a later call, at another commit, trains the next one; the time on record is that of all runs."""
    for commit, name in (("first", "standard conv"), ("second", "L2-normalised")):
        monkeypatch.setattr("lipguide.provenance.commit", lambda *_, commit=commit: commit)
        command = ["study", "--plan", "quick", "--device", "cpu", "--folder", str(tmp_path)]
        assert main([*command, "--only", name, "standard conv"]) == 0
    record = read(tmp_path / "study.quick.json")
    entries = record["results"]["configurations"]
    assert [entry["run"]["commit"] for entry in entries] == ["first", "second"]
    assert [entry["run"]["evaluated"]["commit"] for entry in entries] == ["first", "second"]
    assert record["provenance"]["seconds"] == pytest.approx(sum(entry["run"]["seconds"] for entry in entries), abs=0.1)
    assert str(tmp_path / "study.quick.json") in capsys.readouterr().out
    data = record["provenance"]["data"]
    for entry in entries:
        made = run_of(tmp_path / f"{weights_of(entry['name'], 'quick')}.safetensors")
        assert made["commit"] == entry["run"]["commit"]
        assert {key: made["data"][key] for key in ("name", "hash")} == data
        assert entry["run"]["seconds"] == pytest.approx(entry["train_seconds"] + entry["evaluate_seconds"], rel=1e-4)


def test_batch_norm_as_several_gpus_train_it_has_the_bound_of_batch_norm():
    torch.manual_seed(0)
    model = untrained("naive")
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_var.uniform_(0.1, 2)
    known = lipschitz_bound(model, (3, 74, 74)).value
    assert lipschitz_bound(torch.nn.SyncBatchNorm.convert_sync_batchnorm(model), (3, 74, 74)).value == known


def test_scenes_on_which_an_attack_is_blind_are_counted_not_warned_of(test_split, tmp_path, recwarn):
    """A warning on stderr would fail the chapter after hours of training."""
    model = untrained("standard conv")
    for head in model.class_heads:  # every prior is sure of background, so log p is below where "fabricate" looks
        torch.nn.init.zeros_(head.weight)
        head.bias.data.view(4, 11)[:] = torch.tensor([0.0] * 10 + [1000.0])
    some = test_split.part(slice(3))
    _, blind = attacked(model, unit_range(some.images), some.targets, 0.5, "fabricate", 2)
    assert blind == 3 and not recwarn.list
    plan = dataclasses.replace(TINY, attacked_scenes=3)
    blind = evaluation.evaluate(model, plan, test_split, tmp_path)["blind_scenes"]
    assert blind["fabricate"] == 3 and blind["vanish"] == 0  # nothing was found: there is nothing that could vanish


def test_other_warnings_of_an_attack_are_still_heard(monkeypatch):
    def attack(model, images, *rest, **options):
        warnings.warn("something else", RuntimeWarning, stacklevel=1)
        return images

    monkeypatch.setattr(attacks, "attack_l2", attack)
    with pytest.warns(RuntimeWarning, match="something else"):
        attacked(None, torch.zeros(1), None, 0.5, "vanish", 1)


RECORD = ROOT / "book" / "results" / "study.cpu.json"


def test_record_and_weights_come_from_the_same_runs():
    record = read(RECORD)
    data = record["provenance"]["data"]
    entries = record["results"]["configurations"]
    assert [entry["name"] for entry in entries] == list(CONFIGURATIONS)
    for entry in entries:
        made = run_of(WEIGHTS / f"{weights_of(entry['name'])}.safetensors")
        assert entry["run"]["commit"] == made["commit"] and entry["run"]["lock"] == made["lock"]
        assert entry["steps"] == made["steps"] and data["hash"] in str(made["data"])
        assert entry["train_seconds"] == pytest.approx(made["seconds"], rel=1e-5)
        assert entry["run"]["seconds"] == pytest.approx(entry["train_seconds"] + entry["evaluate_seconds"], rel=1e-5)
    seconds = sum(entry["run"]["seconds"] for entry in entries)
    assert record["provenance"]["seconds"] == pytest.approx(seconds, abs=0.1)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_recipe_is_the_one_that_made_the_weights_that_ship(name):
    made, recipe = run_of(WEIGHTS / f"{weights_of(name)}.safetensors"), RECIPES[weights_of(name)]
    scenes = int(re.search(r"(\d+) scenes", str(made["data"]))[1])
    assert made["steps"] == recipe.steps == scenes * 8 // recipe.batch_size and made["seed"] == 0
    entry = entry_of(read(RECORD)["results"]["configurations"], name)
    assert entry["parameters"] == sum(p.numel() for p in build(recipe).parameters())


@cache
def attacked_scenes(number, seed):
    """Of those in which a window fits around the number, which are not all."""
    return load_split("test", number + 100, seed, CPU).part(slice(number))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_shipped_detectors_score_what_is_on_record(name):
    """On the very scenes that were attacked: other scenes, or other weights, would not."""
    model, _ = tasks.trained(weights_of(name))
    record = read(RECORD)
    entry = entry_of(record["results"]["configurations"], name)
    seed = entry.get("test", record["provenance"])["seed"]
    scenes = attacked_scenes(entry["attacked_scenes"], seed)
    assert len(scenes.images) == entry["attacked_scenes"]
    fast = model.to(memory_format=torch.channels_last)
    found = score(detections(fast, unit_range(scenes.images)), scenes.targets)
    assert found.map50 == pytest.approx(entry["clean_map50_of_attacked_scenes"], abs=0.05)


CELLS = [c.source for c in jupytext.read(ROOT / "book" / "tinier-ssd.md").cells if c.cell_type == "code"]


def cell_with(text):
    """The one cell of the chapter that holds a text."""
    (cell,) = [cell for cell in CELLS if text in cell]
    return cell


@pytest.mark.parametrize("profile, real", [("quick", True), ("full", False), ("full", True)])
def test_the_chapter_shows_the_scenes_of_its_record(profile, real, test_split, tmp_path, monkeypatch):
    """SVHN where it lies beside the book, all through; no other cell takes scenes from elsewhere."""
    used, asked = [], []

    def load(split, count, seed, device, svhn):
        used.append(svhn)
        return test_split._replace(name=f"{svhn or 'SHN'}, {split}")

    def run(plan, folder, device, seed, data):
        asked.append((plan, data))
        data = {"name": f"{data}, train", "hash": "0"}
        return [{"name": name, "run": {"data": data}} for name in CONFIGURATIONS]

    monkeypatch.setattr("lipguide.tasks.detection.data.load_split", load)
    monkeypatch.setattr(module, "study", run)
    (tmp_path / "book" / "results").mkdir(parents=True)
    if real:
        (tmp_path / "data" / "svhn").mkdir(parents=True)
    (tmp_path / "book" / "results" / "study.cpu.json").write_text(RECORD.read_text())
    monkeypatch.chdir(tmp_path / "book")
    ledger = Ledger("tinier-ssd", profile, "cpu", 0)
    names = {"profile": profile, "device": "cpu", "seed": 0, "ledger": ledger}
    exec(cell_with("load_split("), names)
    svhn = Path("../data/svhn") if (profile, real) == ("full", True) else None
    assert used == 2 * [svhn]
    assert asked == ([("full", "svhn" if real else "house-numbers")] if profile == "full" else [])
    assert ledger.provenance["data"]["name"] == names["data"]["name"]


def test_the_chapter_can_be_rendered_where_a_detector_has_learned_nothing():
    """Every share in the text is on record, as a dash where there is no mAP to lose a share of."""
    entries = json.loads(RECORD.read_text())["results"]["configurations"]
    keys = dict(zip(CONFIGURATIONS, ("naive", "spectral", "standard", "l2"), strict=True))
    silent, able = entry_of(entries, "L2-normalised"), entry_of(entries, "naive")
    silent |= {"clean_map50": 0.0, "clean_map50_of_attacked_scenes": 0.0, "pgd_map50": 0.0, "strongest_map50": 0.0}
    able |= {"clean_map50": 80.0, "clean_map50_of_attacked_scenes": 80.0, "pgd_map50": 60.0}
    ledger = Ledger("tinier-ssd", "quick", "cpu", 0)
    names = {"entries": entries, "keys": keys, "ledger": ledger, "alarms": {"PGD": dict.fromkeys(keys.values(), 0)}}
    for text in ("published = ", "able = [", 'ledger["findings"]'):
        exec(cell_with(text), names)
    text = (ROOT / "book" / "tinier-ssd.md").read_text()
    roles = re.findall(r"{ledger}`((?:lost|findings)\.[^:]*):([^`]*)`", text)
    shown = {key: format(lookup(ledger.results, key), form) for key, form in roles}
    assert shown["lost.pgd.l2"] == "–" and shown["lost.pgd.naive"] == "25 %" and shown["findings.stable"] == "no"


def test_every_entry_that_the_chapter_prints_is_on_record():
    entries = read(RECORD)["results"]["configurations"]
    keys = dict(zip(CONFIGURATIONS, ("naive", "spectral", "standard", "l2"), strict=True))
    results = {"configurations": {keys[entry["name"]]: entry for entry in entries}}
    text = (ROOT / "book" / "tinier-ssd.md").read_text()
    roles = re.findall(r"{ledger}`(configurations\.[^:]*):([^`]*)`", text)
    assert len(roles) > 20
    for key, form in roles:
        format(lookup(results, key), form)

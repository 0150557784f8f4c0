"""The harness that trains the recipes of all tasks: it resumes, it runs in several processes, it mixes nothing."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lipguide as lip
from lipguide import deadline
from lipguide.__main__ import main
from lipguide.data import SyntheticHouseNumbers
from lipguide.tasks import TASKS, TEST_SEED, WEIGHTS, Data, Recipe, Task, ensure, harness, network_of, train, trained
from lipguide.tasks.weights import TRAIN_SEED, load, run_of
from lipguide.training import Supervised


@dataclass(frozen=True)
class Toy(Recipe):
    widths: tuple[int, ...] = (8,)


STOP: dict[str, int] = {}  # "at": the batch of a training at which it is interrupted
ASKED: list[tuple[str, int]] = []


class Stopping(Supervised):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__(loss)
        self._batches = 0

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self._batches += 1
        if self._batches == STOP.get("at"):
            raise KeyboardInterrupt
        return super().forward(model, batch)


def toy_network(recipe: Toy) -> nn.Sequential:
    (width,) = recipe.widths
    norm = nn.BatchNorm1d(width) if recipe.network.endswith("normed") else lip.GroupSort2()
    return nn.Sequential(lip.frobenius(nn.Linear(4, width)), norm, nn.Linear(width, 3))


def toy_data(recipe: Toy, split: str, seed: int) -> Data:
    ASKED.append((split, seed))
    generator = torch.Generator().manual_seed(seed + 10 * (split == "test"))
    x = torch.randn(40, 4, generator=generator)
    return Data.named("points", x, x[:, :3].argmax(1))


def toy_step(model: nn.Module, recipe: Toy, data: Data) -> Stopping:
    return Stopping(nn.CrossEntropyLoss())


def toy_measure(model: nn.Module, recipe: Toy, data: Data) -> dict[str, float]:
    x, y = data.columns
    assert not model.training
    return {"accuracy": (model(x).argmax(1) == y).double().mean().item()}


TOY = Toy("plain", steps=250, batch_size=6, rate=1e-2)  # a checkpoint every 100 steps
TOYS = {"toy": TOY, "toy-normed": replace(TOY, network="ordinary-normed")}
TASK = Task(TOYS, toy_network, toy_data, toy_step, toy_measure)


@pytest.fixture(autouse=True)
def toys(monkeypatch) -> None:
    monkeypatch.setattr(harness, "TASKS", {"toys": TASK})
    STOP.clear()
    ASKED.clear()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(one: Path, other: Path) -> bool:
    a, b = (trained(path.stem, folder=path.parent)[0].state_dict() for path in (one, other))
    return all(torch.equal(a[key], b[key]) for key in a)


# --- one run


def test_weights_come_with_the_run_that_made_them(tmp_path):
    path = train("toy", device="cpu", seed=3, folder=tmp_path)
    model, run = trained("toy", folder=tmp_path)
    assert names(tmp_path) == ["toy.safetensors"] and path == tmp_path / "toy.safetensors"
    assert run["recipe"] == {
        "network": "plain",
        "steps": 250,
        "batch_size": 6,
        "rate": 0.01,
        "widths": [8],
    }
    assert run["steps"] == 250 and run["seed"] == 3 and [step for step, _ in run["loss"]] == [100, 200, 250]
    assert run["data"]["name"] == "points" and run["data"]["pictures"] == 40
    assert run["data"]["hash"] != run["test"]["hash"] and run["accuracy"] > 0.8
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_networks_are_judged_on_data_on_which_nothing_was_chosen(tmp_path):
    train("toy", device="cpu", seed=7, folder=tmp_path)
    assert ASKED == [("train", TRAIN_SEED), ("test", TEST_SEED)] and TRAIN_SEED != TEST_SEED


def test_provenance_is_complete_and_names_no_interruption(tmp_path):
    run = run_of(train("toy", 2, "cpu", folder=tmp_path))
    assert {"commit", "lock", "device", "threads", "torch", "python", "seed", "start", "seconds"} <= set(run)
    assert "continued" not in run and run["processes"] == 1


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps, tmp_path):
    with pytest.raises(ValueError, match="one step or more"):
        train("toy", steps, "cpu", folder=tmp_path)
    assert names(tmp_path) == []


# --- interrupted runs


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("stops", [[50], [170, 90]])
def test_an_interrupted_training_ends_with_the_weights_of_one_that_was_not(name, stops, tmp_path):
    whole = train(name, device="cpu", folder=tmp_path / "whole")
    for stop in stops:
        STOP["at"] = stop
        with pytest.raises(KeyboardInterrupt):
            train(name, device="cpu", folder=tmp_path / "cut")
        assert not (tmp_path / "cut" / f"{name}.safetensors").exists()
    STOP.clear()
    cut = train(name, device="cpu", folder=tmp_path / "cut")
    assert same(whole, cut) and run_of(whole)["loss"] == run_of(cut)["loss"]
    assert names(tmp_path / "cut") == [f"{name}.safetensors"]
    # Where a checkpoint was there to go on from, the run says by what it was continued.
    assert ("continued" in run_of(cut)) == (stops[0] > 100)


def test_a_training_stopped_before_its_first_checkpoint_leaves_nothing(tmp_path):
    STOP["at"] = 30
    with pytest.raises(KeyboardInterrupt):
        train("toy", device="cpu", folder=tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps": 300}])
def test_an_unfinished_training_is_not_continued_by_another(change, tmp_path):
    STOP["at"] = 150
    with pytest.raises(KeyboardInterrupt):
        train("toy", device="cpu", folder=tmp_path)
    STOP.clear()
    with pytest.raises(ValueError, match="belongs to another run"):
        train("toy", **{"device": "cpu", "folder": tmp_path, **change})
    assert names(tmp_path) == [".toy.unfinished"]


def test_an_unfinished_training_is_not_continued_by_another_recipe(tmp_path, monkeypatch):
    STOP["at"] = 150
    with pytest.raises(KeyboardInterrupt):
        train("toy", device="cpu", folder=tmp_path)
    STOP.clear()
    monkeypatch.setitem(TOYS, "toy", replace(TOY, rate=0.5))
    with pytest.raises(ValueError, match="belongs to another run"):
        train("toy", device="cpu", folder=tmp_path)


def test_two_processes_do_not_train_one_name_in_one_folder(tmp_path, monkeypatch):
    refused = []

    def another_begins(model: nn.Module, recipe: Toy, data: Data) -> dict[str, float]:
        with pytest.raises(ValueError, match="another process is training toy") as error:
            train("toy", device="cpu", folder=tmp_path)
        refused.append(error)
        return toy_measure(model, recipe, data)

    monkeypatch.setattr(harness, "TASKS", {"toys": replace(TASK, measure=another_begins)})
    train("toy", 3, "cpu", folder=tmp_path)
    assert len(refused) == 1 and names(tmp_path) == ["toy.safetensors"]


def test_an_error_of_the_scores_keeps_the_training(tmp_path, monkeypatch):
    def broken(model: nn.Module, recipe: Toy, data: Data) -> dict[str, float]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(harness, "TASKS", {"toys": replace(TASK, measure=broken)})
    with pytest.raises(OSError, match="No space"):
        train("toy", device="cpu", folder=tmp_path)
    assert names(tmp_path) == [".toy.unfinished"]
    monkeypatch.setattr(harness, "TASKS", {"toys": TASK})
    STOP["at"] = 1  # no step is taken again
    train("toy", device="cpu", folder=tmp_path)
    assert names(tmp_path) == ["toy.safetensors"]


# --- a time limit


@pytest.mark.parametrize("name", TOYS)
def test_a_training_in_slices_ends_with_the_weights_of_one_piece(name, tmp_path, monkeypatch, capsys):
    """From the command line, as a queue would: stop, say what is left, and go on from the very step."""
    whole = train(name, device="cpu", folder=tmp_path / "whole")
    command = ["train", name, "--device", "cpu", "--folder", str(tmp_path / "cut"), "--minutes", "60"]
    asked = iter(range(10**6))
    monkeypatch.setattr(deadline, "is_up", lambda: next(asked) in (31, 183))
    for step in (30, 180):  # each slice asks once before it prepares anything
        assert main(command) == 75
        says = f"not finished: {name} stopped before step {step} of 250; the same command goes on from there"
        assert says in capsys.readouterr().err
        assert names(tmp_path / "cut") == [f".{name}.unfinished"]
    assert main(command) == 0
    cut = tmp_path / "cut" / f"{name}.safetensors"
    assert same(whole, cut) and run_of(whole)["loss"] == run_of(cut)["loss"]
    assert names(tmp_path / "cut") == [f"{name}.safetensors"] and len(run_of(cut)["continued"]) == 2


def test_a_training_for_which_no_time_is_left_does_not_begin(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deadline, "is_up", lambda: True)
    assert main(["train", *TOYS, "--device", "cpu", "--folder", str(tmp_path), "--minutes", "1"]) == 75
    assert "toy has not been begun" in capsys.readouterr().err and names(tmp_path) == [] and ASKED == []


# --- weights that are there already


def test_ensured_weights_are_trained_once(tmp_path):
    path = ensure("toy", "cpu", 0, tmp_path)
    before = path.read_bytes()
    STOP["at"] = 1
    assert ensure("toy", "cpu", 0, tmp_path) == path and path.read_bytes() == before


@pytest.mark.parametrize(
    "made, what",
    [
        ({"steps": 2}, "steps = 2 there, 250 here"),
        ({"seed": 5}, "seed = 5 there, 0 here"),
    ],
)
def test_weights_of_another_run_do_not_pass_for_those_of_a_recipe(made, what, tmp_path):
    train("toy", **{"device": "cpu", "folder": tmp_path, **made})
    with pytest.raises(ValueError, match=what):
        ensure("toy", "cpu", 0, tmp_path)


def test_weights_of_another_recipe_or_of_none_do_not_pass(tmp_path, monkeypatch):
    path = train("toy", device="cpu", folder=tmp_path)
    monkeypatch.setitem(TOYS, "toy", replace(TOY, widths=(6,)))
    with pytest.raises(ValueError, match="recipe = "):
        ensure("toy", "cpu", 0, tmp_path)
    path.rename(tmp_path / "toy-normed.safetensors")
    with pytest.raises(ValueError, match="recipe = "):
        ensure("toy-normed", "cpu", 0, tmp_path)


def test_weights_that_do_not_ship_are_not_written_into_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "TASKS", {"toys": replace(TASK, recipes={}, more=TOYS)})
    assert train("toy", 2, "cpu").resolve() == tmp_path / "study" / "full" / "toy.safetensors"


# --- the command


def test_the_command_prints_its_progress_and_the_files(tmp_path, capsys):
    assert main(["train", *TOYS, "--steps", "2", "--device", "cpu", "--folder", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 2/2") and lines[1] == str(tmp_path / "toy.safetensors")
    assert lines[3] == str(tmp_path / "toy-normed.safetensors")


@pytest.mark.parametrize(
    "arguments, message",
    [(["toy-nomed"], "no weights 'toy-nomed'.*the nearest names: toy-normed"), (["toy", "--steps", "0"], "one step")],
)
def test_the_command_says_in_one_line_what_is_wrong(arguments, message, tmp_path, capsys):
    assert main(["train", *arguments, "--folder", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert re.search(message, captured.err) and captured.err.count("\n") == 1


# --- several processes

CODE = """
import torch
from tests.tasks import test_harness as toys
from lipguide import distributed
from lipguide.tasks import harness

torch.set_num_threads(1)
harness.TASKS = {{"toys": toys.TASK}}
for name in toys.TOYS:
    harness.train(name, device="cpu", folder={folder!r})
    own = harness.trained(name, folder={folder!r})[0].state_dict()
    first = distributed.gathered([value.tolist() for value in own.values()])[0]
    assert first == [value.tolist() for value in own.values()]
distributed.finish()
"""


def test_two_processes_write_one_file_with_the_weights_of_one(tmp_path, forked):
    folder = tmp_path / "two"
    for done in forked.ranks(CODE.format(folder=str(folder)), tmp_path):
        assert done.returncode == 0, done.stderr[-3000:]
    assert names(folder) == ["toy-normed.safetensors", "toy.safetensors"]
    one = trained("toy", folder=train("toy", device="cpu", folder=tmp_path / "one").parent)[0].state_dict()
    two, run = trained("toy", folder=folder)
    for key, value in two.state_dict().items():
        torch.testing.assert_close(value, one[key], rtol=1e-3, atol=1e-4)
    assert run["processes"] == 2 and json.loads(json.dumps(run)) == run


# --- what ships


def test_importing_the_harness_imports_no_task(forked, tmp_path):
    code = "import sys, lipguide.tasks; print([m for m in sys.modules if m.startswith('lipguide.tasks.')])"
    done = forked.run(code, tmp_path)
    assert "lipguide.tasks.harness" in done.stdout, done.stderr
    assert not any(task in done.stdout for task in ("classification", "segmentation", "detection"))


@pytest.mark.parametrize("path", sorted(WEIGHTS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_each_file_that_ships_has_a_recipe_and_loads_into_its_network(path, monkeypatch):
    monkeypatch.undo()
    task, recipe = harness.recipe_of(path.stem)
    assert path.stem in task.recipes
    load(path.stem, network_of(path.stem))
    made = run_of(path)
    assert made["steps"] == recipe.steps and made.get("recipe", harness.as_json(recipe)) == harness.as_json(recipe)


@pytest.mark.parametrize("name", [name for task in ("classification", "segmentation") for name in TASKS[task].recipes])
def test_the_weights_that_ship_have_learnt_from_the_version_that_comes_when_nobody_asks(name):
    made = run_of(WEIGHTS / f"{name}.safetensors")
    assert made["data"]["name"] == SyntheticHouseNumbers("train", 0).name


def test_each_recipe_of_the_package_belongs_to_one_task_and_those_that_ship_are_there():
    seen = [name for task in TASKS.values() for name in [*task.recipes, *task.more]]
    assert len(seen) == len(set(seen))
    shipped = {name for task in TASKS.values() for name in task.recipes}
    assert shipped == {path.stem for path in WEIGHTS.glob("*.safetensors")}

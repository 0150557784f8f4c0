"""The trainings of FCOS, the weights that they made, and the claims of the chapter about them."""

from dataclasses import asdict, replace
from pathlib import Path

import jupytext
import pytest
import torch

from lipguide import lipschitz_bound
from lipguide.layers.export import without_parametrizations
from lipguide.tasks import TASKS, TEST_SEED, WEIGHTS, ensure, network_of, train_by, trained
from lipguide.tasks.detection import recipes as training
from lipguide.tasks.detection.attacks import attack_l2
from lipguide.tasks.detection.boxes import unit_range
from lipguide.tasks.detection.data import load_split
from lipguide.tasks.detection.fcos import FCOS, Brightless, fcos
from lipguide.tasks.detection.recipes import LARGE, RECIPES, TASK, Recipe, begin, build, load, measure
from lipguide.tasks.detection.tinier_ssd import TinierSSD
from lipguide.tasks.detection.trials import FIRST
from lipguide.tasks.weights import go_on_from

CHAPTER = Path(__file__).resolve().parents[3] / "book" / "detection.md"
SHORT = Recipe("fcos", steps=3, batch_size=4, width=4, items=12, test_items=6)
FULL = [
    name for name in LARGE if name.startswith("detection-") and name.endswith("-full")
]  # for a GPU; their weights do not ship
SHIPPED = [name for name in RECIPES if name.startswith("detection-")]  # those of Tinier SSD: see test_study.py
LIPSCHITZ = [name for name in SHIPPED if RECIPES[name].lipschitz]


@pytest.mark.parametrize("network", ["fcos", "ordinary-fcos"])
def test_a_recipe_repeats_bit_for_bit_and_depends_on_the_seed(network):
    recipe = replace(SHORT, network=network)
    results = [train_by(TASK, recipe, torch.device("cpu"), seed) for seed in (3, 3, 4)]
    (one, two, other), runs = [[v for v in m.state_dict().values()] for m, _ in results], [r for _, r in results]
    for run in runs:
        del run["seconds"]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) and runs[0] == runs[1]
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert runs[0]["steps"] == 3 and runs[0]["recipe"] == asdict(recipe)


def test_steps_can_be_asked_for():
    assert train_by(TASK, SHORT, torch.device("cpu"), steps=1)[1]["steps"] == 1


def test_a_constrained_network_takes_over_the_values_of_a_plain_one():
    torch.manual_seed(0)
    one, other, x = fcos(6), fcos(6), torch.rand(2, 3, 74, 74)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        one(x).logits.square().mean().backward()
        optimizer.step()
    plain = without_parametrizations(one)
    before = (plain(x).logits - other.eval()(x).logits).abs().mean()
    go_on_from(other, plain)
    after = (plain(x).logits - other.eval()(x).logits).abs().mean()
    assert after < 0.1 * before
    assert lipschitz_bound(other.trunk, (3, 74, 74)).value <= 1 + 1e-4


def test_brightness_changes_nothing():
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(Brightless()(x + 0.3), Brightless()(x))
    assert (Brightless()(x).norm() <= x.norm()) and lipschitz_bound(Brightless().eval(), (3, 8, 8)).value == 1


def test_unknown_names_are_answered_with_those_that_there_are():
    with pytest.raises(ValueError, match="no weights 'detection-yolo'.*detection-fcos"):
        network_of("detection-yolo")
    with pytest.raises(ValueError, match="no network 'yolo'"):
        build(replace(SHORT, network="yolo"))


def test_every_recipe_is_registered_under_its_task():
    assert set(RECIPES) <= set(TASKS["detection"].recipes)
    assert all(name.startswith(("detection-", "tinier-ssd-")) for name in (*RECIPES, *LARGE))


def test_every_network_of_the_chapter_has_a_recipe_in_the_size_for_a_gpu():
    """From scratch, on all scenes. At temperature 20 the first network serves, which learns from scratch as well. The
    reader does so too, and its ends do not learn once more."""
    twins = {f"{name}-full" for name in SHIPPED if name not in ("detection-fcos-tau-20", "detection-first-reader")}
    assert twins == set(FULL) and LARGE["detection-fcos-full"].tau == RECIPES["detection-fcos-tau-20"].tau
    assert not [name for name in FULL if (WEIGHTS / f"{name}.safetensors").exists()]
    for name in FULL:
        small, large = RECIPES[FIRST if "reader" in name else name.removesuffix("-full")], LARGE[name]
        assert (large.network, large.tau) == (small.network, small.tau)
        assert large.start is None and large.items is None and large.test_items is None
        assert large.width > small.width and large.steps * large.batch_size > small.steps * small.batch_size
        features = 128 if large.network == "residual-reader" else 2 * large.width
        assert network_of(name).class_head.weight.shape[1] == features


def test_what_ensure_trained_by_a_full_recipe_is_loaded_by_its_name(tmp_path, monkeypatch):
    """The way of the chapter in the profile "full", with a recipe of the same kind in toy size."""
    name, toy = "detection-fcos-tau-80-full", replace(SHORT, tau=80.0)
    monkeypatch.setitem(LARGE, name, toy)
    path = ensure(name, "cpu", 0, tmp_path)
    first = path.read_bytes()
    assert ensure(name, "cpu", 0, tmp_path).read_bytes() == first
    model, run = trained(name, "cpu", tmp_path)
    assert model.tau == 80 and run["recipe"] == asdict(toy) and run["steps"] == 3
    with pytest.raises(FileNotFoundError, match="no weights 'detection-fcos-full'"):
        trained("detection-fcos-full", "cpu", tmp_path)


@pytest.mark.parametrize("items", [None, 12])
def test_all_scenes_are_asked_for_by_none(items, monkeypatch):
    asked = []

    def few(split, count, seed, device, svhn, version):
        asked.append((split, count))
        return load_split(split, 12, seed, device, version=version)

    monkeypatch.setattr(training, "load_split", few)
    training._scenes.cache_clear()
    train_by(TASK, replace(SHORT, items=items, test_items=items), torch.device("cpu"), steps=1)
    training._scenes.cache_clear()  # these are not all scenes
    assert asked == [("train", items), ("test", items)]


def test_configurations_that_train_one_after_the_other_share_their_scenes(monkeypatch):
    """To decode and cut all of them takes a minute of one core, and each training did it anew."""
    asked = []

    def few(split, count, seed, device, svhn, version):
        asked.append((split, count, svhn))
        return load_split("train", 2, seed, device)

    monkeypatch.setattr(training, "load_split", few)
    training._scenes.cache_clear()
    for name in ("naive", "spectral-norm"):
        load(replace(training.CaseStudy(name), items=2), "train", 0)
    load(replace(training.CaseStudy("naive", data="svhn"), items=2), "train", 0)
    training._scenes.cache_clear()
    assert asked == [("train", 2, None), ("train", 2, (Path("data") / "svhn").resolve())]


def test_both_kinds_of_recipes_answer_the_same_questions():
    """Nothing asks which kind it has before it; what they say is not in the file of weights, but what they are is."""
    for recipe, network, fact, precision in (
        (SHORT, FCOS, "trunk", torch.bfloat16),
        (training.CaseStudy("spectral-norm"), TinierSSD, "lipschitz_bound", torch.float32),
    ):
        model = build(recipe).eval()
        assert isinstance(model, network) and list(recipe.bound(model)) == [fact]
        assert recipe.data in training.DATA and TASK.precision_of(recipe) == precision
    assert not {"data", "precision"} & set(asdict(SHORT)) and "start" not in asdict(training.CaseStudy("naive"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_score_what_their_run_says(name):
    model, run = trained(name)
    assert run["recipe"] == asdict(RECIPES[name]) and run["steps"] == RECIPES[name].steps
    data = load(RECIPES[name], "test", TEST_SEED)
    facts = measure(model, RECIPES[name], data)
    assert data.hash == run["test"]["hash"], "the scenes have changed: python -m lipguide train makes the weights anew"
    assert facts["score"]["map50"] == pytest.approx(run["score"]["map50"], abs=0.5)
    if RECIPES[name].lipschitz:
        assert facts.get("trunk", facts.get("window")) <= 1 + 1e-4


@pytest.mark.parametrize("name", LIPSCHITZ)
def test_no_attack_moves_a_class_logit_of_shipped_weights_further_than_the_picture(name):
    """The promise of the chapter, for every cell and class at once; the logits of the ordinary twin do move further."""
    split = load_split("test", 4, 0, torch.device("cpu"))
    x = unit_range(split.images)
    twin, _ = trained("detection-ordinary-fcos")
    assert _largest_move(trained(name)[0], x, split.targets) <= 1 + 1e-4
    assert _largest_move(twin, x, split.targets) > 1


def _largest_move(model: FCOS, x, targets):
    moved = attack_l2(model, x, targets, 0.5, "fabricate", steps=5)
    with torch.no_grad():
        change = (model(moved).logits - model(x).logits).abs().flatten(1).amax(1)
    return (change / (moved - x).flatten(1).norm(dim=1)).max()


def test_the_chapter_shows_the_network_of_the_package():
    cells = jupytext.read(CHAPTER).cells
    source = next(c.source for c in cells if c.cell_type == "code" and "copy-this" in c.metadata.get("tags", []))
    namespace = {}
    exec(source, namespace)
    shown, packed = without_parametrizations(namespace["model"]), network_of("detection-fcos")
    packed.load_state_dict(shown.state_dict())
    x = torch.rand(1, 3, 74, 74)
    assert torch.equal(shown(x).logits, packed(x).logits) and shown.tau == packed.tau


def test_only_the_ends_of_a_reader_are_learnt_once_more():
    """What lies below is that of the reader that it goes on from, bit for bit, also in training mode."""
    recipe = RECIPES["detection-reader"]
    first, _ = trained(recipe.start)
    scenes = load(replace(recipe, items=4), "train", 0)
    torch.manual_seed(0)
    model = build(recipe)
    begin(model, recipe)
    step = recipe.training_step(model, scenes)
    x = scenes.columns[0][:2].float() / 255
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    values = []
    for _ in range(8):
        adam.zero_grad()
        value = step(model.train(), scenes.columns)
        value.backward()
        adam.step()
        values.append(float(value.detach()))
    moved = {name.split(".")[0] for name, part in model.named_parameters() if part.grad is not None}
    assert moved == {"end", "class_head", "box_head"} and values[-1] < values[0]
    assert torch.allclose(model.windows(x), first.windows(x), atol=1e-5)
    plain = without_parametrizations(model).state_dict()
    below = [name for name in plain if name.split(".")[0] in ("trunk", "halve", "cells", "read")]
    assert len(below) > 10 and all(torch.equal(plain[name], first.state_dict()[name]) for name in below)

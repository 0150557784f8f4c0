"""The trainings of FCOS, the weights that they made, and the claims of the chapter about them."""

from dataclasses import asdict, replace
from pathlib import Path

import jupytext
import pytest
import torch

from lipguide import lipschitz_bound, train_cli
from lipguide.detection.attacks import attack_l2
from lipguide.detection.boxes import unit_range
from lipguide.detection.fcos import FCOS, Brightless, fcos
from lipguide.detection.study import load_split
from lipguide.detection.training import (
    RECIPES,
    Recipe,
    _take_over,
    build,
    measured,
    network_of,
    train,
    trained,
)
from lipguide.plain import without_parametrizations

CHAPTER = Path(__file__).resolve().parent.parent / "book" / "detection.md"
SHORT = Recipe("fcos", steps=3, batch_size=4, width=4, items=12, test_items=6)
LIPSCHITZ = [name for name, recipe in RECIPES.items() if recipe.lipschitz]


@pytest.mark.parametrize("network", ["fcos", "ordinary-fcos"])
def test_a_recipe_repeats_bit_for_bit_and_depends_on_the_seed(network):
    recipe = replace(SHORT, network=network)
    results = [train(recipe, None, torch.device("cpu"), seed) for seed in (3, 3, 4)]
    (one, two, other), runs = [[v for v in m.state_dict().values()] for m, _ in results], [r for _, r in results]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) and runs[0] == runs[1]
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert runs[0]["steps"] == 3 and runs[0]["recipe"] == asdict(recipe)


def test_steps_can_be_asked_for():
    assert train(SHORT, 1, torch.device("cpu"), 0)[1]["steps"] == 1


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
    _take_over(other, plain)
    after = (plain(x).logits - other.eval()(x).logits).abs().mean()
    assert after < 0.1 * before
    assert lipschitz_bound(other.trunk, (3, 74, 74)).value <= 1 + 1e-4


def test_brightness_changes_nothing():
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(Brightless()(x + 0.3), Brightless()(x))
    assert (Brightless()(x).norm() <= x.norm()) and lipschitz_bound(Brightless().eval(), (3, 8, 8)).value == 1


def test_unknown_names_are_answered_with_those_that_there_are():
    with pytest.raises(ValueError, match="no weights 'detection-yolo'; there are: detection-fcos"):
        network_of("detection-yolo")
    with pytest.raises(ValueError, match="no network 'yolo'"):
        build(replace(SHORT, network="yolo"))


def test_every_recipe_is_registered_under_its_task():
    assert set(train_cli.trainings("detection")) == set(RECIPES)
    assert all(name.startswith("detection-") for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_weights_score_what_their_run_says(name):
    model, run = trained(name)
    assert run["recipe"] == asdict(RECIPES[name]) and run["steps"] == RECIPES[name].steps
    facts = measured(model, RECIPES[name])
    assert facts["test"] == run["test"], "the scenes have changed: python -m lipguide train makes the weights anew"
    assert facts["score"]["map50"] == pytest.approx(run["score"]["map50"], abs=0.5)
    if RECIPES[name].lipschitz:
        assert facts["trunk"] <= 1 + 1e-4


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

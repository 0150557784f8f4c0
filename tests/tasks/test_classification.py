"""The classifiers, their weights and the command that makes them."""

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path

import jupytext
import pytest
import torch
import torchvision
from torch import nn

from lipguide import lipschitz_bound
from lipguide.__main__ import main
from lipguide.data import Digits, SyntheticHouseNumbers
from lipguide.layers.export import without_parametrizations
from lipguide.losses import OffsetCrossEntropy, local_logits
from lipguide.robustness import attacks, certificates
from lipguide.tasks import TEST_SEED, WEIGHTS, ensure, network_of, train, train_by, trained, weights
from lipguide.tasks.classification import recipes
from lipguide.tasks.classification.data import pictures
from lipguide.tasks.classification.networks import NETWORKS, SIZES, build, check_labels
from lipguide.tasks.classification.recipes import (
    LARGE,
    RECIPES,
    TASK,
    Adversarial,
    Local,
    LocalRecipe,
    Recipe,
    load,
    measure,
)
from lipguide.training import Supervised, fit
from tests.drawn import other_libraries_draw

CHAPTER = Path(__file__).resolve().parents[2] / "book" / "classification.md"
LIPSCHITZ = [name for name in NETWORKS if not name.startswith("ordinary")]
WITH_TWIN = [name for name in LIPSCHITZ if name != "pooled-vgg"]
SMALL = {"widths": (4, 8), "features": 16, "pixels": 8}
SHIPPED = [name for name in RECIPES if (WEIGHTS / f"{name}.safetensors").exists()]


def bound(model):
    return lipschitz_bound(model[:-1].eval(), (3, model[0].pixels, model[0].pixels)).value


@pytest.mark.parametrize("name", LIPSCHITZ)
@pytest.mark.parametrize("rate", [0.0, 1.0], ids=["untrained", "after steps at a rate of 1"])
def test_trunk_is_1_lipschitz_and_the_head_has_unit_rows(name, rate):
    torch.manual_seed(0)
    model = NETWORKS[name](**SMALL)
    data = torch.rand(64, 3, 8, 8), torch.randint(10, (64,))
    sgd = torch.optim.SGD(model.parameters(), lr=rate)
    fit(model, data, Supervised(OffsetCrossEntropy()), sgd, steps=4, batch_size=32, schedule="constant")
    model = without_parametrizations(model)
    assert bound(model) <= 1 + 1e-4
    torch.testing.assert_close(model[-1].weight.norm(dim=1), torch.ones(10))


@pytest.mark.parametrize("name", LIPSCHITZ)
def test_no_direction_is_stretched_by_the_true_jacobian(name):
    torch.manual_seed(0)
    trunk = without_parametrizations(NETWORKS[name](**SMALL))[:-1].double()
    x = torch.rand(3, 8, 8, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda picture: trunk(picture[None])[0])(x).flatten(1)
    assert torch.linalg.matrix_norm(jacobian, ord=2) <= 1 + 1e-6


@pytest.mark.parametrize("name", WITH_TWIN)
def test_twin_has_the_same_shapes_at_each_size_of_the_picture(name):
    def sides(model):
        found = []

        def note(module, inputs, output):
            found.append(tuple(output.shape[1:]))

        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(note)
        model.eval()(torch.rand(1, 3, 32, 32))
        return set(found)

    own, twin = sides(build(name)), sides(build(f"ordinary-{name}"))
    assert own - {(128,)} <= twin, "a layer of the 1-Lipschitz network has no counterpart"


@pytest.mark.parametrize("name", WITH_TWIN)
def test_gpu_size_is_larger_and_of_the_same_kind(name):
    large = SIZES["gpu"][name]
    model = NETWORKS[name](**{**large, "widths": tuple(w // 16 for w in large["widths"]), "features": 16})
    assert bound(without_parametrizations(model)) <= 1 + 1e-4


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("pixels, advice", [(30, "28×28 or 32×32"), (3, "4×4"), (0, "4×4"), (33, "32×32 or 36×36")])
def test_sides_that_cannot_be_halved_are_named_with_those_that_can(name, pixels, advice):
    with pytest.raises(ValueError, match=f"{pixels}×{pixels} cannot be halved 2 times: {advice} would do"):
        NETWORKS[name](**{**SMALL, "pixels": pixels})


def test_fewer_widths_are_offered_where_they_would_do():
    with pytest.raises(ValueError, match="or halve it 2 times, by fewer `widths`"):
        NETWORKS["vgg"](channels=1, pixels=28)
    model = NETWORKS["vgg"](widths=(2, 4), features=8, channels=1, pixels=28)
    assert model.eval()(torch.rand(1, 1, 28, 28)).shape == (1, 10)
    with pytest.raises(ValueError, match=r"pad it with grey\)$"):
        NETWORKS["vgg"](channels=1, pixels=27)


@pytest.mark.parametrize("shape", [(1, 3, 8, 12), (2, 3, 9, 9)])
def test_pictures_of_another_size_are_refused_with_the_size_that_would_do(shape):
    model = NETWORKS["vgg"](**SMALL).eval()
    with pytest.raises(ValueError, match=r"built for pictures of 8×8, not of .*multiple of 4"):
        model(torch.rand(shape))


def test_other_sizes_can_be_built():
    for name in NETWORKS:
        assert build(name, pixels=48, classes=7).eval()(torch.rand(1, 3, 48, 48)).shape == (1, 7)


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0, 42]), "from 0 to 42, and the head has 10 outputs, for 0 to 9: build .* classes=43"),
        (torch.tensor([-1, 3]), "from -1 to 3: number the classes from 0"),
        (torch.tensor([0.5]), "class indices"),
        (torch.tensor([[1]]), "class indices"),
    ],
)
def test_labels_that_the_head_has_no_output_for(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(NETWORKS["vgg"](**SMALL), labels)


def test_labels_that_fit_and_none_at_all_pass():
    check_labels(NETWORKS["vgg"](**SMALL), torch.tensor([0, 9]))
    check_labels(NETWORKS["vgg"](**SMALL), torch.zeros(0, dtype=torch.long))


def test_unknown_network_names_those_that_there_are():
    with pytest.raises(ValueError, match="no network 'vgg16'.*ordinary-sll"):
        build("vgg16")


def test_training_with_labels_beyond_the_head_stops_before_the_first_step(monkeypatch):
    def many_classes(*arguments, **keywords):
        return Digits(torch.rand(20, 3, 32, 32), torch.arange(20))

    monkeypatch.setattr(recipes, "pictures", many_classes)
    with pytest.raises(ValueError, match="classes=20"):
        train_by(TASK, Recipe("vgg", steps=1), torch.device("cpu"))


TINY = Recipe("vgg", steps=3, items=30, test_items=10, batch_size=16)
ATTACKED = replace(TINY, network="ordinary-vgg", adversary=0.5)
LOCAL = LocalRecipe("residual", steps=3, items=30, test_items=10, batch_size=16)


@pytest.mark.parametrize("recipe", [TINY, ATTACKED, LOCAL], ids=["plain", "adversarial", "local"])
def test_training_repeats_bit_for_bit_and_depends_on_the_seed(recipe, monkeypatch):
    """With few channels: the one that goes on does so from weights of its size."""
    few = {"widths": (4, 8), "features": 16}
    start = without_parametrizations(NETWORKS["residual"](**few))
    monkeypatch.setitem(SIZES, "few", {"vgg": few, "residual": few})
    monkeypatch.setattr(recipes, "trained", lambda name, device: (copy.deepcopy(start), {}))
    recipe, cpu = replace(recipe, size="few"), torch.device("cpu")
    first, second, other = (train_by(TASK, recipe, cpu, seed) for seed in (0, 0, 1))
    states = [model.state_dict() for model, _ in (first, second, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])
    assert {**first[1], "seconds": 0} == {**second[1], "seconds": 0}


def test_adversarial_step_leaves_the_model_in_training_mode_and_sees_worse_pictures():
    torch.manual_seed(0)
    model, images, labels = NETWORKS["ordinary-vgg"](**SMALL), torch.rand(16, 3, 8, 8), torch.randint(10, (16,))
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, inputs[0].detach())))
    Adversarial(nn.CrossEntropyLoss(), eps=0.3)(model, (images, labels)).backward()
    training, last = seen[-1]
    assert training and not any(mode for mode, _ in seen[:-1])
    distance = (last - images).flatten(1).norm(dim=1)
    assert (distance <= 0.3 + 1e-5).all() and distance.max() > 0.1
    assert last.min() >= 0 and last.max() <= 1


def test_local_step_is_the_loss_of_the_local_logits_also_in_a_wrapper_and_leaves_no_hook():
    """torch's wrapper for several processes keeps the network in its attribute `module`."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    torch.manual_seed(0)
    model, images, labels = NETWORKS["residual"](**SMALL), torch.rand(16, 3, 8, 8), torch.randint(10, (16,))
    model.eval()  # in training a step of power iteration goes with each pass
    loss, step = OffsetCrossEntropy(), Local(OffsetCrossEntropy(), reach=0.1)
    expected = loss(local_logits(model[:-2](images), labels, model[-2], model[-1], reach=0.1), labels)
    for network in (model, Wrapper(model)):
        torch.testing.assert_close(step(network, (images, labels)), expected)
    assert not model[-2]._forward_pre_hooks
    with pytest.raises(ValueError, match="the network takes pictures"):
        step(model, (images[0], labels))
    assert not model[-2]._forward_pre_hooks


def test_going_on_from_weights_trains_the_dense_end_alone():
    model, _ = train_by(replace(TASK, measure=lambda *_: {}), LOCAL, torch.device("cpu"))
    start, _ = trained(LOCAL.start)
    for name, value in start.state_dict().items():
        apart = (model.state_dict()[name] - value).abs().max()
        ending = int(name.split(".")[0]) >= len(model) - 3
        assert apart > 1e-5 if ending else apart < 1e-4, name


def test_cifar10_and_svhn_crops_come_by_one_parameter(tmp_path, monkeypatch):
    class Cifar:
        def __init__(self, root, train):
            self.pictures = [(torch.full((3, 32, 32), 0.5), 6 if train else 7)] * 5

        def __len__(self):
            return len(self.pictures)

        def __getitem__(self, index):
            return self.pictures[index]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar)
    images, labels = pictures("cifar10", "test", items=3)
    assert images.shape == (3, 3, 32, 32) and labels.tolist() == [7, 7, 7]
    with pytest.raises(ValueError, match="the first 6 items are asked for, and the data set has 5"):
        pictures("cifar10", items=6)

    SyntheticHouseNumbers("test", size=3, cache=False).save(tmp_path)
    crops = pictures("svhn", "test", items=2, root=tmp_path)
    assert crops.images.shape[1:] == (3, 32, 32) and len(crops.images) == len(crops.labels) >= 2


def test_missing_data_say_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="download=True"):
        pictures("cifar10", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="lipguide data svhn"):
        pictures("svhn", root=tmp_path)
    with pytest.raises(ValueError, match="no data 'mnist'.*cifar10"):
        pictures("mnist")


def test_command_trains_and_writes_weights_with_their_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "classification-vgg", TINY)
    arguments = ["classification-vgg", "--steps", "2", "--device", "cpu", "--folder", str(tmp_path)]
    assert main(["train", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 2/2") and lines[-1] == str(tmp_path / "classification-vgg.safetensors")
    run = weights.load("classification-vgg", network_of("classification-vgg"), tmp_path)
    assert {"steps", "device", "data", "seed", "commit", "seconds", "accuracy", "trunk"} <= set(run)
    assert json.loads(json.dumps(run)) == run


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["classification-vgg16"], "the nearest names: classification-"),
        (["classification-vgg", "--steps", "0"], "one step or more"),
    ],
)
def test_command_says_in_one_line_what_is_wrong(arguments, message, capsys):
    assert main(["train", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_ensured_weights_are_trained_once_and_only_by_their_recipe(tmp_path, monkeypatch):
    name = "classification-vgg-svhn-full"
    monkeypatch.setitem(LARGE, name, TINY)
    path = ensure(name, "cpu", 0, tmp_path)
    before = path.read_bytes()
    assert ensure(name, "cpu", 0, tmp_path) == path
    assert path.read_bytes() == before
    model, run = trained(name, "cpu", tmp_path)
    assert run["recipe"] == asdict(TINY) and not model.training
    monkeypatch.setitem(LARGE, name, replace(TINY, rate=0.5))
    with pytest.raises(ValueError, match="made by another run"):
        ensure(name, "cpu", 0, tmp_path)


def test_weights_that_do_not_ship_are_not_written_into_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "classification-sll-cifar10-full"
    monkeypatch.setitem(LARGE, name, TINY)
    assert train(name, 1, "cpu", 0).resolve() == tmp_path / "study" / "full" / f"{name}.safetensors"


def test_unknown_weights_and_a_network_without_a_head_are_named():
    with pytest.raises(ValueError, match="no weights 'classification-vit'.*classification-vgg"):
        trained("classification-vit")
    with pytest.raises(ValueError, match="ends in its head"):
        check_labels(nn.Sequential(nn.Linear(3, 10), nn.ReLU()), torch.tensor([1]))


def test_a_training_interrupted_before_its_first_checkpoint_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "pictures", interrupted)
    assert main(["train", "classification-vgg", "--device", "cpu", "--folder", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["vgg", "resnet", "sll"])
def test_the_chapter_shows_the_networks_of_the_package(name):
    """The code that a reader copies makes the very network that the weights belong to."""
    cells = jupytext.read(CHAPTER).cells
    source = next(c.source for c in cells if c.cell_type == "code" and f"def {name}(" in c.source)
    assert "copy-this" in next(c for c in cells if c.source == source).metadata["tags"]
    namespace = {}
    exec(source, namespace)
    torch.manual_seed(0)
    shown, packed = without_parametrizations(namespace[name]()), without_parametrizations(NETWORKS[name]())
    packed.load_state_dict(shown.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(shown(x), packed(x))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_certified_and_as_accurate_as_their_run_says(name):
    """On the digits that the run was measured on, where they are still what they were; on the first of them anyway."""
    recipe = RECIPES[name]
    model, run = trained(name)
    assert run["recipe"] == asdict(recipe) and run["steps"] == recipe.steps
    data = load(recipe, "test", TEST_SEED)
    facts = measure(model, recipe, data)
    unchanged = data.hash == run["test"]["hash"] or other_libraries_draw()
    assert unchanged, "the digits have changed: python -m lipguide train makes the weights anew"
    assert facts["accuracy"] == pytest.approx(run["accuracy"], abs=2e-3)
    if recipe.lipschitz:
        assert facts["trunk"] <= 1 + 1e-4
        assert [c for _, c in facts["certified"]] == pytest.approx([c for _, c in run["certified"]], abs=2e-3)


@pytest.mark.parametrize("name", [name for name in SHIPPED if RECIPES[name].lipschitz])
def test_no_certificate_is_broken_inside_its_radius_and_most_are_at_three_times_it(name):
    model, run = trained(name)
    images, labels = pictures("house-numbers", "test", 20, TEST_SEED)
    rows = model[-1].weight
    logits = certificates.checked_logits(model, images, run["trunk"], rows)
    radius = certificates.radius(logits, labels, run["trunk"], rows)
    sure = radius > 0.01
    assert sure.sum() > 10
    x, y, r = images[sure], labels[sure], radius[sure]

    def attacked(share, dtype):
        """The share of digits that fall, and that of the way that is gone."""
        model.to(dtype)
        moved = attacks.pgd_l2(model, x.to(dtype), y, share * r.to(dtype), steps=15)
        gone = (moved - x).flatten(1).norm(dim=1) / (share * r)
        return (model(moved).argmax(1) != y).double().mean(), gone.mean()

    assert attacked(3.0, torch.float32)[0] > 0.5
    fallen, gone = attacked(1 - 1e-6, torch.float64)  # where nothing may fall, rounding may not decide
    assert fallen == 0 and gone > 0.9


def test_all_weights_but_those_for_a_gpu_ship():
    assert set(SHIPPED) == set(RECIPES) and all(recipe.size == "gpu" for recipe in LARGE.values())
    assert not [name for name in LARGE if (WEIGHTS / f"{name}.safetensors").exists()]

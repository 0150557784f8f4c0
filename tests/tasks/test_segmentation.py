"""The networks that label pixels, their weights, and the certificates held against attacks."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipguide import lipschitz_bound, losses
from lipguide.__main__ import main
from lipguide.checks import IGNORE
from lipguide.layers.export import without_parametrizations
from lipguide.robustness.attacks import pgd_l2
from lipguide.robustness.certificates import certified_miou, certified_pixel_accuracy, checked_logits, radius
from lipguide.robustness.scores import miou, pixel_accuracy, pooled_miou
from lipguide.tasks import TEST_SEED, WEIGHTS, network_of, train_by, trained
from lipguide.tasks.segmentation.attacks import flipped, soft_flips
from lipguide.tasks.segmentation.data import pictures
from lipguide.tasks.segmentation.networks import NETWORKS, build
from lipguide.tasks.segmentation.recipes import LOSSES, RECIPES, TASK, Recipe
from lipguide.training import Shifted, Supervised, fit

LIPSCHITZ = [name for name in NETWORKS if not name.startswith("ordinary")]
SHIPPED = [name for name in RECIPES if (WEIGHTS / f"{name}.safetensors").exists()]
SHORT = Recipe("unet", steps=2, widths=(4, 8), pixels=16, items=10, test_items=4, batch_size=4)


def small(name, seed=0, **options):
    torch.manual_seed(seed)
    return build(name, widths=(4, 8), **options)


# --- networks


@pytest.mark.parametrize("name", LIPSCHITZ)
@pytest.mark.parametrize("rate", [0.0, 1.0], ids=["untrained", "after steps at a rate of 1"])
def test_trunk_is_1_lipschitz_and_the_head_has_unit_rows(name, rate):
    model = small(name)
    data = torch.rand(16, 3, 8, 8), torch.randint(11, (16, 8, 8))
    sgd = torch.optim.SGD(model.parameters(), lr=rate)
    fit(model, data, Shifted(Supervised(losses.TauCrossEntropy(10))), sgd, steps=4, batch_size=8, schedule="constant")
    model = without_parametrizations(model)
    assert lipschitz_bound(model[:-1].eval(), (3, 8, 8)).value <= 1 + 1e-4
    torch.testing.assert_close(model[-1].weight.flatten(1).norm(dim=1), torch.ones(11))


@pytest.mark.parametrize("name", LIPSCHITZ)
def test_no_direction_is_stretched_by_the_true_jacobian(name):
    trunk = without_parametrizations(small(name))[:-1].eval().double()
    x = torch.rand(3, 6, 8, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda picture: trunk(picture[None])[0].flatten())(x).flatten(1)
    assert torch.linalg.matrix_norm(jacobian, ord=2) <= 1 + 1e-6


@pytest.mark.parametrize("name", LIPSCHITZ)
def test_ordinary_twin_has_convolutions_of_the_same_shapes_and_no_bound_of_1(name):
    def shapes(model):
        return [m.weight.shape for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]

    twin = small(f"ordinary-{name}")
    assert shapes(twin) == shapes(small(name))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in twin.modules()) == len(shapes(twin)) - 1
    assert lipschitz_bound(twin.eval(), (3, 8, 8)).value > 1.2


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(NETWORKS)),
    halvings=st.integers(1, 3),
    height=st.integers(1, 26),
    width=st.integers(1, 26),
    classes=st.integers(2, 5),
    channels=st.integers(1, 4),
)
def test_a_label_for_every_pixel_or_an_error_with_a_size_that_would_do(
    name, halvings, height, width, classes, channels
):
    model = build(name, widths=[4 * 2**n for n in range(halvings + 1)], classes=classes, channels=channels).eval()
    if height % 2**halvings == 0 and width % 2**halvings == 0:
        assert model(torch.rand(1, channels, height, width)).shape == (1, classes, height, width)
        return
    with pytest.raises(ValueError, match=f"{height}×{width} cannot be halved {halvings} times") as error:
        model(torch.rand(1, channels, height, width))
    offered = re.findall(r"(\d+)×(\d+)", str(error.value))[1:]
    assert offered
    for h, w in offered:
        assert model(torch.rand(1, channels, int(h), int(w))).shape == (1, classes, int(h), int(w))


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 8, 8)], ids=["four channels", "no batch"])
def test_pictures_of_another_kind_are_named(shape):
    with pytest.raises(ValueError, match=re.escape(f"takes pictures (N, 3, H, W), not {shape}")):
        small("unet")(torch.rand(shape))


def test_unknown_network_is_answered_with_those_that_there_are():
    with pytest.raises(ValueError, match="no network 'vit'; there are: fcn, ordinary-fcn, unet, ordinary-unet"):
        build("vit")


# --- masks and scores


def test_a_head_with_too_few_classes_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(
        "lipguide.tasks.segmentation.recipes.build", lambda name, widths, classes: small(name, classes=10)
    )
    with pytest.raises(ValueError, match=r"the head has 10 classes, labelled 0 to 9, but the masks hold 10 too"):
        train_by(TASK, replace(SHORT, labels="digits"), torch.device("cpu"))


@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_pixels_change_neither_loss_nor_gradient(loss):
    dial = {"cross-entropy": (10.0,), "focal": (10.0, 2.0), "hkr": (5.0, 1.0)}[loss]
    logits = torch.randn(2, 11, 4, 4, requires_grad=True)
    masks = torch.randint(11, (2, 4, 4))
    masks[:, 0] = IGNORE
    value = LOSSES[loss](*dial)(logits, masks)
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(value, LOSSES[loss](*dial)(logits[:, :, 1:], masks[:, 1:]))
    assert (gradient[:, :, 0] == 0).all() and (gradient[:, :, 1:] != 0).any()


# --- certificates against attacks


@pytest.mark.parametrize("name", LIPSCHITZ)
@pytest.mark.parametrize("eps", [0.05, 0.3, 1.0])
def test_no_certified_pixel_flips_and_no_score_falls_below_its_certificate(name, eps):
    """Labels are the network's own answers, so that all pixels are right and the attack has something to break."""
    model = without_parametrizations(small(name, seed=1))
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = checked_logits(model, x, 1.0001, model[-1].weight)
    masks, rows = logits.argmax(1), model[-1].weight
    moved = pgd_l2(model, x, masks, eps, steps=30)
    attacked = model(moved).argmax(1)
    certain = radius(logits, masks, 1.0001, rows) > eps
    assert not (certain & (attacked != masks)).any()
    certified = certified_pixel_accuracy(logits, masks, eps, 1.0001, rows)
    assert (pixel_accuracy(attacked, masks) >= certified).all()
    assert (miou(attacked, masks, 11) >= certified_miou(logits, masks, eps, 1.0001, rows)).all()
    if eps == 1.0:
        assert (attacked != masks).any()


@pytest.mark.skipif("segmentation-unet" not in SHIPPED, reason="the weights are being made")
@pytest.mark.parametrize("eps", [0.03, 0.3])
def test_shipped_network_keeps_its_promises_and_promises_something(eps):
    model, run = trained("segmentation-unet")
    x, y = pictures("test", 6, 32, "ink", TEST_SEED)
    bound, rows = run["trunk"], model[-1].weight
    logits = checked_logits(model, x, bound, rows)
    certain = radius(logits, y, bound, rows) > eps
    certified = certified_miou(logits, y, eps, bound, rows)
    for loss in (None, soft_flips):
        moved = pgd_l2(model, x, y, eps, steps=10, loss=loss, score=flipped)
        attacked = model(moved).argmax(1)
        assert not (certain & (attacked != y)).any()
        assert (miou(attacked, y, 2) >= certified).all()
        assert (attacked != logits.argmax(1)).any()
    assert certain.any() or eps == 0.3
    assert certified.mean() > (0.5 if eps == 0.03 else 0.2)


# --- the trainings


def test_a_recipe_repeats_bit_for_bit_and_says_what_it_did():
    (one, run), (two, again) = (train_by(TASK, SHORT, torch.device("cpu"), seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert {**run, "seconds": 0} == {**again, "seconds": 0}
    assert {"steps", "data", "recipe", "miou", "pixel_accuracy", "trunk", "certified_miou"} <= set(run)
    assert run["trunk"] <= 1 + 1e-4 and run["certified_miou"][0][1] <= run["miou"]


def test_training_under_noise_differs_only_by_the_noise():
    quiet, noisy = (train_by(TASK, replace(SHORT, noise=n), torch.device("cpu"))[1] for n in (0.0, 0.5))
    assert quiet["data"] == noisy["data"] and quiet["loss"] != noisy["loss"]


def test_shifted_masks_ignore_what_came_in_from_outside():
    class Spy(nn.Module):
        def forward(self, logits, masks):
            self.seen = masks
            return logits.sum()

    torch.manual_seed(0)
    counts = set()
    for _ in range(20):
        spy = Spy()
        Shifted(Supervised(spy))(nn.Identity(), (torch.rand(1, 3, 6, 6), torch.ones(1, 6, 6, dtype=torch.long)))
        assert set(spy.seen.unique().tolist()) <= {1, IGNORE}
        counts.add(int((spy.seen == 1).sum()))
    assert 36 in counts or len(counts) > 3
    assert min(counts) >= 16


def test_pictures_come_with_a_label_for_every_pixel():
    images, masks = pictures("test", items=4, pixels=16)
    assert images.shape[2:] == masks.shape[1:] == (16, 16) and len(images) == len(masks)
    assert set(masks.unique().tolist()) <= set(range(11)) and (masks < 10).any()
    assert torch.equal(pictures("test", items=4, pixels=16, labels="ink")[1], (masks < 10).long())
    with pytest.raises(ValueError, match="no labels 'boxes'; there are: digits, ink"):
        pictures("test", items=4, labels="boxes")


@pytest.mark.parametrize("objective", [flipped, soft_flips])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_what_an_attack_ascends_counts_a_class_156_in_every_whole_type(objective, dtype):
    """In eight bits without a sign -100, the label that is ignored, would be 156."""
    logits = torch.randn(2, 160, 3, 3, generator=torch.Generator().manual_seed(0))
    masks = torch.full((2, 3, 3), 156)
    assert torch.equal(objective(logits, masks.to(dtype)), objective(logits, masks))
    assert (objective(logits, masks) > 0).any()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 4), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_soft_flips_are_above_a_half_exactly_where_a_pixel_is_flipped(seed, classes, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, classes, 3, 3, generator=generator)
    masks = torch.randint(classes, (2, 3, 3), generator=generator)
    masks[0, 0] = IGNORE
    assert torch.equal(flipped(logits, masks), (soft_flips(logits, masks) > 0.5).float())
    assert (flipped(logits, masks)[0, 0] == 0).all()


def test_command_writes_weights_that_the_package_can_load(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "segmentation-test", SHORT)
    assert main(["train", "segmentation-test", "--steps", "1", "--device", "cpu", "--folder", str(tmp_path)]) == 0
    assert (tmp_path / "segmentation-test.safetensors").exists()
    assert main(["train", "segmentation-nonsense", "--folder", str(tmp_path)]) == 1


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_score_what_their_run_says(name):
    model, run = trained(name)
    recipe = RECIPES[name]
    images, masks = pictures("test", recipe.test_items, recipe.pixels, recipe.labels, TEST_SEED)
    generator = torch.Generator().manual_seed(0)
    images = images + recipe.noise * torch.randn(images.shape, generator=generator)
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in images.split(50)])
    assert pooled_miou(predicted, masks, model[-1].out_channels).item() == pytest.approx(run["pooled_miou"], abs=2e-3)
    if recipe.lipschitz:
        assert lipschitz_bound(model[:-1].eval(), tuple(images.shape[1:])).value <= 1 + 1e-4


def test_unknown_weights_are_answered_with_those_that_there_are():
    with pytest.raises(ValueError, match="no weights 'segmentation-vit'.*segmentation-unet"):
        network_of("segmentation-vit")

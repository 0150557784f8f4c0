"""FCOS: which cells answer for which object, its loss, and a trunk that is 1-Lipschitz."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import box_iou, generalized_box_iou_loss

from lipguide.bounds.network import lipschitz_bound
from lipguide.tasks.detection.attacks import ATTACKS, attack_l2
from lipguide.tasks.detection.boxes import pad_targets
from lipguide.tasks.detection.fcos import FCOSLoss, FCOSOutput, _giou_loss, assign, fcos, ordinary_fcos
from lipguide.tasks.detection.losses import DetectionStep
from lipguide.tasks.detection.scores import detections, score
from lipguide.training import fit
from tests.tasks.detection.test_boxes import BY_HAND, random_scenes, targets_by_hand

CENTRES = fcos(4).centres


def assigned_by_hand(boxes, labels):
    """The rule, one centre at a time."""
    classes, owners = [], []
    distance = [[max(abs(float(c[i]) - float(b[i] + b[i + 2]) / 2) for i in (0, 1)) for b in boxes] for c in CENTRES]
    for index, c in enumerate(CENTRES.tolist()):
        able = []
        for k, b in enumerate(boxes.tolist()):
            inside = b[0] < c[0] < b[2] and b[1] < c[1] < b[3]
            nearest = distance[index][k] == min(row[k] for row in distance)
            if (inside and distance[index][k] < 1.5 / 18) or nearest:
                able.append(((b[2] - b[0]) * (b[3] - b[1]), k))
        owners.append(min(able)[1] if able else None)
        classes.append(int(labels[owners[-1]]) if able else 10)
    return classes, owners


@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.integers(0, 10_000))
def test_assignment_is_that_of_brute_force(seed):
    boxes, labels = random_scenes(seed, scenes=2)
    found, where = assign(pad_targets(boxes, labels), CENTRES)
    for scene, (b, c) in enumerate(zip(boxes, labels, strict=True)):
        classes, owners = assigned_by_hand(b, c)
        assert found[scene].tolist() == classes
        assert all(o is None or torch.equal(where[scene, p], b[o]) for p, o in enumerate(owners))


def perfect(targets):
    """The output that says what is there, without doubt."""
    classes, boxes = assign(targets, CENTRES)
    logits = 40.0 * nn.functional.one_hot(classes, 11)[..., :-1] - 20.0
    sides = torch.cat([CENTRES - boxes[..., :2], boxes[..., 2:] - CENTRES], -1).clamp(min=1e-3)
    ratio = torch.minimum(sides[..., :2], sides[..., 2:]) / torch.maximum(sides[..., :2], sides[..., 2:])
    return FCOSOutput(logits, sides, torch.logit(ratio.prod(-1).sqrt().clamp(1e-6, 1 - 1e-6)))


TWO = pad_targets([torch.tensor([[0.1, 0.1, 0.4, 0.9], [0.5, 0.2, 0.9, 0.8]])], [torch.tensor([4, 7])])


def test_a_perfect_output_finds_every_object():
    model, output = fcos(4), perfect(TWO)
    best = output.logits[0].amax(1).argmax()
    assert box_iou(model.boxes(output)[0, best, None], TWO.boxes[0]).max() > 0.999


def test_the_loss_of_a_perfect_output_is_that_of_its_centerness_alone():
    """Neither the classes nor the boxes of a perfect output cost anything; cross-entropy with a share does."""
    loss, output = FCOSLoss(CENTRES, tau=1.0), perfect(TWO)
    share = output.centerness.sigmoid()
    entropy = -(share * share.log() + (1 - share) * (1 - share).log())
    positive = assign(TWO, CENTRES)[0] != 10
    assert loss(output, TWO).item() == pytest.approx(entropy[positive].mean().item(), abs=1e-3)
    shifted = output._replace(sides=output.sides * 1.3)
    assert loss(shifted, TWO) > loss(output, TWO) + 0.1
    mistaken = output._replace(logits=output.logits.roll(1, 2))
    assert loss(mistaken, TWO) > loss(output, TWO) + 1


@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.integers(0, 10_000))
def test_mean_is_the_sum_over_scenes_by_all_positives(seed):
    targets = pad_targets(*random_scenes(seed, scenes=4))
    g = torch.Generator().manual_seed(seed)
    output = FCOSOutput(
        torch.randn(4, 324, 10, generator=g), torch.rand(4, 324, 4, generator=g), torch.randn(4, 324, generator=g)
    )
    counts = (assign(targets, CENTRES)[0] != 10).sum(1)
    each = FCOSLoss(CENTRES, 3.0, reduction="none")(output, targets)
    expected = (each * counts.clamp(min=1)).sum() / counts.sum().clamp(min=1)
    assert FCOSLoss(CENTRES, 3.0)(output, targets).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_giou_is_that_of_torchvision_to_the_last_bit(seed):
    g = torch.Generator().manual_seed(seed)
    low, high = torch.rand(2, 2, 300, 2, generator=g).sort(0).values
    found, wanted = torch.cat([low, high], -1)
    wanted[:20] = found[:20]
    found.requires_grad_()
    ours, theirs = _giou_loss(found, wanted), generalized_box_iou_loss(found, wanted)
    slopes = [torch.autograd.grad(value.sum(), found)[0] for value in (ours, theirs)]
    assert torch.equal(ours, theirs) and torch.allclose(*slopes, atol=1e-6)


def test_scenes_without_objects_have_finite_gradients():
    targets = pad_targets([torch.zeros(0, 4), TWO.boxes[0]], [torch.tensor([]), TWO.labels[0]])
    model = fcos(4)
    loss = model.training_loss()(model(torch.rand(2, 3, 74, 74, generator=torch.Generator().manual_seed(0))), targets)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    empty = pad_targets([torch.zeros(0, 4)], [torch.tensor([])])
    assert model.training_loss()(model(torch.rand(1, 3, 74, 74)), empty).isfinite()


def test_trunk_is_1_lipschitz_and_every_class_logit_too():
    torch.manual_seed(0)
    model = fcos(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (-model(torch.rand(1, 3, 74, 74)).logits.square().mean()).backward()
        optimizer.step()
    model.eval()
    assert lipschitz_bound(model.trunk, (3, 74, 74)).value <= 1 + 1e-4
    assert torch.allclose(model.class_head.weight.flatten(1).norm(dim=1), torch.ones(10))
    x = torch.rand(1, 3, 74, 74, requires_grad=True)
    logits = model(x).logits[0]
    for cell, label in ((0, 0), (160, 3), (323, 9)):
        (gradient,) = torch.autograd.grad(logits[cell, label], x, retain_graph=True)
        assert gradient.norm() <= 1 + 1e-4


@pytest.mark.parametrize("make", [lambda: fcos(8), lambda: ordinary_fcos(8)], ids=["1-Lipschitz", "ordinary"])
def test_one_picture_is_learnt_by_heart(make):
    torch.manual_seed(0)
    model, image = make(), torch.full((1, 3, 74, 74), 0.2)
    image[0, 0, 8:66, 8:29] = image[0, 2, 16:59, 38:66] = 1  # a red object and a blue one
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    fit(model, (image, *TWO), DetectionStep(model.training_loss()), optimizer, 60, 1, schedule="one-cycle")
    result = score(detections(model.eval(), image), TWO)
    assert result.map50 == 100 and result.recall == 100


@pytest.mark.parametrize("name", ["training loss", *ATTACKS])
def test_attacks_know_this_detector_too(name):
    torch.manual_seed(0)
    model, x = ordinary_fcos(4).eval(), torch.rand(1, 3, 74, 74)
    nn.init.zeros_(model.class_head.bias)  # it finds both objects: there is something to lose
    moved = attack_l2(model, x, TWO, 0.5, name, steps=2)
    assert 0 < (moved - x).norm() <= 0.5 + 1e-5


@pytest.mark.parametrize("name", ["vanish", "fabricate"])
def test_no_attack_takes_a_score_below_or_above_what_the_two_constants_allow(name):
    """The theorem of the chapter for √(σ(τz) σ(c)): z moves by the distance at most, c by the constant of its head."""
    torch.manual_seed(0)
    model, x = fcos(4).eval(), torch.rand(1, 3, 74, 74)
    nn.init.zeros_(model.class_head.bias)
    moved = attack_l2(model, x, TWO, 0.5, name, steps=5)
    assert (moved - x).norm() > 0
    distance = (moved - x).norm() * lipschitz_bound(model.trunk, (3, 74, 74)).value
    reach = distance * lipschitz_bound(model.box_head, (8, 18, 18)).value
    with torch.no_grad():
        before, after = model(x), model.log_scores(model(moved))
    for sign in (-1, 1):
        shifted = before._replace(logits=before.logits + sign * distance, centerness=before.centerness + sign * reach)
        assert (sign * (model.log_scores(shifted) - after) >= -1e-5).all()
    assert (after - model.log_scores(before)).abs().max() > 1e-3


@pytest.mark.parametrize("case", BY_HAND)
def test_targets_built_by_hand_are_refused_with_the_scene(case):
    box, label, message = BY_HAND[case]
    model = fcos(4)
    output = model(torch.rand(2, 3, 74, 74))
    for use in (model.training_loss(), lambda _, targets: assign(targets, CENTRES)):
        with pytest.raises(ValueError, match=message):
            use(output, targets_by_hand(box, label))


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="tau must lie strictly between 0"):
        fcos(4, tau=-1.0)
    assert fcos(4, tau=5.0).class_head.bias[0].item() == pytest.approx(math.log(0.01 / 0.99) / 5)

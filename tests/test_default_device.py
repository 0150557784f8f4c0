"""torch's default device has no say in what lies on another: as on a machine where somebody has set it to CUDA.

The device "meta" stands for that one. It holds no numbers, so whoever forgets to say where a tensor belongs fails.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lipguide as lip
from lipguide.tasks.detection.attacks import mixture
from lipguide.tasks.detection.boxes import Targets, pad_targets
from lipguide.tasks.detection.certificates import answers, certified_ap, certify
from lipguide.tasks.detection.reader import Detector
from lipguide.tasks.detection.reader_step import ReaderStep
from lipguide.tasks.detection.scores import score
from lipguide.tasks.detection.smoothing import smoothed, surely_found
from lipguide.tasks.detection.sure import rates
from lipguide.tasks.detection.sure import surely_found as surely_found_by_rates
from lipguide.tasks.detection.unlearnt import unlearnt
from lipguide.tasks.segmentation.recipes import noisy

CONSTRAINTS = ["spectral", "orthogonal", "aol", "frobenius", "unit_rows", "l2_normalized"]


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = lip.spectral(nn.Conv2d(3, 4, 3, padding=1))

    def forward(self, x):
        x = F.relu(self.convolution(x)) / 2
        return F.max_pool2d(x, 2) + F.avg_pool2d(x, 2)


def network():
    torch.manual_seed(0)
    parts = [Own(), nn.ReflectionPad2d(1), nn.Upsample(scale_factor=1.3, mode="bilinear"), nn.ReplicationPad2d(1)]
    parts += [lip.orthogonal(nn.Conv2d(4, 8, 3, 2)), lip.SLL(8, 8), lip.ScaledL2NormPool2d(2), nn.Flatten()]
    return nn.Sequential(*parts, lip.SLLLinear(32, 8), lip.unit_rows(nn.Linear(32, 3))).eval()


def numbers(model, x):
    """What a reader of the quickstart asks for."""
    y = model(x).argmax(1)
    bound = lip.lipschitz_bound(model[:-1].eval(), (3, 8, 8)).value
    rows = model[-1].weight.detach()
    logits = lip.certificates.checked_logits(model, x, bound, rows)
    radii = lip.certificates.radius(logits, y, bound, rows)
    yield bound
    yield lip.lipschitz_lower_bound(model, x, steps=3)
    yield lip.most_stretched_pair(model, x, steps=3).stretch
    yield from radii.tolist() + lip.certificates.local_radius(model, x).tolist()
    yield from lip.certificates.holds_within(model, x, 1.2 * radii.median().item()).tolist()
    yield from lip.certificates.certified_accuracy(logits, y, [0.1, 0.2], bound, rows).tolist()
    yield lip.certificates.hunt(model, x, y, radii, steps=3).outside
    yield from lip.attacks.robust_accuracy_curve(model, x, y, [0.0, 0.3], steps=3).tolist()
    yield lip.attacks.noise(model, x, y, 0.1).sum().item()
    yield lip.export(model)(x).sum().item()
    yield lip.losses.MulticlassKR()(model(x), y).item()


def test_a_network_is_bounded_attacked_and_certified_as_before():
    model, x = network(), torch.rand(4, 3, 8, 8)
    before = list(numbers(model, x))
    with torch.device("meta"):
        assert list(numbers(model, x)) == before


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_layer_is_constrained_where_it_is(constraint):
    layer, weights = nn.Conv2d(4, 8, 1), []
    for device in ("cpu", "meta"):
        with torch.device(device):
            torch.manual_seed(0)
            weights.append(getattr(lip, constraint)(copy.deepcopy(layer)).eval().weight)
    assert torch.equal(*weights)


def test_a_training_goes_on_as_before():
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 3
    histories = []
    for device in ("cpu", "meta"):
        model = network()
        step = lip.training.Shifted(lip.training.Supervised(nn.CrossEntropyLoss()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch.device(device):
            lip.training.fit(model, (x, y), step, optimizer, steps=3, batch_size=4)
        histories.append([part.clone() for part in model.parameters()])
    assert all(map(torch.equal, *histories))


@pytest.mark.parametrize("look", [False, True])
def test_a_detector_is_certified_as_before(look):
    torch.manual_seed(0)
    model, x = Detector((8, 8, 8), 16, residual=look, block=look).eval(), torch.rand(2, 3, 74, 74)
    found = answers(model, x).detections(-2.0)
    targets = pad_targets([scene["boxes"][:1] for scene in found], [scene["labels"][:1] for scene in found])
    before = certify(answers(model, x, look=look), targets, 0.01, -2.0)
    rated = score(found, targets)
    with torch.device("meta"):
        there = certify(answers(model, x, look=look), targets, 0.01, -2.0)
        assert certified_ap(there) == certified_ap(before)
        assert score(found, targets) == rated
    assert torch.equal(there.heights, before.heights) and torch.equal(there.births, before.births)


def test_a_step_of_the_reader_is_taken_as_before():
    torch.manual_seed(0)
    model = Detector((8, 8, 8), 16)
    step = ReaderStep(model.training_loss())
    batch = torch.rand(2, 3, 74, 74), torch.tensor([[[0.3, 0.2, 0.5, 0.7]]]).expand(2, 1, 4), torch.ones(2, 1).long()
    values = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        with torch.device(device):
            values.append(step(model, batch).item())
    assert values[0] == values[1]


def elsewhere(detector, picture, targets):
    """What is asked of detectors that carry no certificate of their own, and of pictures with noise."""
    boxes, labels = targets.boxes[0], targets.labels[0]
    one = [{"boxes": boxes, "scores": torch.full((1,), 0.9, device="cpu"), "labels": labels}]
    yield noisy(picture, 0.1).sum().item()
    bounds = smoothed(lambda pictures: one * len(pictures), picture[0], 0.01, 0.1, 40)
    yield surely_found(bounds, boxes, labels).tolist()
    nothing = [{name: part[:0] for name, part in one[0].items()}]
    yield len(mixture({"weak": one, "strong": nothing}, targets)[0]["labels"])
    yield surely_found_by_rates(detector, rates(detector), picture, targets, 0.01)


def test_other_detectors_are_judged_as_before():
    box = torch.tensor([[[0.1, 0.1, 0.4, 0.8]]])
    picture, targets = torch.rand(1, 3, 74, 74), Targets(box, torch.tensor([[1]]))
    torch.manual_seed(0)
    given = unlearnt("sll", width=4).eval(), picture, targets
    before = list(elsewhere(*given))
    with torch.device("meta"):
        assert list(elsewhere(*given)) == before

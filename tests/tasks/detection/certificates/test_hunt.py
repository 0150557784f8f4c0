"""The hunt: no certificate of an honest detector falls to it, and those with a mistake in them do."""

import pytest
import torch
from torch import nn

from lipguide.tasks.detection.boxes import pad_targets
from lipguide.tasks.detection.certificates import answers, certify
from lipguide.tasks.detection.certificates.hunt import hunt
from lipguide.tasks.detection.decision import radii, together
from lipguide.tasks.detection.pyramid import averages

PIXELS, WINDOWS, CLASSES, FEATURES, REACH, EPS = 8, 7, 2, 6, 0.1, 0.22


class Toy(nn.Module):
    """Windows in a row read an orthonormal share of the features of a level; heads with unit rows, √2 apart.

    Args:
        mistake: of the certificate, not of the detector: "root" forgets that two logits move apart by √2, "rows" that
            the rows are longer than 1, "gain" what the level multiplies.
    """

    def __init__(self, mistake=""):
        super().__init__()
        torch.manual_seed(0)
        self.mistake = mistake
        shares = averages(PIXELS, PIXELS // 2)
        shares = shares / torch.linalg.matrix_norm(shares, 2)
        self.register_buffer("level", (shares * (1.5 if mistake == "gain" else 1.0)).float())
        basis = torch.linalg.qr(torch.randn(WINDOWS, 3 * (PIXELS // 2) ** 2, FEATURES))[0]
        self.register_buffer("basis", basis)  # (windows, pixels of the level, features)
        self.register_buffer("rows", torch.eye(CLASSES + 1, FEATURES) * (1.5 if mistake == "rows" else 1.0))
        self.register_buffer("sides", torch.linalg.qr(torch.randn(FEATURES, 4))[0])
        place = torch.arange(WINDOWS) / 8
        base = torch.stack([place, torch.full_like(place, 0.2), place + 0.2, torch.full_like(place, 0.8)], 1)
        self.register_buffer("base", base)

    def features(self, x):
        level = self.level @ (x - 0.5) @ self.level.mT
        return torch.einsum("np,wpf->nwf", level.flatten(1), self.basis)

    def forward(self, x):
        features = self.features(x)
        return features @ self.rows.mT, self.base + REACH * features @ self.sides

    def scores(self, output):
        if self.mistake == "root":
            return radii(output[0], self.rows) * 2**0.5
        unit = nn.functional.normalize(self.rows, dim=1)
        return radii(output[0], unit)

    def boxes(self, output):
        return output[1]

    def rivals(self):
        place = torch.arange(WINDOWS)
        return (place[:, None] - place).abs() <= 2

    def constants(self):
        unit = nn.functional.normalize(self.rows, dim=1)
        return 1.0, torch.full((WINDOWS,), REACH), together(unit, self.sides.mT)


def scenes(model, count=100):
    """Random pictures, in each an object where the detector's best answer stands, if it gives one."""
    generator = torch.Generator().manual_seed(1)
    images = (0.5 + 0.25 * torch.randn(count, 3, PIXELS, PIXELS, generator=generator)).clamp(0.05, 0.95)
    found = answers(model.eval(), images).detections()
    boxes = [scene["boxes"][:1] for scene in found]
    labels = [scene["labels"][:1] for scene in found]
    return images, pad_targets(boxes, labels, CLASSES)


def test_no_certificate_of_an_honest_detector_falls():
    model = Toy()
    images, targets = scenes(model)
    certificate = certify(answers(model, images), targets, EPS)
    result = hunt(model, images, targets, certificate, steps=15)
    assert result.hunted >= 5
    assert sum(result.fallen.values()) == 0 and result.overrun == 0


@pytest.mark.parametrize("mistake", ["root", "rows", "gain"])
def test_a_constant_with_a_mistake_in_it_is_caught(mistake):
    model = Toy(mistake)
    images, targets = scenes(model)
    certificate = certify(answers(model, images), targets, EPS)
    result = hunt(model, images, targets, certificate, steps=15)
    assert sum(result.fallen.values()) > 0


def test_suppression_that_is_ignored_is_caught():
    model = Toy()
    images, targets = scenes(model)
    certificate = certify(answers(model, images), targets, EPS)
    ignored = certificate._replace(heights=certificate.before)
    result = hunt(model, images, targets, ignored, steps=15)
    assert result.hunted > int((certificate.heights > 0).sum())
    assert result.fallen["suppressor"] > 0


def test_a_bound_on_alarms_that_counts_only_what_speaks_now_is_caught():
    model = Toy()
    images, targets = scenes(model)
    given = answers(model, images)
    certificate = certify(given, targets, EPS)
    today = certify(given, targets, 0.0)
    # All that surely speak are hunted, so that more scenes are.
    blind = today._replace(eps=EPS, heights=certificate.before)
    assert hunt(model, images, targets, blind, steps=15).overrun > 0


def test_a_bound_on_false_alarms_that_takes_every_box_for_right_is_caught():
    model = Toy()
    images, targets = scenes(model)
    certificate = certify(answers(model, images), targets, EPS)
    hunted = certificate._replace(heights=certificate.before)
    assert hunt(model, images, targets, hunted, steps=15).overrun == 0
    blind = hunted._replace(alarms=torch.full_like(hunted.alarms, -torch.inf))
    assert hunt(model, images, targets, blind, steps=15).overrun > 0


def test_a_certificate_for_which_nothing_moves_is_caught():
    """The hunt must not take from the certificate what it is to hunt: at a large eps no window is surely right."""
    model = Toy()
    images, targets = scenes(model)
    given = answers(model, images)
    frozen = given._replace(steepness=0.0, reach=torch.zeros_like(given.reach))
    certificate = certify(frozen, targets, 2.0)
    result = hunt(model, images, targets, certificate, steps=15)
    assert result.hunted >= 5 and min(result.fallen[aim] for aim in ("label", "suppressor")) > result.hunted / 2


class Louder(Toy):
    """It moves twice as fast as the constants say that it inherits."""

    def forward(self, x):
        return super().forward(2 * x)


class Sharper(Toy):
    def scores(self, output):
        return 2 * super().scores(output)


@pytest.mark.parametrize("kind", [Louder, Sharper])
def test_constants_that_a_subclass_has_overtaken_are_not_believed(kind):
    with pytest.raises(
        ValueError, match=f"cannot be certified: its method constants is that of Toy, but {kind.__name__}"
    ):
        answers(kind().eval(), torch.rand(2, 3, PIXELS, PIXELS))


def test_a_hook_that_may_change_an_answer_is_refused():
    model = Toy().eval()
    model.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    with pytest.raises(ValueError, match="it carries a hook"):
        answers(model, torch.rand(2, 3, PIXELS, PIXELS))

"""What certificates rest on is in float32 or better, and near enough to float64 for the room that rounding is given."""

import pytest
import torch
from torch.nn.utils import parametrize

from lipguide.tasks.detection.certificates import Answers, answers
from lipguide.tasks.detection.certificates.answers import said_of
from lipguide.tasks.detection.reader import Detector
from lipguide.tasks.harness import trained

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
LOOK = pytest.mark.parametrize("look", [False, True])


def small(look=False):
    torch.manual_seed(0)
    return Detector((8, 8, 8), 16, residual=look, block=look).eval(), torch.rand(3, 3, 74, 74)


@HALF
@LOOK
def test_half_precision_certifies_nothing(dtype, look):
    model, x = small(look)
    for images, message in ((x.to(dtype), "pictures of"), (x, r"weights \(.*\) of")):
        with pytest.raises(ValueError, match=f"certify in float32 or float64: {message} {dtype}"):
            answers(model.to(dtype), images, look=look)
        with pytest.raises(ValueError, match=f"certify in float32 or float64: {message} {dtype}"):
            said_of(model, images)


@HALF
def test_one_weight_in_half_precision_is_enough(dtype):
    model, x = small()
    parametrize.remove_parametrizations(model.class_head, "weight")
    model.class_head.to(dtype)
    with pytest.raises(ValueError, match=r"weights \(class_head.weight|weights \(class_head.bias"):
        answers(model, x)


class Coarse(Detector):
    """It rounds what it says, whatever its weights are."""

    def scores(self, output):
        return super().scores(output).bfloat16()

    def constants(self):
        return super().constants()


def test_scores_in_half_precision_are_refused():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="scores of torch.bfloat16"):
        answers(Coarse((8, 8, 8), 16).eval(), torch.rand(1, 3, 74, 74))


@pytest.mark.parametrize("what", ["scores", "boxes"])
@HALF
def test_given_answers_in_half_precision_are_refused(what, dtype):
    given = Answers(torch.zeros(1, 2, 1), torch.zeros(1, 2, 4), torch.eye(2).bool(), 1.0, torch.ones(2), torch.ones(1))
    given.check()
    with pytest.raises(ValueError, match=f"{what} of {dtype}"):
        given._replace(**{what: getattr(given, what).to(dtype)}).check()


def rows_that_nearly_agree(model):
    parametrize.remove_parametrizations(model.class_head, "weight")
    rows = model.class_head.weight
    rows[1] = rows[0] + 1e-3 * torch.nn.functional.normalize(rows[2], dim=0)


def large_logits(model):
    model.class_head.bias += 3000 * torch.rand(11)


def large_sides(model):
    model.box_head.bias += 300


@LOOK
@pytest.mark.parametrize(
    "change, what", [(rows_that_nearly_agree, "scores"), (large_logits, "scores"), (large_sides, "boxes")]
)
def test_what_float32_rounds_by_more_than_there_is_room_for_is_refused(change, what, look):
    model, x = small(look)
    with torch.no_grad():
        change(model)
    for images in (x, x[:1]):
        with pytest.raises(ValueError, match=f"the detector's {what} are up to .* from those in float64"):
            answers(model, images, look=look)
    given = answers(model.double(), x.double(), look=look)  # as the message says
    assert given.scores.dtype == given.boxes.dtype == torch.float64


@LOOK
@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_is_answered_is_what_the_model_says(look, count):
    model, x = small(look)
    given = answers(model, x[:count], batch_size=2, look=look)
    for part, said in zip(given[:3], said_of(model, x[:count], 2), strict=True):
        assert torch.equal(part, said)


def test_what_ships_is_far_from_the_limit():
    """A hundredth of the room for rounding is taken up, of which a fifth may be."""
    model, x = trained("detection-reader")[0], torch.rand(1, 3, 74, 74, generator=torch.Generator().manual_seed(0))
    for one in (x, (x * 0 + 0.5).clamp(0, 1), (20 * (x - 0.5)).clamp(0, 1)):
        exact = said_of(model.double(), one.double())
        given = answers(model.float(), one, look=True)
        assert (given.scores - exact[0]).abs().max() < 5e-6 and (given.boxes - exact[1]).abs().max() < 1e-6

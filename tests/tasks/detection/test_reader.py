"""The pyramid and the reader: norms against true Jacobians, windows against one another, the decision by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import lipguide as lip
from lipguide.layers.export import without_parametrizations
from lipguide.tasks.classification.networks import residual as residual_network
from lipguide.tasks.classification.networks import vgg
from lipguide.tasks.detection import reader, reader_step
from lipguide.tasks.detection.boxes import check_targets, pad_targets
from lipguide.tasks.detection.certificates import answers
from lipguide.tasks.detection.data import load_split
from lipguide.tasks.detection.decision import heard, radii, reported, rivals
from lipguide.tasks.detection.pyramid import Canvas, Level, averages
from lipguide.tasks.detection.reader import Detector
from lipguide.tasks.detection.reader_step import ReaderStep
from lipguide.tasks.detection.scores import score
from lipguide.tasks.detection.start import take_over
from lipguide.tasks.detection.windows import CELL, HEIGHT, WIDTH, assign, places
from tests.oracles import jacobian_norm


def small(seed=0, residual=False):
    torch.manual_seed(seed)
    return Detector((8, 8, 8), 16, residual=residual, block=residual)


both_kinds = pytest.mark.parametrize("residual", [False, True])


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(1, 12), st.integers(0, 3))
def test_a_level_has_norm_1_and_averages(pixels, side, zeros):
    level = Level(pixels, Canvas(side, side + 2 * zeros, side + zeros, zeros, zeros)).eval()
    rows = torch.eye(pixels**2).reshape(-1, 1, pixels, pixels)
    matrix = level(rows).flatten(1).double().mT
    largest = float(torch.linalg.matrix_norm(matrix, 2))
    assert 1 - 1e-5 <= largest <= 1
    bound = lip.lipschitz_bound(level, (1, pixels, pixels)).value
    assert largest - 1e-6 <= bound <= 1
    inside = level(torch.ones(1, 1, pixels, pixels))[0, 0, zeros : zeros + side, zeros : zeros + side]
    assert torch.allclose(inside, inside[:1, :1].expand_as(inside), atol=1e-5)
    assert torch.allclose(averages(pixels, side).sum(1), torch.ones(side).double())


def test_a_level_survives_export():
    level = Level(6, Canvas(3, 5, 4, 1, 1)).eval()
    x = torch.rand(2, 3, 6, 6)
    assert torch.allclose(lip.export(level)(x), level(x), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_handicap_lowers_nothing_alone_where_windows_decide_and_where_they_are_looked_into(dtype):
    model = small(residual=True).to(dtype).eval()
    model.class_head.bias.data[10] += 1  # nothing is ahead
    x, bias = torch.rand(2, 3, 74, 74, dtype=dtype), model.class_head.bias.clone()
    said = {}
    for handicap in (0.0, 0.3, 5.0):
        model.handicap = handicap
        output = model(x)
        lowered = output.logits - handicap * torch.eye(11, dtype=dtype)[10]
        said[handicap] = model.scores(output)
        assert torch.equal(said[handicap], radii(lowered, model.class_head.weight.detach()))
        inside = answers(model, x, look=True).inside
        entries = torch.ones_like(said[handicap], dtype=torch.bool).nonzero(as_tuple=True)
        still = inside.falls(entries, 0.0, 0.0, "box").reshape(said[handicap].shape)
        assert torch.allclose(still.to(dtype), said[handicap], atol=1e-5)
    assert torch.equal(model.class_head.bias, bias)
    rows = model.class_head.weight.detach()
    most = 0.3 / (rows[:-1] - rows[-1]).norm(dim=1)
    rise = said[0.3] - said[0.0]
    assert (rise >= -1e-6).all() and (rise <= most + 1e-6).all() and rise.max() > 0.9 * most.min()
    between = radii(torch.cat([output.logits[..., :-1], output.logits[..., :1] * 0 - 1e3], -1), rows)
    assert torch.allclose(said[5.0], between, atol=1e-5)  # so large a one leaves the digits to one another


@both_kinds
def test_scores_and_boxes_move_no_faster_than_the_constants_say(residual):
    model = small(residual=residual).double().eval()
    model.levels.float().double()
    steepness, reach, both = model.constants()
    x = torch.rand(1, 3, 74, 74, dtype=torch.float64, requires_grad=True)
    output = model(x)
    scores, boxes = model.scores(output)[0], model.boxes(output)[0]
    for window in (0, 40, 100, 200, 342):
        slopes = []
        for label in (0, 7):
            (slope,) = torch.autograd.grad(scores[window, label], x, retain_graph=True)
            assert slope.norm() <= steepness * (1 + 1e-6)
            slopes.append(slope.flatten())
        rows = [torch.autograd.grad(side, x, retain_graph=True)[0].flatten() for side in boxes[window]]
        assert torch.linalg.matrix_norm(torch.stack(rows), 2) <= reach[window] * (1 + 1e-6)
        for label, slope in zip((0, 7), slopes, strict=True):
            five = torch.stack([slope / steepness, *(row / reach[window] for row in rows)])
            assert torch.linalg.matrix_norm(five, 2) <= both[label] * (1 + 1e-6) <= 2**0.5 * (1 + 1e-5)


def blurred(residual):
    model = small(residual=residual).double().eval()
    for layer in (*model.trunk, model.halve, *model.cells, model.read):
        if isinstance(layer, nn.Conv2d):
            parametrize.remove_parametrizations(layer, "weight")
            torch.nn.init.constant_(layer.weight, 0.1)
    return model


@both_kinds
def test_a_window_of_blurs_is_bounded_by_what_it_sees(residual):
    """Brute force: the norm of a window's Jacobian. On 32×32 pixels blurs would lose a part of theirs to a border that
    a window has not, and on a canvas they keep what a window does not see."""
    model = blurred(residual)
    steepness, _, _ = model.constants()
    middle = 22  # of the 5×9 windows of the first level
    reached = jacobian_norm(lambda x: model.below(x, 0)[:, middle], torch.rand(1, 3, 74, 74).double(), 20)
    assert 0.8 * steepness < reached <= steepness * (1 + 1e-6)


@both_kinds
def test_around_a_patch_there_may_be_anything(residual):
    """Layer by layer, what is done to the patch that the next one reads, with all that it is made of: a bound for a
    picture of that size, which is zero around it, would be too low."""
    model = blurred(residual)
    side, product = 4, jacobian_norm(model.read, torch.rand(1, model.read.in_channels, 4, 4).double(), 60)
    for layer in reversed([*model.trunk, model.halve, *model.cells]):
        if isinstance(layer, nn.Conv2d):
            around = side * layer.stride[0] + 2 * layer.padding[0]
            x = torch.rand(1, layer.in_channels, around, around).double()
            product *= jacobian_norm(lambda x, of=layer: torch.conv2d(x, of.weight, stride=of.stride), x, 60)
            side = around
    steepness, _, _ = model.constants()
    assert product <= steepness * (1 + 1e-6) and steepness < 1.05 * product


class FiveTimes(nn.Conv2d):
    def forward(self, x):
        return 5 * super().forward(x)


class Hundredfold(nn.Sequential):
    def forward(self, x):
        return 100 * super().forward(x)


class LouderLevel(Level):
    def forward(self, x):
        return 5 * super().forward(x)


class LouderHead(nn.Linear):
    def forward(self, x):
        return 5 * super().forward(x)


PUT_IN = {
    "brightless": nn.InstanceNorm2d(3),
    "sort": nn.BatchNorm2d(16),
    "trunk": Hundredfold(),
    "trunk.0": FiveTimes(3, 8, 3, padding=1),
    "trunk.1": nn.BatchNorm2d(8),
    "trunk.2": nn.Conv2d(8, 8, 2, 2, dilation=2, padding=1),
    "cells.0": nn.Conv2d(8, 8, 3, padding=1, groups=2),
    "cells.1": nn.LayerNorm([8, 1, 1]),
    "cells.2": nn.Conv2d(8, 8, 3, 2, padding=1),
    "levels.1": LouderLevel(74, reader.CANVASES[1]),
    "halve": nn.Conv2d(8, 8, 2, 1),
    "read": nn.Conv2d(8, 16, 5, padding=1),
    "class_head": LouderHead(16, 11),
    "box_head": nn.Conv1d(16, 4, 1),
}


@pytest.mark.parametrize("name", PUT_IN)
def test_constants_are_not_those_of_another_part_that_is_put_in(name):
    model = small(residual=True).eval()
    model.constants()
    home, _, last = name.rpartition(".")
    setattr(model.get_submodule(home), last, PUT_IN[name].eval())
    with pytest.raises(ValueError, match=rf"^{name} (\(\w+\) is no|has (dilation|groups|stride|kernel_size)=)"):
        model.constants()


@pytest.mark.parametrize("mode", ["circular", "replicate"])
def test_constants_are_of_zeros_around_the_picture(mode):
    model = small().eval()
    model.trunk[4].padding_mode = mode
    with pytest.raises(ValueError, match=f"trunk.4 has padding_mode={mode}"):
        model.constants()


@both_kinds
def test_no_bound_is_far_above_what_a_window_reaches(residual):
    """A gain that is forgotten on either side would show: random heads reach 0.45 of the bound."""
    model = small(residual=residual).double().eval()
    x = torch.rand(1, 3, 74, 74, dtype=torch.float64, requires_grad=True)
    logits = model(x).logits[0]
    steep = [torch.autograd.grad(logits[window, 0], x, retain_graph=True)[0].norm() for window in range(0, 45, 4)]
    assert 0.3 < max(steep) <= 1 + 1e-6


@both_kinds
def test_every_eighth_window_is_one_of_every_fourth(residual):
    model = small(residual=residual).eval()
    x = torch.rand(2, 3, 74, 74)
    for level, canvas in enumerate(model.canvases):
        fine, coarse = model.below(x, level), model.below(x, level, dense=False)
        rows, columns = (canvas.height - 32) // 4 + 1, (canvas.width - 32) // 4 + 1
        some = fine.unflatten(1, (rows, columns))[:, ::2, ::2].flatten(1, 2)
        assert torch.allclose(some, coarse, atol=1e-5)
        centres, _ = places(canvas, CELL // 2)
        assert torch.equal(centres.unflatten(0, (rows, columns))[::2, ::2].flatten(0, 1), places(canvas, CELL)[0])


def test_windows_move_with_the_picture():
    """Moving the picture by a window's step on its canvas gives the same answers one window further."""
    model = small().eval()
    x = model.brightless(torch.rand(1, 3, 74, 74))
    canvas = model.canvases[1]
    shape = ((canvas.height - 32) // 4 + 1, (canvas.width - 32) // 4 + 1)
    still = model.below(x, 1).unflatten(1, shape)
    moved = model.below(x, 1, moved=(4, 0)).unflatten(1, shape)
    inner = (slice(None), slice(2, -2), slice(2, -2))
    assert torch.allclose(moved[inner][:, 1:], still[inner][:, :-1], atol=1e-5)
    there, _ = places(canvas, 4, (4, 0))
    assert torch.allclose(there.unflatten(0, shape)[1:], places(canvas, 4)[0].unflatten(0, shape)[:-1], atol=1e-6)


def test_a_window_that_sees_its_digit_as_expected_is_to_say_so():
    model = small()
    centres, sides = model.places()
    window = 150
    half = torch.tensor([WIDTH, HEIGHT]) / 2 / sides[window]
    box = torch.cat([centres[window] - half, centres[window] + half])
    wanted = assign(pad_targets([box[None]], [torch.tensor([4])]), centres, sides, model.reach)
    assert wanted.distance[0].argmin() == window and wanted.distance[0, window] < 0.01
    assert wanted.sides[0, window].abs().max() < 1e-4 and wanted.labels[0, window] == 4
    far = wanted.distance[0] > 1
    assert far.sum() > 330


def test_boxes_of_the_wanted_sides_are_the_objects():
    model = small()
    centres, sides = model.places()
    boxes = torch.tensor([[0.2, 0.3, 0.4, 0.8], [0.5, 0.3, 0.8, 0.8]])
    wanted = assign(pad_targets([boxes], [torch.tensor([1, 2])]), centres, sides, model.reach)
    output = model(torch.rand(1, 3, 74, 74))._replace(sides=wanted.sides)
    owner = wanted.labels[0] - 1
    assert torch.allclose(model.boxes(output)[0], boxes[owner], atol=1e-5)


def test_a_scene_without_objects_has_a_loss():
    model = small().train()
    step = ReaderStep(model.training_loss(), elsewhere=1.0)
    none = pad_targets([torch.zeros(0, 4)] * 2, [torch.zeros(0)] * 2)
    torch.manual_seed(0)
    value = step(model, (torch.rand(2, 3, 74, 74), *none))
    value.backward()
    assert value > 0 and value.isfinite()


@both_kinds
def test_the_step_learns_one_scene(residual):
    """A few steps on one scene: its digit becomes the answer, and nothing else does."""
    model = small(1, residual).train()
    model.tau, model.offset = 5.0, 0.1  # a few steps are no time for a large offset
    picture = torch.zeros(1, 3, 74, 74)
    picture[:, 0, 12:62, 25:47] = 1.0
    targets = pad_targets([torch.tensor([[25.0, 12, 47, 62]]) / 74], [torch.tensor([3])])
    step, adam = ReaderStep(model.training_loss()), torch.optim.Adam(model.parameters(), 1e-2 if residual else 2e-2)
    for _ in range(80 if residual else 40):
        adam.zero_grad()
        step(model, (picture, *targets)).backward()
        adam.step()
    model.eval()
    with torch.no_grad():
        output = model(picture)
    found = reported(model.scores(output), model.boxes(output), model.rivals())
    assert score(found, targets).map50 == pytest.approx(100.0)


def test_on_a_gpu_each_level_reads_as_many_scenes_in_every_step(monkeypatch):
    """As many as rarely are too few: those with a digit for the level come first, and few of them are left out."""
    monkeypatch.setattr(reader_step, "ASKED", set())
    split = load_split("train", 400, 0, torch.device("cpu"))
    known = check_targets(split.targets)
    step = ReaderStep(small().training_loss(), known=known)
    sizes, missed, suited = set(), 0, 0
    for first in range(0, 320, 32):
        part = known.part(slice(first, first + 32))
        chosen = step._chosen(part)
        sizes.add(tuple(map(len, chosen)))
        for own, side in zip(chosen, step.loss.levels, strict=True):
            wanted = reader_step._suited(*part[:2], side)
            suited += int(wanted.sum())
            missed += int(wanted.sum() - wanted[own].sum())
            assert wanted[own].long().diff().max() <= 0, "those with a digit for the level come first"
    assert len(sizes) == 1 and max(sizes.pop()) <= 32
    assert missed < 0.05 * suited


def test_a_picture_moved_by_a_tensor_is_the_one_moved_by_numbers():
    x = torch.rand(2, 3, 5, 7)
    assert torch.equal(reader._rolled(x, torch.tensor([2, -1])), x.roll((2, -1), (2, 3)))
    assert torch.equal(reader._rolled(x, (-3, 0)), x.roll((-3, 0), (2, 3)))


def test_a_reader_begins_with_what_a_classifier_knows():
    """On pictures twice as clear, the features are twice the classifier's, but for how well its kernels are fitted."""
    torch.manual_seed(0)
    classifier = without_parametrizations(vgg((8, 8, 8), features=16))
    for layer in classifier:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias, std=0.1)
    model = small(1)
    take_over(model, classifier)
    x = torch.rand(4, 3, 32, 32) - 0.5
    with torch.no_grad():
        window = nn.Sequential(model.trunk, model.halve, model.sort, model.read, model.sort)
        theirs, mine = classifier[1:-1](x), window(2 * x).flatten(1) / 2
    assert (mine - theirs).norm() < 0.25 * theirs.norm()
    assert torch.allclose(model.class_head.weight[:10], classifier[-1].weight, atol=1e-5)


def test_a_reader_of_linear_residuals_begins_as_one_of_single_digits():
    """On pictures twice as clear, the features of a window are twice the classifier's, but for how its constraints hold
    the weights of another."""
    torch.manual_seed(0)
    classifier = without_parametrizations(residual_network((8, 8, 8), features=16))
    for layer in classifier:
        if isinstance(layer, nn.Conv2d | lip.SLLLinear):
            nn.init.normal_(layer.bias, std=0.1)
    model = small(1, residual=True)
    take_over(model, classifier)
    x = torch.rand(4, 3, 32, 32) - 0.5
    with torch.no_grad():
        window = nn.Sequential(model.trunk, model.halve, model.sort, model.cells, model.read, nn.Flatten(), model.end)
        theirs, mine = classifier[1:-1](x), window(2 * x) / 2
    assert (mine - theirs).norm() < 0.1 * theirs.norm()
    assert torch.allclose(model.class_head.weight[:10], classifier[-1].weight, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_a_radius_is_the_distance_to_where_the_class_stops_being_the_answer(seed):
    torch.manual_seed(seed)
    rows, bias, features = torch.randn(4, 6).double(), torch.randn(4).double(), torch.randn(6).double()
    logits = rows @ features + bias
    scores = radii(logits[None, None], rows)[0, 0]
    assert (scores > 0).sum() <= 1
    for label in range(3):
        gaps = [(other, logits[label] - logits[other]) for other in range(4) if other != label]
        walls = []
        for other, gap in gaps:
            step = rows[label] - rows[other]
            there = features - gap / step.square().sum() * step  # the nearest point of the wall between the two
            assert torch.isclose(there @ step + bias[label] - bias[other], torch.zeros(()).double(), atol=1e-9)
            walls.append(float((there - features).norm() * gap.sign()))
        assert float(scores[label]) == pytest.approx(min(walls), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_who_is_heard_silences_its_rivals_and_of_equal_scores_the_first_does(seed):
    torch.manual_seed(seed)
    graph = torch.rand(7, 7) < 0.3
    graph = graph | graph.mT | torch.eye(7).bool()
    scores = torch.randint(-2, 4, (7, 2)).float()
    result = heard(scores, graph, 0.0)
    for c in range(2):
        heard_of = []
        for i in sorted(range(7), key=lambda i: (-scores[i, c], i)):  # one after the other
            if scores[i, c] > 0 and not any(graph[i, j] for j in heard_of):
                heard_of.append(i)
        assert result[:, c].nonzero().squeeze(1).tolist() == sorted(heard_of)


def test_rivals_are_near_in_place_and_height():
    centres = torch.tensor([[0.5, 0.5]]).repeat(4, 1) + torch.tensor([[0, 0], [0.1, 0], [0, 0.2], [0, 0]])
    graph = rivals(centres, torch.tensor([0.4, 0.4, 0.4, 0.8]), 0.3, 0.4, 0.9)
    assert graph[0].tolist() == [True, True, False, False]
    assert torch.equal(graph, graph.mT)


def test_a_window_beside_a_digit_may_say_it_only_where_its_box_is_right():
    """Whoever could outscore the right window is to be right: else it has to say nothing."""
    loss = small().training_loss()
    digit = torch.nn.functional.one_hot(torch.tensor([3]), 11).double()  # one window, sure of a 3
    arguments = {"logits": digit, "labels": torch.tensor([3]), "sides": torch.zeros(1, 4).double()}
    right, wrong = torch.zeros(1, 4).double(), torch.tensor([[2.0, 0.0, 2.0, 0.0]]).double()  # two reaches to the right
    speaks, beside, far = torch.tensor([0.5]), torch.tensor([1.5]), torch.tensor([9.0])

    def value(found, distance):
        return float(loss.of_windows(found=found, distance=distance, **arguments)[0])

    box = float(torch.nn.functional.smooth_l1_loss(wrong, right, reduction="sum", beta=0.3))
    assert value(right, beside) < value(right, speaks) < value(right, far)
    assert value(wrong, beside) - box == pytest.approx(value(right, far))  # an alarm like any other
    assert value(wrong, speaks) - box == pytest.approx(value(right, speaks))


def test_the_right_answer_must_win_by_the_offset():
    model = small()
    logits = torch.tensor([[0.0] * 10 + [0.5]])
    arguments = {"labels": torch.tensor([-1]), "distance": torch.tensor([9.0]), "sides": torch.zeros(1, 4)}
    values = []
    for offset in (0.0, 0.25):
        model.offset = offset
        loss = model.training_loss()
        values.append(float(loss.of_windows(logits, torch.zeros(1, 4), **arguments)[0]))
    odds = [10 * torch.tensor(model.tau * (offset - 0.5)).exp() for offset in (0.0, 0.25)]
    assert values == pytest.approx([float(odd.log1p()) for odd in odds], rel=1e-5)


def test_a_window_learns_a_box_as_far_off_as_it_is_asked_to():
    model = small()
    nothing = torch.tensor([[0.0] * 10 + [5.0]])  # sure of it, so that nearly all of the loss is that of the box
    where = {"labels": torch.tensor([3]), "distance": torch.tensor([3.0]), "sides": torch.ones(1, 4)}
    values = [
        float(reader.ReaderLoss(model, boxed=boxed).of_windows(nothing, torch.zeros(1, 4), **where)[0])
        for boxed in (2.0, 3.6)
    ]
    assert values[1] - values[0] == pytest.approx(4 * (1 - 0.15))
    assert values[0] < 1e-6

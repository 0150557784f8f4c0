"""What lies below the last block of every window: the same pairs as the network has, and the matrix of their layer."""

import pytest
import torch
import torch.nn.functional as F

from lipguide.tasks import TEST_SEED, trained
from lipguide.tasks.detection.boxes import unit_range
from lipguide.tasks.detection.certificates import answers, certified_recall, certify
from lipguide.tasks.detection.certificates.underneath import gram_of_patch, in_pairs
from lipguide.tasks.detection.data import load_split
from lipguide.tasks.detection.reader import Detector
from tests.robustness.common import generator


@pytest.mark.parametrize("channels, inputs, kernel, side", [(4, 3, 3, 2), (6, 4, 2, 4), (2, 2, 1, 3), (4, 2, 3, 1)])
def test_the_gram_of_a_patch_is_that_of_its_matrix(channels, inputs, kernel, side):
    filters = torch.randn(channels, inputs, kernel, kernel, generator=generator(0)).double()
    wide = side + kernel - 1
    pictures = torch.eye(inputs * wide**2).double().reshape(-1, inputs, wide, wide)
    matrix = in_pairs(F.conv2d(pictures, filters)).mT
    assert torch.allclose(gram_of_patch(filters, side), matrix @ matrix.mT, atol=1e-12)


def small() -> Detector:
    torch.manual_seed(0)
    return Detector((8, 8, 8), 16, residual=True, block=True).eval()


@pytest.fixture(scope="module")
def given():
    return answers(small(), torch.rand(3, 3, 74, 74, generator=generator(0)), deep=True)


def test_the_features_are_read_from_the_pairs(given):
    """For every window of every level; sorting is to take differences without their sign."""
    below = given.inside.underneath
    for window in (0, 1, 100, 200, 300, 342):
        scenes, windows = torch.arange(3), torch.full((3,), window)
        sums, tau = below.patches(scenes, windows).chunk(2, 1)
        u = torch.cat([sums, tau.abs()], 1) @ below.layer.read.mT + below.layer.bias
        assert torch.allclose(u, given.inside.features[scenes, windows].double(), atol=1e-5)


def test_the_layer_below_the_pairs_is_steeper_than_the_features_by_what_lies_between(given):
    below = given.inside.underneath
    assert given.steepness * (1 - 1e-6) <= below.below <= 1
    assert below.part(slice(1, 2)).maps[0].shape[0] == 1


def test_windows_at_the_edge_move_no_more_than_the_matrix_allows():
    """Beyond the edge there is nothing to move: the true matrix of such a window is one with columns left out."""
    filters = torch.randn(4, 2, 3, 3, generator=generator(2)).double()
    pictures = torch.eye(2 * 16).double().reshape(-1, 2, 4, 4)
    pictures[:, :, 0] = 0
    matrix = in_pairs(F.conv2d(pictures, filters)).mT
    assert torch.linalg.eigvalsh(gram_of_patch(filters, 2) - matrix @ matrix.mT)[0] > -1e-10


def test_no_random_move_of_the_pictures_gets_a_score_out():
    model, eps = small(), 0.03
    images = torch.rand(2, 3, 74, 74, generator=generator(3))
    given = answers(model, images, deep=True)
    best = given.scores.flatten(1).topk(4).indices
    entries = (torch.arange(2).repeat_interleave(4), best.flatten() // 10, best.flatten() % 10)
    drift = given.steepness * eps
    low, up = given.inside.falls(entries, eps, drift, "pairs"), given.inside.rises(entries, eps, "pairs")
    most = drift * given.inside.block.steepest + 1e-6  # what constants say
    assert (low >= given.scores[entries] - most).all() and (up <= given.scores[entries] + most).all()
    for seed in range(20):
        move = torch.randn(images.shape, generator=generator(seed))
        move *= eps / move.flatten(1).norm(dim=1)[:, None, None, None]
        scores = answers(model, images + move).scores[entries]
        assert (scores >= low - 1e-6).all() and (scores <= up + 1e-6).all()


def test_no_search_gets_a_score_of_what_ships_out_and_it_falls_by_a_third_less_than_the_dual_says():
    model, _ = trained("detection-reader")
    scenes, eps = load_split("test", 4, TEST_SEED, torch.device("cpu")), 0.1
    images = unit_range(scenes.images)
    given = answers(model, images, deep=True)
    best = given.scores.flatten(1).argmax(1)
    entries = (torch.arange(len(images)), best // 10, best % 10)
    low = {look: given.inside.falls(entries, eps, given.steepness * eps, look) for look in ("dual", "pairs")}
    fallen = {look: (given.scores[entries] - least).mean() for look, least in low.items()}
    assert fallen["pairs"] < 0.67 * fallen["dual"]
    move = torch.zeros_like(images).requires_grad_()
    for _ in range(12):
        scores = model.scores(model(images + move))[entries]
        slope = torch.autograd.grad(scores.sum(), move)[0]
        with torch.no_grad():
            move -= eps / 4 * slope / slope.flatten(1).norm(dim=1)[:, None, None, None]
            move *= (eps / move.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None, None]
    reached = model.scores(model(images + move))[entries].detach()
    assert (reached >= low["pairs"] - 1e-5).all()
    assert fallen["pairs"] < 2.2 * (given.scores[entries] - reached).mean()


def test_a_deep_look_certifies_no_less():
    model, _ = trained("detection-reader")
    scenes = load_split("test", 6, TEST_SEED, torch.device("cpu"))
    near, deep = (answers(model, unit_range(scenes.images), look=True, deep=deep) for deep in (False, True))
    far, close = (certify(given, scenes.targets, 0.1, model.least) for given in (near, deep))
    assert (close.heights >= far.heights).all() and (close.before >= far.before).all()
    assert (close.heights > far.heights).any() and certified_recall(close) >= certified_recall(far)


def test_where_the_pairs_are_those_of_the_halving_the_look_ends_at_the_block():
    torch.manual_seed(0)
    given = answers(Detector((8, 8, 8), 16, block=True).eval(), torch.rand(1, 3, 74, 74), deep=True)
    assert given.inside.underneath is None and given.inside.looks == ("dual",)
    with pytest.raises(ValueError, match="what lies below the last block is not known"):
        given.inside.falls((torch.zeros(1, dtype=torch.long),) * 3, 0.1, 0.1, "pairs")

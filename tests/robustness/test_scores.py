"""The scores of segmentation: counted by hand, and masks that cannot be scored are named."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipguide.checks import IGNORE
from lipguide.robustness.scores import check_masks, confusion, miou, pixel_accuracy, pooled_miou

HEAD = nn.Sequential(nn.Conv2d(3, 11, 1))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.full((1, 2, 2), 11), "11 too: build the network with classes=12, or mark these pixels"),
        (torch.full((1, 2, 2), 255), "hold 255 too: mark these pixels with ignore_index = -100"),
        (torch.full((1, 2, 2), -1), "hold -1 too: mark these pixels"),
        (torch.zeros(1, 2, 2), "one whole number an entry, the class, not torch.float32"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.long), r"masks are \(N, H, W\)"),
    ],
)
def test_masks_that_do_not_suit_the_head_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        check_masks(HEAD, masks)


@pytest.mark.parametrize("ignore", [IGNORE, 255])
def test_ignored_pixels_are_known_masks(ignore):
    check_masks(HEAD, torch.tensor([[[0, 10, ignore]]]), ignore)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 4), ignored=st.booleans())
def test_scores_agree_with_counting_by_hand(seed, classes, ignored):
    generator = torch.Generator().manual_seed(seed)
    predicted, masks = torch.randint(classes, (2, 3, 4, 4), generator=generator)
    if ignored:
        masks[:, 1:3] = IGNORE

    def by_hand(p, m):
        p, m = p[m != IGNORE].tolist(), m[m != IGNORE].tolist()
        ious = []
        for c in set(m):
            both = sum(a == c and b == c for a, b in zip(p, m, strict=True))
            ious.append(both / sum(a == c or b == c for a, b in zip(p, m, strict=True)))
        return sum(ious) / len(ious), sum(a == b for a, b in zip(p, m, strict=True)) / len(m)

    singles = [by_hand(p, m) for p, m in zip(predicted, masks, strict=True)]
    torch.testing.assert_close(miou(predicted, masks, classes).tolist(), [iou for iou, _ in singles])
    torch.testing.assert_close(pixel_accuracy(predicted, masks).tolist(), [share for _, share in singles])
    assert pooled_miou(predicted, masks, classes).item() == pytest.approx(by_hand(predicted, masks)[0])


@pytest.mark.parametrize("score", [partial(confusion, classes=2), pixel_accuracy])
def test_scores_of_nothing_are_errors(score):
    nothing = torch.full((1, 2, 2), IGNORE)
    with pytest.raises(ValueError, match="ignored"):
        score(torch.zeros(1, 2, 2, dtype=torch.long), nothing)
    with pytest.raises(ValueError, match="agree in shape"):
        score(torch.zeros(1, 2, 3, dtype=torch.long), nothing)


@pytest.mark.parametrize("score", [miou, pooled_miou, confusion])
@pytest.mark.parametrize(
    "predicted, masks, message",
    [
        ([3, 1], [0, 1], "predictions hold label 3, and a score of 2 classes knows 0 to 1"),
        ([0, 2], [0, -1], "predictions hold label 2"),
        ([0, 1], [0, -1], "masks hold label -1"),
        ([0, 1], [0, 255], "masks hold label 255"),
    ],
)
def test_a_score_refuses_labels_that_it_does_not_know(score, predicted, masks, message):
    with pytest.raises(ValueError, match=message):
        score(torch.tensor([[predicted]]), torch.tensor([[masks]]), classes=2)


@pytest.mark.parametrize("score", [partial(miou, classes=11), pixel_accuracy])
def test_a_score_refuses_masks_of_fractions_and_counts_no_ignored_pixel(score):
    with pytest.raises(ValueError, match="masks hold one whole number an entry, the class, not torch.float32"):
        score(torch.zeros(1, 2, 2, dtype=torch.long), torch.zeros(1, 2, 2))
    assert score(torch.tensor([[[0, 7]]]), torch.tensor([[[0, -100]]])).item() == 1


def test_masks_of_bytes_do_not_take_156_for_the_label_that_is_ignored():
    with pytest.raises(ValueError, match="hold 156 too"):
        check_masks(HEAD, torch.full((1, 4, 4), 156, dtype=torch.uint8))

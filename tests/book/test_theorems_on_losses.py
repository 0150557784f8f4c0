"""What the chapter `losses` states as a theorem or leaves to an exercise, on random logits in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipguide import losses

EXAMPLES = settings(deadline=None, max_examples=20, derandomize=True)


def random_logits(seed: int, samples: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, classes, (samples,), generator=generator)


def margins(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    right = logits.gather(1, labels[:, None])
    return (right - logits.scatter(1, labels[:, None], -math.inf).amax(1, keepdim=True)).squeeze(1)


@EXAMPLES
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 12), tau=st.floats(0.01, 1000))
def test_tempered_cross_entropy_lies_between_the_zero_margin_hinge_and_log_c_over_tau_more(seed, classes, tau):
    logits, labels = random_logits(seed, 8, classes)
    values = losses.TauCrossEntropy(tau, reduction="none")(logits, labels)
    hinge = (-margins(logits, labels)).relu()
    assert (values >= hinge - 1e-12).all() and (values <= hinge + math.log(classes) / tau + 1e-12).all()


@EXAMPLES
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 12))
def test_small_temperature_tends_to_the_mean_gap(seed, classes):
    logits, labels = random_logits(seed, 8, classes)
    tau = 1e-5
    values = losses.TauCrossEntropy(tau, reduction="none")(logits, labels) - math.log(classes) / tau
    limit = logits.mean(1) - logits.gather(1, labels[:, None]).squeeze(1)
    assert torch.allclose(values, limit, rtol=0, atol=1e-4)


@EXAMPLES
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 12))
def test_kr_of_balanced_classes_is_the_mean_gap(seed, classes):
    logits, _ = random_logits(seed, 4 * classes, classes)
    labels = torch.arange(classes).repeat(4)
    gap = (logits.gather(1, labels[:, None]).squeeze(1) - logits.mean(1)).mean() * classes / (classes - 1)
    assert losses.MulticlassKR()(logits, labels).item() == pytest.approx(gap.item(), abs=1e-6)


@EXAMPLES
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 12), offset=st.floats(0, 3))
def test_cold_offset_cross_entropy_is_the_categorical_hinge(seed, classes, offset):
    logits, labels = random_logits(seed, 8, classes)
    cold = losses.OffsetCrossEntropy(offset, temperature=1e-5, reduction="none")(logits, labels)
    hinge = (offset - margins(logits, labels)).relu()
    assert torch.allclose(cold, hinge, rtol=0, atol=1e-4)


def test_pixels_in_bytes_need_a_margin_in_bytes_and_the_same_alpha():
    logits, labels = random_logits(0, 64, 10)
    unit, byte = losses.MulticlassHKR(16, 1.0), losses.MulticlassHKR(16, 255.0)
    assert byte(255 * logits, labels).item() == pytest.approx(255 * unit(logits, labels).item(), rel=1e-12)

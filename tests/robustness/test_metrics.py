"""The metrics: published values, batches against the whole, two processes against one, and wrong input."""

import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch import distributed as dist

from lipguide import lipschitz_bound, losses
from lipguide.robustness import metrics
from lipguide.robustness.certificates import certified_accuracy, radius
from tests.robustness.common import WHOLE

LOGITS = torch.tensor([[1.0, 0, 0], [0.1, 0, 0], [0, 0, 1], [0, 0, 0.1]])
LABELS = torch.tensor([0, 0, 1, 1])
F_BINARY = torch.tensor([1, 0.1, 1, 0.1, -1, -0.1, -1, -0.1])
Y_BINARY = torch.tensor([1, 1, -1, -1, -1, -1, 1, 1])

METRICS = {
    "KR": metrics.KR,
    "MulticlassKR": lambda: metrics.MulticlassKR(3),
    "BinaryProvableRobustAccuracy": lambda: metrics.BinaryProvableRobustAccuracy(0.25),
    "BinaryProvableAvgRobustness": metrics.BinaryProvableAvgRobustness,
    "CategoricalProvableRobustAccuracy": lambda: metrics.CategoricalProvableRobustAccuracy(0.25),
    "CategoricalProvableAvgRobustness": metrics.CategoricalProvableAvgRobustness,
}


def batch(name: str, n: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name == "KR" or name.startswith("Binary"):
        return torch.randn(n, generator=generator), torch.randint(2, (n,), generator=generator)
    return torch.randn(n, 3, generator=generator), torch.arange(n) % 3


def test_robustness_metrics_give_the_published_values():
    assert metrics.CategoricalProvableRobustAccuracy(0.25)(LOGITS, LABELS).item() == 0.25
    average = metrics.CategoricalProvableAvgRobustness()(LOGITS, LABELS).item()
    assert average == pytest.approx(0.275 / math.sqrt(2), abs=1e-7)
    assert metrics.BinaryProvableRobustAccuracy(0.25)(F_BINARY, Y_BINARY).item() == 0.25
    assert metrics.BinaryProvableAvgRobustness()(F_BINARY, Y_BINARY).item() == pytest.approx(0.275, abs=1e-7)


def test_constant_divides_every_radius():
    assert metrics.CategoricalProvableRobustAccuracy(0.25, lipschitz=4)(LOGITS, LABELS).item() == 0
    assert metrics.BinaryProvableRobustAccuracy(0.25, lipschitz=0.1)(F_BINARY, Y_BINARY).item() == 0.5
    assert metrics.BinaryProvableAvgRobustness(lipschitz=2)(F_BINARY, Y_BINARY).item() == pytest.approx(
        0.1375, abs=1e-7
    )


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("cuts", [[24], [1, 23], [7, 0, 16, 1], [1] * 24])
def test_batches_of_any_size_give_the_value_of_the_whole(name, cuts):
    logits, target = batch(name)
    metric = METRICS[name]()
    for z, y in zip(logits.split(cuts), target.split(cuts), strict=True):
        metric.update(z, y)
    torch.testing.assert_close(metric.compute(), METRICS[name]()(logits, target))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), epsilon=st.floats(0, 2), lipschitz=st.floats(0.2, 5), known_rows=st.booleans())
def test_categorical_metrics_agree_with_the_certificates(seed, epsilon, lipschitz, known_rows):
    generator = torch.Generator().manual_seed(seed)
    logits, target = torch.randn(9, 4, generator=generator), torch.randint(4, (9,), generator=generator)
    rows = torch.randn(4, 6, generator=generator) if known_rows else None
    accuracy, average = (
        metrics.CategoricalProvableRobustAccuracy(epsilon, lipschitz),
        metrics.CategoricalProvableAvgRobustness(lipschitz),
    )
    accuracy.update(logits, target, rows=rows)
    average.update(logits, target, rows=rows)
    assert accuracy.compute() == certified_accuracy(logits, target, epsilon, lipschitz, rows)
    expected = radius(logits, target, lipschitz, rows).clamp(min=0).double().mean()
    torch.testing.assert_close(average.compute(), expected)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 5))
def test_kr_metrics_are_the_losses_of_the_same_name_on_the_whole(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    logits, target = torch.randn(20, classes, generator=generator).double(), torch.arange(20) % classes
    metric = metrics.MulticlassKR(classes)
    for z, y in zip(logits.split(6), target.split(6), strict=True):
        metric.update(z, y)
    torch.testing.assert_close(metric.compute(), losses.MulticlassKR()(logits, target))
    f, y = logits[:, 0], target % 2
    torch.testing.assert_close(metrics.KR()(f, y), losses.KR()(f, y))


@pytest.mark.parametrize(
    "make",
    [
        lambda ignore: metrics.MulticlassKR(3, ignore),
        lambda ignore: metrics.CategoricalProvableRobustAccuracy(0.1, ignore_index=ignore),
        lambda ignore: metrics.CategoricalProvableAvgRobustness(ignore_index=ignore),
    ],
)
@pytest.mark.parametrize("ignore", [-100, 255])
def test_pixels_count_like_samples_and_ignored_ones_not_at_all(make, ignore):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator)
    target = torch.randint(3, (2, 4, 5), generator=generator)
    ignored = torch.rand(2, 4, 5, generator=generator) < 0.4
    target[ignored] = ignore
    as_list = make(ignore)(logits.movedim(1, -1)[~ignored], target[~ignored])
    torch.testing.assert_close(make(ignore)(logits, target), as_list)


def test_labels_may_be_bits_or_signs_and_logits_may_have_a_channel():
    for make in (metrics.KR, metrics.BinaryProvableAvgRobustness):
        expected = make()(F_BINARY, Y_BINARY)
        assert make()(F_BINARY[:, None], Y_BINARY > 0) == expected
        assert make()(F_BINARY[:, None], (Y_BINARY > 0).float()[:, None]) == expected


def test_kr_without_an_estimate_warns_and_leaves_the_class_out():
    metric = metrics.MulticlassKR(4)
    metric.update(torch.tensor([[2.0, 0, 9, 9], [0, 1.0, 9, 9]]), torch.tensor([0, 1]))
    with pytest.warns(UserWarning, match=r"classes \[2, 3\]"):
        assert metric.compute().item() == 1.5
    one_class = metrics.KR()
    one_class.update(torch.randn(3), torch.ones(3))
    with pytest.warns(UserWarning, match="no estimate"):
        assert one_class.compute().item() == 0


@pytest.mark.parametrize("name", METRICS)
def test_reset_and_pickle_keep_their_promises(name):
    logits, target = batch(name)
    metric = METRICS[name]()
    metric.update(logits, target)
    value = metric.compute()
    assert pickle.loads(pickle.dumps(metric)).compute() == value
    metric.reset()
    metric.update(logits, target)
    assert metric.compute() == value


def test_mean_over_nothing_is_an_error():
    metric = metrics.CategoricalProvableAvgRobustness()
    metric.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="no samples"):
        metric.compute()


@pytest.mark.parametrize(
    "metric, logits, target, message",
    [
        (metrics.KR(), F_BINARY, Y_BINARY[:3], "one logit and one label"),
        (metrics.KR(), F_BINARY, Y_BINARY + 2, "0 or 1"),
        (metrics.BinaryProvableAvgRobustness(), F_BINARY.half(), Y_BINARY, "float16"),
        (metrics.MulticlassKR(4), LOGITS, LABELS, r"\(N, 4"),
        (metrics.MulticlassKR(3), LOGITS, LABELS + 2, "outside 0..2"),
        (metrics.CategoricalProvableAvgRobustness(), LOGITS, LABELS + 2, "outside 0..2"),
        (metrics.CategoricalProvableAvgRobustness(), LOGITS.bfloat16(), LABELS, "bfloat16"),
        (metrics.CategoricalProvableAvgRobustness(), LOGITS * math.nan, LABELS, "NaN"),
    ],
)
def test_wrong_input_is_named(metric, logits, target, message):
    with pytest.raises(ValueError, match=message):
        metric.update(logits, target)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="lipschitz"):
        metrics.BinaryProvableAvgRobustness(lipschitz=0)
    with pytest.raises(ValueError, match="epsilon"):
        metrics.CategoricalProvableRobustAccuracy(-0.1)


def rank_alone(results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    part = slice(0, 5) if rank == 0 else slice(5, None)
    out = {}
    for name, make in METRICS.items():
        logits, target = batch(name)
        metric = make()
        metric.update(logits[part], target[part])
        out[name] = metric.compute()
    torch.save(out, f"{results}.{rank}")
    dist.destroy_process_group()


def test_two_processes_with_uneven_shares_compute_the_value_of_the_whole(tmp_path, forked):
    code = f"from tests.robustness.test_metrics import rank_alone; rank_alone({str(tmp_path / 'result')!r})"
    for done in forked.ranks(code, tmp_path):
        assert done.returncode == 0, done.stderr
    for rank in range(2):
        result = torch.load(tmp_path / f"result.{rank}", weights_only=True)
        for name, make in METRICS.items():
            torch.testing.assert_close(result[name], make()(*batch(name)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", METRICS)
def test_a_network_that_answers_no_number_has_no_score(name, bad):
    logits, target = batch(name)
    logits[5] = bad
    with pytest.raises(ValueError, match="for 1 of 24 samples, first for sample 5"):
        METRICS[name]().update(logits, target)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("dtype", WHOLE)
def test_a_label_is_the_same_in_every_whole_type(name, dtype):
    logits, target = batch(name)
    assert torch.equal(METRICS[name]()(logits, target.to(dtype)), METRICS[name]()(logits, target))


@pytest.mark.parametrize(
    "name", ["MulticlassKR", "CategoricalProvableRobustAccuracy", "CategoricalProvableAvgRobustness"]
)
def test_class_156_in_bytes_is_not_the_label_that_is_ignored(name):
    logits = torch.randn(24, 160, generator=torch.Generator().manual_seed(0))
    target = torch.arange(24) % 2 + 155
    make = {"MulticlassKR": lambda: metrics.MulticlassKR(160)}.get(name, METRICS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # most of the 160 classes do not occur
        assert torch.equal(make()(logits, target.to(torch.uint8)), make()(logits, target))


@pytest.mark.parametrize("name", ["KR", "BinaryProvableRobustAccuracy", "BinaryProvableAvgRobustness"])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 10**6))
def test_a_binary_target_has_the_shape_of_its_logits_or_lacks_a_channel_of_one(name, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator)
    target = torch.randint(2, shape, generator=generator)
    target.view(-1)[0] = 1
    expected = METRICS[name]()(logits, target)
    with_channel = logits.unsqueeze(1)
    assert torch.equal(METRICS[name]()(with_channel, target), expected)
    turned = target.movedim(-1, 0)
    if turned.shape != target.shape:
        for wrong in (turned, target.reshape(-1)):
            if wrong.shape not in (logits.shape, logits.shape[:1] + logits.shape[2:]):
                with pytest.raises(ValueError, match="one logit and one label an entry"):
                    METRICS[name]().update(logits, wrong)


def test_a_bound_may_be_given_as_it_is():
    bound = lipschitz_bound(nn.Sequential(nn.Linear(3, 3)).eval(), (3,))
    given, number = (
        metrics.CategoricalProvableAvgRobustness(bound),
        metrics.CategoricalProvableAvgRobustness(bound.value),
    )
    assert torch.equal(given(LOGITS, LABELS), number(LOGITS, LABELS))

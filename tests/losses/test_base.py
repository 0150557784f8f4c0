"""What all losses share: reductions, ignored entries, wrong input, and batches split over ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch import distributed as dist

from lipguide import losses
from tests.losses.cases import (
    BINARY,
    CATEGORICAL,
    LABELS,
    LOGITS,
    every_categorical,
    random_batch,
)
from tests.robustness.common import WHOLE


@every_categorical
def test_reductions_agree_with_each_other(name):
    logits, labels = random_batch(3, 12, 4)
    none = CATEGORICAL[name](reduction="none")(logits, labels)
    assert none.shape == labels.shape
    torch.testing.assert_close(CATEGORICAL[name](reduction="sum")(logits, labels), none.sum())
    torch.testing.assert_close(CATEGORICAL[name]()(logits, labels), none.mean())


@every_categorical
@pytest.mark.parametrize("ignore_index", [-100, 255, 0])
def test_pixelwise_value_is_that_of_the_list_of_labelled_pixels(name, ignore_index):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(1, 4, (2, 5, 3), generator=generator)
    ignored = torch.rand(2, 5, 3, generator=generator) < 0.4
    target[ignored] = ignore_index
    pixelwise = CATEGORICAL[name](ignore_index=ignore_index)(logits, target)
    as_list = CATEGORICAL[name]()(logits.movedim(1, -1)[~ignored], target[~ignored])
    torch.testing.assert_close(pixelwise, as_list)
    pixelwise.backward()
    assert (logits.grad.movedim(1, -1)[ignored] == 0).all()
    assert (logits.grad.movedim(1, -1)[~ignored] != 0).any()


@every_categorical
def test_nothing_to_average_gives_zero_and_no_nan(name):
    for logits, target in [
        (torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.long)),
        (torch.randn(3, 4, requires_grad=True), torch.full((3,), -100)),
    ]:
        loss = CATEGORICAL[name]()(logits, target)
        loss.backward()
        assert loss.item() == 0 and (logits.grad == 0).all()


@every_categorical
def test_any_single_sample_has_a_finite_loss_and_gradient(name):
    logits = torch.tensor([[0.3, -2.0, 1.5]], requires_grad=True)
    loss = CATEGORICAL[name]()(logits, torch.tensor([1]))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@every_categorical
def test_two_classes_are_enough(name):
    loss = CATEGORICAL[name]()(torch.tensor([[0.3, -2.0], [0.1, 0.4]]), torch.tensor([0, 1]))
    assert loss.isfinite()


def test_kr_leaves_out_the_classes_that_the_batch_does_not_hold():
    """Class 2 is missing: the estimate is the mean over classes 0 and 1, untouched by logit 2."""
    logits, labels = LOGITS[:5], LABELS[:5]
    expected = sum(
        logits[labels == c, c].mean() - logits[labels != c, c].mean() for c in (0, 1)
    ) / 2  # fmt: skip
    torch.testing.assert_close(losses.MulticlassKR()(logits, labels), expected)
    moved = logits.clone()
    moved[:, 2] += 100
    torch.testing.assert_close(losses.MulticlassKR()(moved, labels), expected)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), n=st.integers(7, 50), classes=st.integers(2, 7))
def test_kr_of_double_precision_logits_is_exact_to_double_precision(seed, n, classes):
    """The class counts must not pass through float32 on their way: a third would be wrong from the eighth digit on."""
    logits, labels = random_batch(seed, n, classes)
    expected = torch.stack(
        [logits[labels == c, c].mean() - logits[labels != c, c].mean() for c in range(classes)]
    ).mean()  # fmt: skip
    torch.testing.assert_close(losses.MulticlassKR()(logits, labels), expected, rtol=1e-13, atol=1e-14)


@every_categorical
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_raised_to_float32(name, dtype):
    logits = LOGITS.to(dtype)
    loss = CATEGORICAL[name]()(logits, LABELS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, CATEGORICAL[name]()(logits.float(), LABELS))


@every_categorical
def test_compiled_loss_and_gradient_equal_the_eager_ones(name):
    eager_logits, labels = random_batch(5, 8, 4)
    compiled_logits = eager_logits.clone().requires_grad_()
    eager_logits.requires_grad_()
    eager = CATEGORICAL[name]()(eager_logits, labels)
    compiled = torch.compile(CATEGORICAL[name](), backend="aot_eager", fullgraph=True)(compiled_logits, labels)
    torch.testing.assert_close(compiled, eager)
    eager.backward()
    compiled.backward()
    torch.testing.assert_close(compiled_logits.grad, eager_logits.grad)
    torch._dynamo.reset()


def test_compiled_loss_still_refuses_a_label_out_of_range():
    compiled = torch.compile(losses.MulticlassHinge(), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="outside 0..2"):
        compiled(LOGITS, torch.tensor([0, 0, 0, 1, 1, 3]))
    torch._dynamo.reset()


@every_categorical
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_softmax_output_is_named(name, dtype):
    with pytest.raises(ValueError, match="softmax"):
        CATEGORICAL[name]()(torch.softmax(LOGITS, 1).to(dtype), LABELS)
    pixels = torch.softmax(torch.randn(2, 5, 4, 4), 1).to(dtype)
    with pytest.raises(ValueError, match="softmax"):
        CATEGORICAL[name]()(pixels, torch.zeros(2, 4, 4, dtype=torch.long))


def test_logits_that_merely_sum_to_one_or_are_merely_positive_pass():
    loss = losses.TauCrossEntropy(1.0)
    for logits in ([[1.5, -0.5], [0.2, 0.8]], [[0.5, 0.6], [0.2, 0.8]]):
        fresh = losses.TauCrossEntropy(1.0)
        assert fresh(torch.tensor(logits), torch.tensor([0, 1])) == loss(torch.tensor(logits), torch.tensor([0, 1]))


@pytest.mark.parametrize("wrong", [3, -1, -2, 100])
@every_categorical
def test_label_out_of_range_is_named_at_every_call(name, wrong):
    loss = CATEGORICAL[name]()
    loss(LOGITS, LABELS)
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        loss(LOGITS, torch.tensor([0, 0, 0, 1, 1, wrong]))


@pytest.mark.parametrize(
    "logits, target, message",
    [
        (LOGITS, LABELS[:5], "one integer class index"),
        (LOGITS, F.one_hot(LABELS), "argmax"),
        (LOGITS, LABELS.float(), "integer"),
        (LOGITS[:, :1], LABELS, "at least two classes"),
        (LOGITS[:, 0], LABELS, "at least two classes"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 5, dtype=torch.long), "one integer class index"),
    ],
)
def test_wrong_shapes_are_named(logits, target, message):
    with pytest.raises(ValueError, match=message):
        losses.TauCrossEntropy(1.0)(logits, target)


@pytest.mark.parametrize(
    "make",
    [
        lambda: losses.HKR(-1),
        lambda: losses.HKR(math.nan),
        lambda: losses.HKR(1, margin=0),
        lambda: losses.MulticlassHKR(-1),
        lambda: losses.MulticlassSoftHKR(1, momentum=1.0),
        lambda: losses.TauCrossEntropy(0),
        lambda: losses.TauCrossEntropy(math.inf),
        lambda: losses.TauFocal(1, gamma=0.5),
        lambda: losses.OffsetCrossEntropy(temperature=-1),
        lambda: losses.EMMA(0),
        lambda: losses.KR(reduction="average"),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(ValueError):
        make()


@every_categorical
@pytest.mark.parametrize("dtype", WHOLE)
def test_a_label_is_the_same_in_every_whole_type(name, dtype):
    """A class 156 is no ignored label, although -100 in eight bits without a sign is 156."""
    last = 120 if dtype == torch.int8 else 156
    logits, labels = random_batch(0, 12, 160)
    labels[::2] = last
    loss = CATEGORICAL[name](reduction="none")
    expected = loss(logits, labels)
    assert torch.equal(CATEGORICAL[name](reduction="none")(logits, labels.to(dtype)), expected)
    assert (expected[::2] != 0).any()


@every_categorical
def test_an_ignored_label_need_not_fit_the_type_of_the_labels(name):
    logits, labels = random_batch(0, 12, 5)
    ignoring = CATEGORICAL[name](ignore_index=255, reduction="none")
    labels[3] = 255
    values = ignoring(logits, labels.to(torch.uint8))
    assert values[3] == 0 and torch.equal(values, CATEGORICAL[name](ignore_index=255, reduction="none")(logits, labels))
    labels[3] = -1  # 255 in eight bits without a sign
    with pytest.raises(ValueError, match="a label lies outside"):
        ignoring(logits, labels.to(torch.int8))


def split_batch(results: str) -> None:
    """One of two ranks: rank 0 holds 7 of the samples and no sample of class 3, rank 1 the other 5."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    logits, labels = _whole_batch()
    part = slice(0, 7) if rank == 0 else slice(7, None)
    out = {}
    for name, make in CATEGORICAL.items():
        share = logits[part].clone().requires_grad_()
        loss = make()
        for _ in range(2):  # twice, so that SoftHKR's running mean matters
            share.grad = None
            result = loss(share, labels[part])
            result.backward()
        out[name] = (result.detach(), share.grad)
    for name, loss in BINARY.items():
        share = logits[part, 0].clone().requires_grad_()
        result = loss(share, labels[part] % 2)
        result.backward()
        out[name] = (result.detach(), share.grad)
    if rank == 0:  # alone, as in an evaluation on one rank: must neither wait for the other nor scale by it
        with torch.no_grad():
            out["alone"] = (losses.MulticlassHKR(3.0)(logits[part], labels[part]), logits[part])
    torch.save(out, f"{results}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def _whole_batch() -> tuple[Tensor, Tensor]:
    logits, labels = random_batch(11, 12, 4)
    order = labels.argsort(stable=True)  # class 3 comes last, so that rank 0 has none of it
    return logits[order], labels[order]


@pytest.fixture(scope="module")
def shares(tmp_path_factory, forked):
    folder = tmp_path_factory.mktemp("ranks")
    code = f"from tests.losses.test_base import split_batch; split_batch({str(folder / 'result')!r})"
    for done in forked.ranks(code, folder):
        assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"result.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", [*CATEGORICAL, *BINARY])
def test_unevenly_split_batch_has_the_loss_and_gradient_of_the_whole(name, shares):
    """The average over the ranks, as DistributedDataParallel takes it, is the result of one process."""
    logits, labels = _whole_batch()
    if name in BINARY:
        whole = logits[:, 0].clone().requires_grad_()
        expected = BINARY[name](whole, labels % 2)
    else:
        whole, loss = logits.clone().requires_grad_(), CATEGORICAL[name]()
        loss(whole, labels)
        expected = loss(whole, labels)
    expected.backward()
    values, gradients = zip(*(share[name] for share in shares), strict=True)
    torch.testing.assert_close(torch.stack(values).mean(), expected.detach())
    torch.testing.assert_close(torch.cat(gradients) / 2, whole.grad)


def test_a_rank_may_evaluate_alone(shares):
    logits, labels = _whole_batch()
    torch.testing.assert_close(shares[0]["alone"][0], losses.MulticlassHKR(3.0)(logits[:7], labels[:7]))

"""The losses: the field's published numbers, deel-torchlip, edge cases, and batches split over ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp

from lipguide import lipschitz_bound, losses
from tests.robustness.common import UNSIGNED, WHOLE

Y_BINARY = torch.tensor([1, 1, 1, 0, 0, 0])
F_BINARY = torch.tensor([0.5, 1.5, -0.5, -0.5, -1.5, 0.5])
LOGITS = torch.tensor(
    [[2, 0.2, -0.5], [-1, -1.2, 0.3], [0.8, 2, 0], [0, 1, -0.5], [2.4, -0.4, -1.1], [-0.1, -1.7, 0.6]]
)
LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
TWO_LOGITS, TWO_LABELS = torch.tensor([[2, 0.2, -0.5], [0, 1, -0.5]]), torch.tensor([0, 1])

BINARY = {
    "KR": losses.KR(),
    "HingeMargin": losses.HingeMargin(0.7),
    "HKR": losses.HKR(3.0, 0.7),
    "HKR, hinge only": losses.HKR(math.inf, 0.7),
    "TauBCEWithLogits": losses.TauBCEWithLogits(2.0),
}
CATEGORICAL = {
    "MulticlassKR": losses.MulticlassKR,
    "MulticlassHinge": lambda **kw: losses.MulticlassHinge(0.7, **kw),
    "MulticlassHKR": lambda **kw: losses.MulticlassHKR(3.0, 0.7, **kw),
    "MulticlassHKR, hinge only": lambda **kw: losses.MulticlassHKR(math.inf, 0.7, **kw),
    "MulticlassSoftHKR": lambda **kw: losses.MulticlassSoftHKR(3.0, 0.7, **kw),
    "MulticlassLseHKR": lambda **kw: losses.MulticlassLseHKR(3.0, 0.7, **kw),
    "CategoricalHinge": lambda **kw: losses.CategoricalHinge(0.7, **kw),
    "MultiMargin": lambda **kw: losses.MultiMargin(0.7, **kw),
    "TauCrossEntropy": lambda **kw: losses.TauCrossEntropy(5.0, **kw),
    "TauFocal": lambda **kw: losses.TauFocal(5.0, **kw),
    "CosineSimilarity": losses.CosineSimilarity,
    "OffsetCrossEntropy": losses.OffsetCrossEntropy,
    "LogitAnnealing": losses.LogitAnnealing,
    "EMMA": lambda **kw: losses.EMMA(0.3, **kw),
}
every_categorical = pytest.mark.parametrize("name", CATEGORICAL)
every_binary = pytest.mark.parametrize("name", BINARY)


def value(loss: nn.Module, logits: Tensor, target: Tensor) -> float:
    return loss(logits, target).item()


def random_batch(seed: int, n: int, classes: int) -> tuple[Tensor, Tensor]:
    """Double-precision logits, and labels in which every class occurs when n allows it."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    labels = torch.arange(n)[torch.randperm(n, generator=generator)] % classes
    return logits, labels


# --- published numbers


def test_binary_losses_give_the_published_values():
    assert value(losses.KR(), F_BINARY, Y_BINARY) == pytest.approx(1, abs=1e-6)
    assert value(losses.HingeMargin(2), F_BINARY, Y_BINARY) == pytest.approx(2 / 3, abs=1e-6)
    # the published figure is of a*hinge - (1-a)*KR with a = 1/2, i.e. alpha = 1 divided by 1 + alpha
    assert value(losses.HKR(1, 2), F_BINARY, Y_BINARY) / 2 == pytest.approx(-1 / 6, abs=1e-6)
    assert value(losses.TauBCEWithLogits(2), F_BINARY, Y_BINARY) == pytest.approx(0.279185, abs=1e-6)


def test_multiclass_losses_give_the_published_values():
    assert value(losses.MulticlassKR(), LOGITS, LABELS) == pytest.approx(761 / 1800, abs=1e-6)
    assert value(losses.MulticlassHKR(5, 2), LOGITS, LABELS) / 6 == pytest.approx(0.8925, abs=1e-6)
    assert value(losses.MulticlassLseHKR(5, 0.2), LOGITS, LABELS) / 6 == pytest.approx(1.0231503, abs=1e-6)
    soft = losses.MulticlassSoftHKR(5, 0.2)
    assert value(soft, LOGITS, LABELS) / 6 == pytest.approx(0.908135, abs=1e-6)
    assert value(soft, LOGITS, LABELS) / 6 == pytest.approx(0.902872, abs=1e-6)  # the running mean has moved


@pytest.mark.parametrize(
    "offset, expected",
    [
        (2 * math.sqrt(2) * 36 / 255, 0.0127094),
        (math.sqrt(2) * 36 / 255, 0.00586715),
        (math.sqrt(2), 0.267926),
        (2.12132, 0.774760),
    ],
)
def test_offset_cross_entropy_gives_the_published_values(offset, expected):
    assert value(losses.OffsetCrossEntropy(offset), TWO_LOGITS, TWO_LABELS) == pytest.approx(expected, rel=2e-6)


def test_offset_cross_entropy_of_uniform_logits_is_the_entropy_times_the_temperature():
    uniform = torch.full((3, 10), 7.0)
    loss = losses.OffsetCrossEntropy(offset=0.0)
    assert value(loss, uniform, torch.tensor([0, 4, 9])) == pytest.approx(math.log(10) / 4, abs=1e-6)


# --- deel-torchlip


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), n=st.integers(4, 20), alpha=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_binary_losses_equal_those_of_torchlip(seed, n, alpha):
    torchlip = pytest.importorskip("deel.torchlip")
    f, labels = random_batch(seed, n, 2)
    f, y = f[:, :1], labels[:, None]
    ours = math.inf if alpha == 1 else alpha / (1 - alpha)
    scale = 1 if alpha == 1 else 1 / (1 + ours)
    pairs = [
        (losses.KR(), torchlip.KRLoss(), 1),
        (losses.HingeMargin(0.8), torchlip.HingeMarginLoss(0.8), 1),
        (losses.HKR(ours, 0.8), torchlip.HKRLoss(alpha, 0.8), scale),
        (losses.TauBCEWithLogits(3.0), torchlip.TauBCEWithLogitsLoss(3.0), 1),
    ]
    for mine, theirs, factor in pairs:
        for reduction in ("mean", "sum", "none"):
            mine.reduction = theirs.reduction = reduction
            torch.testing.assert_close(
                mine(f, y).flatten() * factor, theirs(f, y.to(f.dtype)).flatten(), atol=1e-6, rtol=1e-6
            )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(3, 7),
    copies=st.integers(1, 4),
    alpha=st.floats(0.0, 0.99),
)
def test_multiclass_losses_equal_those_of_torchlip(seed, classes, copies, alpha):
    torchlip = pytest.importorskip("deel.torchlip")
    logits, labels = random_batch(seed, classes * copies, classes)
    one_hot = F.one_hot(labels, classes).double()
    ours = alpha / (1 - alpha)
    scale = 1 / (1 + ours)
    margin = 0.6
    pairs = [
        (losses.MulticlassKR(), torchlip.KRMulticlassLoss(), 1),
        (losses.MulticlassHinge(margin), torchlip.HingeMulticlassLoss(margin), 1),
        (losses.MulticlassHKR(ours, margin), torchlip.HKRMulticlassLoss(alpha, margin), scale),
        (losses.MulticlassSoftHKR(ours, margin), torchlip.SoftHKRMulticlassLoss(alpha, margin), scale),
        (
            losses.MulticlassLseHKR(ours, margin),
            torchlip.LseHKRMulticlassLoss(alpha, min_margin=margin),
            scale,
        ),
        (losses.CategoricalHinge(margin), torchlip.CategoricalHingeLoss(margin), 1),
        (losses.TauCrossEntropy(4.0), torchlip.TauCrossEntropyLoss(4.0), 1),
    ]
    for mine, theirs, factor in pairs:
        for reduction in ("mean", "sum", "none"):  # SoftHKR's running means march in step
            mine.reduction = theirs.reduction = reduction
            torch.testing.assert_close(
                mine(logits, labels) * factor, theirs(logits, one_hot).to(logits.dtype), atol=1e-6, rtol=1e-6
            )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6), margin=st.floats(0.1, 3))
def test_multi_margin_equals_torchs(seed, classes, margin):
    logits, labels = random_batch(seed, 9, classes)
    torch.testing.assert_close(
        losses.MultiMargin(margin)(logits, labels), F.multi_margin_loss(logits, labels, margin=margin)
    )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), offset=st.floats(0, 3), temperature=st.floats(0.1, 2))
def test_offset_and_annealing_follow_their_papers_formulas(seed, offset, temperature):
    """Straight transcriptions, with a loop over the samples, of the two definitions."""
    logits, labels = random_batch(seed, 6, 4)
    plain, annealed = [], []
    for z, y in zip(logits, labels, strict=True):
        shifted = z.clone()
        shifted[y] -= offset
        p = torch.softmax(shifted / temperature, 0)[y]
        plain.append(-temperature * p.log())
        annealed.append(-temperature * (1 - p) ** 5 * p.log())
    torch.testing.assert_close(
        losses.OffsetCrossEntropy(offset, temperature)(logits, labels), torch.stack(plain).mean()
    )
    torch.testing.assert_close(losses.LogitAnnealing(offset, temperature)(logits, labels), torch.stack(annealed).mean())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), epsilon=st.floats(0.05, 2), lipschitz=st.floats(0.5, 2))
def test_emma_follows_its_papers_formula(seed, epsilon, lipschitz):
    logits, labels = random_batch(seed, 6, 4)
    rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    total = 0.0
    for z, y in zip(logits, labels, strict=True):
        pushed = z.clone()
        for j in range(4):
            reach = lipschitz * (rows[y] - rows[j]).norm()
            if j != y:
                pushed[j] += epsilon * ((z[y] - z[j]) / (epsilon * reach)).clamp(0.01, 1) * reach
        total += -torch.log_softmax(pushed, 0)[y] / 6
    torch.testing.assert_close(losses.EMMA(epsilon, lipschitz)(logits, labels, rows), total)


def test_emma_pushes_an_easy_class_no_further_than_the_boundary_and_keeps_its_gradient():
    """At the boundary both classes have probability 1/2; a push that carried gradient would cancel it to 0."""
    logits = torch.tensor([[3.0, 0.0]], requires_grad=True)
    far = losses.EMMA(epsilon=100.0)(logits, torch.tensor([0]))
    far.backward()
    assert far.item() == pytest.approx(math.log(2), abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.5, 0.5]]))


# --- the dial


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), alpha=st.floats(0, 50))
def test_hkr_is_alpha_times_the_hinge_minus_kr(seed, alpha):
    logits, labels = random_batch(seed, 12, 4)
    expected = alpha * losses.MulticlassHinge(0.7)(logits, labels) - losses.MulticlassKR()(logits, labels)
    torch.testing.assert_close(losses.MulticlassHKR(alpha, 0.7)(logits, labels), expected)
    f, y = logits[:, 0], labels % 2
    expected = alpha * losses.HingeMargin(0.7)(f, y) - losses.KR()(f, y)
    torch.testing.assert_close(losses.HKR(alpha, 0.7)(f, y), expected)


def test_infinite_alpha_is_the_hinge_alone():
    assert value(losses.HKR(math.inf, 2), F_BINARY, Y_BINARY) == value(losses.HingeMargin(2), F_BINARY, Y_BINARY)
    hinge = losses.MulticlassHinge(2)
    assert value(losses.MulticlassHKR(math.inf, 2), LOGITS, LABELS) == value(hinge, LOGITS, LABELS)


def test_focal_loss_without_focus_is_the_cross_entropy_and_its_gradient_is_finite_at_certainty():
    assert value(losses.TauFocal(3.0, gamma=0), LOGITS, LABELS) == value(losses.TauCrossEntropy(3.0), LOGITS, LABELS)
    for gamma in (0.0, 1.0, 2.0):
        logits = torch.tensor([[100.0, -100.0]], requires_grad=True)
        losses.TauFocal(10.0, gamma)(logits, torch.tensor([0])).backward()
        assert logits.grad.isfinite().all()


def test_cosine_similarity_ignores_the_scale_and_stays_finite_at_zero():
    loss = losses.CosineSimilarity()
    torch.testing.assert_close(loss(LOGITS, LABELS), loss(10 * LOGITS, LABELS))
    zero = torch.zeros(1, 3, requires_grad=True)
    out = loss(zero, torch.tensor([0]))
    out.backward()
    assert out.item() == 0 and zero.grad.isfinite().all()


# --- calling conventions, edges


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


@every_binary
def test_empty_binary_batch_gives_zero(name):
    f = torch.zeros(0, requires_grad=True)
    loss = BINARY[name](f, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0


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


def test_kr_of_a_batch_of_one_class_is_zero_with_zero_gradient():
    logits = LOGITS.clone().requires_grad_()
    losses.MulticlassKR()(logits, torch.zeros(6, dtype=torch.long)).backward()
    assert (logits.grad == 0).all()
    assert value(losses.KR(), F_BINARY, torch.ones(6)) == 0


@every_binary
def test_binary_labels_may_be_signs_bits_or_booleans_and_logits_may_have_a_channel(name):
    loss = BINARY[name]
    expected = loss(F_BINARY, Y_BINARY)
    for target in (Y_BINARY.float(), 2 * Y_BINARY - 1, Y_BINARY.bool()):
        assert loss(F_BINARY, target) == expected
        assert loss(F_BINARY[:, None], target) == expected
        assert loss(F_BINARY[:, None], target[:, None]) == expected


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


# --- wrong input


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


@pytest.mark.parametrize("wrong", [2, -3, 0.5, float("nan")])
@every_binary
def test_binary_label_of_another_value_is_named(name, wrong):
    with pytest.raises(ValueError, match="binary label"):
        BINARY[name](F_BINARY, torch.tensor([0, 0, 0, 1, 1, wrong]))


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


def test_binary_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        losses.KR()(torch.zeros(4, 1), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="same shape"):
        losses.KR()(torch.zeros(4), torch.zeros(4, 1))


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


@every_binary
@pytest.mark.parametrize("dtype", WHOLE)
def test_a_binary_label_is_the_same_in_every_whole_type_and_255_is_none(name, dtype):
    loss = BINARY[name]
    assert loss(F_BINARY, Y_BINARY.to(dtype)) == loss(F_BINARY, Y_BINARY)
    wrong = torch.tensor([1, 0, -1, 0, 1, 1]).to(dtype)
    if dtype in UNSIGNED:
        with pytest.raises(ValueError, match="a binary label must be 0 or 1"):
            loss(F_BINARY, wrong)
    else:
        assert loss(F_BINARY, wrong) == loss(F_BINARY, torch.tensor([1, 0, 0, 0, 1, 1]))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), power=st.integers(-30, 30))
def test_emma_is_a_number_for_rows_of_any_size_and_scales_with_them(seed, power):
    """Logits and rows times a factor: the loss of the scaled head, computed in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = 10.0**power * torch.randn(4, 6, generator=generator)
    logits = torch.randn(5, 4, generator=generator) * 10.0**power
    labels = torch.randint(4, (5,), generator=generator)
    rows.requires_grad_()
    loss = losses.EMMA(0.3)(logits, labels, rows)
    (gradient,) = torch.autograd.grad(loss, rows)
    exact = losses.EMMA(0.3)(logits.double(), labels, rows.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-6)
    assert gradient.isfinite().all()


def test_emma_refuses_rows_of_another_head_and_takes_a_bound_as_it_is():
    with pytest.raises(ValueError, match="one row for each of 3 classes"):
        losses.EMMA(0.3)(TWO_LOGITS, TWO_LABELS, torch.randn(4, 6))
    bound = lipschitz_bound(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval(), (4,))
    assert losses.EMMA(0.3, bound)(TWO_LOGITS, TWO_LABELS) == losses.EMMA(0.3, bound.value)(TWO_LOGITS, TWO_LABELS)


# --- SoftHKR's state


def test_running_mean_is_saved_and_restored():
    loss = losses.MulticlassSoftHKR(5, 0.2)
    for _ in range(3):
        loss(5 * LOGITS, LABELS)
    copy = losses.MulticlassSoftHKR(5, 0.2)
    copy.load_state_dict(loss.state_dict())
    assert value(copy, LOGITS, LABELS) == value(loss, LOGITS, LABELS)


def test_evaluation_leaves_the_running_mean_alone():
    loss = losses.MulticlassSoftHKR(5, 0.2)
    before = loss.mean.clone()
    with torch.no_grad():
        loss(100 * LOGITS, LABELS)
    loss.eval()(100 * LOGITS, LABELS)
    loss.train()(LOGITS, torch.full((6,), -100))
    assert torch.equal(loss.mean, before)


# --- a batch split over processes


def _split_batch(rank: int, rendezvous: str, results: str) -> None:
    """One of two ranks: rank 0 holds 7 of the samples and no sample of class 3, rank 1 the other 5."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
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
def shares(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_split_batch, args=(str(folder / "rendezvous"), str(folder / "result")), nprocs=2)
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

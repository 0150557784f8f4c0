"""PGD: exact answers where there are any, budgets kept, peers matched, and nothing that fails in silence."""

import copy
import math
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lipguide.robustness import attacks
from lipguide.robustness.attacks import pgd_l2, pgd_linf
from tests.robustness.attacks.problems import ALL, Scale, accuracy, adv_lib_attacks, length, pictures
from tests.robustness.common import linear


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_linear_model_falls_just_above_its_exact_distance_and_never_below(seed):
    """min_j gap / ‖w_y - w_j‖ in L2, gap / ‖w_y - w_j‖₁ in L-infinity, far enough from the walls of the box.

    The nearest class need not be the runner-up: it takes as many restarts as there are classes to be sure of it.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 16, generator=generator)
    model = linear(weight)
    x = 0.5 + 0.02 * torch.randn(20, 1, 4, 4, generator=generator)
    logits = model(x)
    y = logits.argmax(1)
    differences = weight[y][:, None] - weight
    gaps = logits.gather(1, y[:, None]) - logits
    for attack, norm in ((pgd_l2, 2), (pgd_linf, 1)):
        distance = (gaps / differences.norm(p=norm, dim=2)).detach().nan_to_num(math.inf).amin(1)
        assert (model(attack(model, x, y, 0.999 * distance)).argmax(1) == y).all()
        assert (model(attack(model, x, y, 1.01 * distance, restarts=3)).argmax(1) != y).all()


@pytest.mark.parametrize("name", ["ordinary", "overconfident", "1-Lipschitz"])
@pytest.mark.parametrize("steps", [10, 40])
def test_l2_attack_is_no_weaker_than_foolbox_and_adv_lib(name, steps, models, test_set):
    foolbox = pytest.importorskip("foolbox")
    apgd = adv_lib_attacks().apgd
    (x, y), model, eps = test_set, models[name], 0.5
    ours = accuracy(model, pgd_l2(model, x, y, eps, steps=steps), y)
    theirs = foolbox.attacks.L2PGD(steps=steps, rel_stepsize=2.5 / steps)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peers = [
            theirs(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=eps)[1],
            apgd(model, x, y, eps, norm=2, n_iter=steps, loss_function="dlr"),
            apgd(model, x, y, eps, norm=2, n_iter=steps, loss_function="ce"),
        ]
    assert ours <= min(accuracy(model, moved, y) for moved in peers) + 0.005
    assert 0.05 < ours < accuracy(model, x, y) - 0.2  # an eps at which attacks can tell themselves apart


@pytest.mark.parametrize("name", ["ordinary", "overconfident", "1-Lipschitz"])
def test_linf_attack_is_no_weaker_than_foolbox_and_adv_lib(name, models, test_set):
    foolbox = pytest.importorskip("foolbox")
    library = adv_lib_attacks()
    (x, y), model, eps, steps = test_set, models[name], 0.05, 20
    ours = accuracy(model, pgd_linf(model, x, y, eps, steps=steps), y)
    theirs = foolbox.attacks.LinfPGD(steps=steps, rel_stepsize=2.5 / steps)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peers = [
            theirs(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=eps)[1],
            library.pgd_linf(model, x, y, eps, steps=steps, relative_step_size=2.5 / steps),
            library.apgd(model, x, y, eps, norm=math.inf, n_iter=steps),
        ]
    assert ours <= min(accuracy(model, moved, y) for moved in peers) + 0.005
    assert 0.05 < ours < accuracy(model, x, y) - 0.2


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    eps=st.floats(0, 3),
    steps=st.integers(1, 6),
    restarts=st.integers(1, 3),
    shape=st.sampled_from([(1, 3, 3), (3, 4, 5), (7,)]),
)
def test_budget_and_box_are_kept(seed, eps, steps, restarts, shape):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, *shape, generator=generator).round(decimals=1)  # with pixels on the walls of the box
    model = linear(torch.randn(3, x[0].numel(), generator=generator))
    y = torch.randint(3, (4,), generator=generator)
    for attack, norm in ((pgd_l2, 2), (pgd_linf, math.inf)):
        moved = attack(model, x, y, eps, steps=steps, restarts=restarts, generator=generator)
        assert moved.shape == x.shape and moved.dtype == x.dtype
        assert (moved >= 0).all() and (moved <= 1).all()
        assert ((moved - x).flatten(1).norm(p=norm, dim=1) <= eps * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("name", ALL)
def test_same_call_gives_the_same_pictures_and_leaves_no_trace(name, models, test_set):
    x, y = test_set[0][:20], test_set[1][:20]
    model, before, state = models["1-Lipschitz"], x.clone(), torch.get_rng_state()
    first = ALL[name](model, x, y, 0.3)
    with torch.inference_mode():
        second = ALL[name](model, x, y, 0.3)
    assert torch.equal(first, second)
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    assert not first.requires_grad
    assert not torch.equal(first, x)


def test_parameters_gradients_are_left_alone(models, test_set):
    model = models["1-Lipschitz"]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    pgd_l2(model, test_set[0][:5], test_set[1][:5], 0.3, steps=3)
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    model.zero_grad()


def test_generator_decides_the_restarts(models, test_set):
    x, y = test_set[0][:50], test_set[1][:50]
    runs = [
        pgd_l2(models["ordinary"], x, y, 0.3, 3, restarts=2, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("attack", [pgd_l2, pgd_linf])
def test_more_restarts_never_hurt_and_early_success_is_kept(attack, models, test_set):
    """Two steps of full length throw most samples across the boundary and back; what crossed once stays broken."""
    (x, y), model = test_set, models["ordinary"]
    eps = 0.4 if attack is pgd_l2 else 0.04
    scores = [attacks.margin(model(attack(model, x, y, eps, steps=2, restarts=r)), y) for r in (1, 2, 4)]
    assert (scores[1] >= scores[0]).all() and (scores[2] >= scores[1]).all()
    assert (scores[2] > scores[0]).any()
    clean = attacks.margin(model(x), y)
    assert (scores[0] >= clean).all()


@pytest.mark.parametrize("attack", [pgd_l2, pgd_linf])
def test_what_is_kept_is_the_best_point_not_the_last(attack):
    """A loss that leads away from the boundary of a linear model: the best point is where the run began."""
    generator = torch.Generator().manual_seed(0)
    model, x = linear(torch.randn(2, 16, generator=generator)), torch.rand(50, 1, 4, 4, generator=generator)
    y = model(x).argmax(1)

    def wrong_way(logits: Tensor, y: Tensor) -> Tensor:
        return -attacks.margin(logits, y)

    assert torch.equal(attack(model, x, y, 0.05, loss=wrong_way), x)


def test_restarts_leave_the_broken_alone(models, test_set):
    x, y = test_set
    sizes = []

    def counting(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return models["ordinary"](x)

    standing = round(len(x) * accuracy(models["ordinary"], pgd_l2(models["ordinary"], x, y, 0.4, steps=3), y))
    pgd_l2(counting, x, y, 0.4, steps=3, restarts=2)
    assert sizes[:4] == [len(x)] * 4 and set(sizes[4:]) == {standing} and 0 < standing < len(x)


def test_each_sample_may_have_its_own_budget(models, test_set):
    x, y = test_set[0][:30], test_set[1][:30]
    eps = torch.linspace(0, 1, 30)
    moved = pgd_l2(models["1-Lipschitz"], x, y, eps, steps=5)
    assert torch.equal(moved[0], x[0])
    assert (length(moved - x) <= eps * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("attack", [pgd_l2, pgd_linf])
def test_zero_gradient_is_announced(attack):
    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 255).round() / 255

    model = nn.Sequential(Rounded(), linear(torch.randn(3, 16, generator=torch.Generator().manual_seed(0))))
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    with pytest.warns(UserWarning, match="zero at every step for 6 of 6"):
        attack(model, x, y, 0.01)


def test_healthy_gradients_raise_no_warning(models, test_set):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pgd_l2(models["ordinary"], test_set[0][:20], test_set[1][:20], 0.1, steps=5)


def test_tiny_gradients_are_not_taken_for_zero():
    model = nn.Sequential(linear(torch.randn(3, 16, generator=torch.Generator().manual_seed(0))), Scale(1e-30)).eval()
    x = 0.4 + 0.2 * torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = pgd_l2(model, x, y, 1.0, loss=attacks.margin)
    assert (model(moved).argmax(1) != y).all()


def test_pixelwise_outputs_and_their_own_score():
    """A segmentation network: the objective is averaged over pixels, the score counts the wrong ones."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Conv2d(1, 3, 3, padding=1).eval()
    nn.init.normal_(network.weight, generator=generator)
    x = torch.rand(5, 1, 6, 6, generator=generator)
    y = network(x).argmax(1)

    def wrong_pixels(logits: Tensor, y: Tensor) -> Tensor:
        return (logits.argmax(1) != y).double().flatten(1).sum(1)

    by_loss = pgd_l2(network, x, y, 0.3)
    by_count = pgd_l2(network, x, y, 0.3, score=wrong_pixels)
    assert (wrong_pixels(network(by_loss), y) > 0).all()
    assert (wrong_pixels(network(by_count), y) >= wrong_pixels(network(by_loss), y)).all()


@pytest.mark.parametrize("attack", [pgd_l2, pgd_linf])
def test_an_objective_that_is_also_the_score_is_asked_once_a_step_and_gives_the_very_same_pictures(attack, models):
    """Detectors ascend what they are judged by, and to ask them is dear. Two names mean two questions, as before."""
    x, model = pictures(20, seed=3)[0], models["ordinary"]
    aim = torch.linspace(-1, 1, 20)[:, None]  # as y: no labels, so that nothing is known but the loss
    calls = []

    def loss(output: Tensor, y: Tensor) -> Tensor:
        calls.append(len(output))
        return (output.tanh() * y).sum(1) + (output.square() * y.cos()).mean(1)

    def the_same(output: Tensor, y: Tensor) -> Tensor:
        return loss(output, y)

    once = attack(model, x, aim, 0.3, steps=6, restarts=2, loss=loss)
    asked_once = len(calls)
    twice = attack(model, x, aim, 0.3, steps=6, restarts=2, loss=loss, score=the_same)
    assert torch.equal(once, twice) and not torch.equal(once, x)
    assert asked_once == 2 * 7 and len(calls) - asked_once == 2 * (7 + 6)


def test_any_model_and_loss_will_do():
    """Outputs in a dictionary and targets in a list, as a detector has them."""

    def model(x: Tensor) -> dict[str, Tensor]:
        return {"total": x.flatten(1).sum(1)}

    def loss(output: dict[str, Tensor], targets: list[float]) -> Tensor:
        return (output["total"] - torch.tensor(targets)).abs()

    x = torch.full((2, 1, 2, 2), 0.5)
    moved = pgd_l2(model, x, [0.0, 4.0], eps=0.2, loss=loss, restarts=2)
    torch.testing.assert_close(moved[0], torch.full((1, 2, 2), 0.6))
    torch.testing.assert_close(moved[1], torch.full((1, 2, 2), 0.4))


@pytest.mark.parametrize("name", ALL)
def test_pixels_outside_the_box_are_refused(name, models, test_set):
    x, y = test_set[0][:3], test_set[1][:3]
    for bad in (x - 0.5, x * 255, x * math.nan, (x * 255).to(torch.uint8)):
        with pytest.raises(ValueError, match=r"within \[0, 1\]"):
            ALL[name](models["ordinary"], bad, y, 0.1)
    with pytest.raises(ValueError, match="0 or more"):
        ALL[name](models["ordinary"], x, y, -0.1)


def test_other_wrong_input_is_named(models, test_set):
    (x, y), model = (test_set[0][:3], test_set[1][:3]), models["ordinary"]
    for number in ("steps", "restarts"):
        with pytest.raises(ValueError, match=f"{number} is 0: give it a whole number"):
            pgd_l2(model, x, y, 0.1, **{number: 0})
    with pytest.raises(ValueError, match='reduction="none"'):
        pgd_l2(model, x, y, 0.1, loss=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="NaN for 3 of 3"):
        pgd_l2(nn.Sequential(model, Scale(math.nan)), x, y, 0.1)
    with pytest.raises(ValueError, match="one for each of 3 samples"):
        pgd_l2(model, x, y, torch.full((3, 1), 0.1))
    with pytest.raises(ValueError, match="0 or more"):
        pgd_l2(model, x, y, math.nan)


def test_empty_batch_comes_back_empty(models):
    empty = torch.zeros(0, 1, 12, 12)
    assert pgd_l2(models["ordinary"], empty, torch.zeros(0, dtype=torch.long), 0.1).shape == empty.shape


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    eps=st.sampled_from([1e-6, 1e-4, 0.002, 0.02, 0.1, 0.7, 3.0, 100.0]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    restarts=st.integers(1, 2),
    attack=st.sampled_from([pgd_l2, pgd_linf]),
)
def test_what_the_model_receives_lies_in_the_ball_in_exact_arithmetic(seed, eps, dtype, restarts, attack):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 1, 3, 4, generator=generator).to(dtype)
    model = linear(torch.randn(3, 12, generator=generator)).to(dtype)
    y = torch.randint(3, (3,), generator=generator)
    moved = attack(model, x, y, eps, steps=4, restarts=restarts)
    assert moved.dtype == dtype and (moved >= 0).all() and (moved <= 1).all()
    for before, after in zip(x.double().flatten(1).tolist(), moved.double().flatten(1).tolist(), strict=True):
        steps = [abs(Fraction(a) - Fraction(b)) for a, b in zip(before, after, strict=True)]
        norm = max(steps) ** 2 if attack is pgd_linf else sum(step**2 for step in steps)
        assert norm <= Fraction(eps) ** 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attack", [pgd_l2, pgd_linf])
def test_an_attack_in_half_precision_still_succeeds(attack, dtype):
    model = linear(torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])).to(dtype)
    x, y = torch.tensor([0.625, 0.625, 0.375, 0.375]).reshape(1, 1, 2, 2).to(dtype), torch.tensor([0])
    distance = 0.25 if attack is pgd_l2 else 0.125  # exact
    for factor, wrong in ((0.9, False), (1.2, True)):
        moved = attack(model, x, y, factor * distance)
        assert (model(moved).argmax(1) != y).item() == wrong


@pytest.mark.parametrize("attack", [pgd_l2, pgd_linf])
def test_a_score_that_hides_nan_does_not_hide_it(attack, models, test_set):
    """The argmax of NaN is class 0, and a detector's output is more than one tensor."""
    x = test_set[0][:4]

    def detector(x: Tensor) -> dict[str, list[Tensor]]:
        logits = models["ordinary"](x)
        return {"scores": [logits, logits * math.nan]}

    def loss(output: dict[str, list[Tensor]], y: list[int]) -> Tensor:
        return output["scores"][0].sum(1)

    def score(output: dict[str, list[Tensor]], y: list[int]) -> Tensor:
        return output["scores"][1].argmax(1).float()

    with pytest.raises(ValueError, match="NaN for 4 of 4"):
        attack(detector, x, [0] * 4, 0.1, steps=2, loss=loss, score=score)


def test_a_network_of_copies_is_attacked_as_it_computes():
    """torch remembers the weight of a copy under the address of its original: the head would turn into the body."""
    body = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2, bias=False))
    head = copy.deepcopy(body)
    for layer, weight in ((body, [[1.0, 0.0], [0.0, 1.0]]), (head, [[0.0, 1.0], [1.0, 0.0]])):
        layer.weight = torch.tensor(weight)
    seen = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(torch.equal(output, inputs[0].flip(-1))))
    model = nn.Sequential(nn.Flatten(), body, head).eval()
    pgd_l2(model, torch.rand(2, 1, 1, 2), torch.tensor([0, 1]), 0.1, steps=2)
    assert all(seen) and len(seen) > 2

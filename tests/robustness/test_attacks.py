"""The attacks: exact answers where there are any, budgets kept, peers matched, and nothing that fails in silence."""

import math
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from lipguide.robustness import attacks
from lipguide.robustness.attacks import least_norm_l2, pgd_l2, pgd_linf, robust_accuracy_curve

CLASSES = 5
CORRUPTIONS = {name: getattr(attacks, name) for name in ("noise", "brightness", "contrast", "blur")}
ALL = {"pgd_l2": pgd_l2, "pgd_linf": pgd_linf, **CORRUPTIONS}


def pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Five smooth patterns of random strength, 12x12, in noise."""
    patterns = torch.rand(CLASSES, 1, 4, 4, generator=torch.Generator().manual_seed(123))
    patterns = F.interpolate(patterns, size=(12, 12), mode="bicubic").clamp(0, 1)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=generator)
    strength = torch.rand(n, 1, 1, 1, generator=generator)
    x = 0.25 + 0.5 * patterns[y] * strength + 0.2 * torch.randn(n, 1, 12, 12, generator=generator)
    return x.clamp(0, 1), y


class Absolute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def fitted(model: nn.Sequential, rate: float, tau: float) -> nn.Sequential:
    x, y = pictures(2000, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        batch = torch.randint(len(x), (128,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(tau * model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Sequential(
            *(nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(16 * 36, 32), nn.ReLU(), nn.Linear(32, CLASSES)),
        )
        lipschitz = nn.Sequential(
            *(nn.Flatten(), orthogonal(nn.Linear(144, 64)), Absolute(), orthogonal(nn.Linear(64, CLASSES)))
        )
    ordinary = fitted(plain, rate=3e-3, tau=1.0)
    return {
        "ordinary": ordinary,
        "overconfident": nn.Sequential(ordinary, Scale(1000.0)).eval(),
        "1-Lipschitz": fitted(lipschitz, rate=1e-2, tau=10.0),
    }


@pytest.fixture(scope="module")
def test_set() -> tuple[Tensor, Tensor]:
    return pictures(300, seed=1)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()


def linear(weight: Tensor) -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], len(weight), bias=False))
    model[1].weight.data.copy_(weight)
    return model.eval()


def length(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1)


# --- exact answers


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


def test_least_norm_of_a_linear_model_is_its_distance():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 16, generator=generator)
    model = linear(weight)
    x = 0.5 + 0.02 * torch.randn(20, 1, 4, 4, generator=generator)
    logits = model(x)
    y = logits.argmax(1)
    exact = ((logits.gather(1, y[:, None]) - logits) / (weight[y][:, None] - weight).norm(dim=2)).nan_to_num(math.inf)
    moved, found = least_norm_l2(model, x, y, max_eps=0.5)
    assert (model(moved).argmax(1) != y).all()
    torch.testing.assert_close(length(moved - x), found)
    assert (found >= exact.amin(1) * (1 - 1e-4)).all() and (found <= exact.amin(1) * 1.02 + 1e-3).all()


def test_least_norm_is_zero_for_the_misclassified_and_infinite_where_nothing_is_found(models, test_set):
    x, y = test_set
    model = models["ordinary"]
    moved, found = least_norm_l2(model, x, y, max_eps=0.2, steps=10, halvings=3)
    with torch.no_grad():
        wrong = model(x).argmax(1) != y
        assert (model(moved).argmax(1) != y).eq(found.isfinite()).all()
    assert (found[wrong] == 0).all() and (found[~wrong] > 0).all()
    assert torch.equal(moved[found.isinf()], x[found.isinf()]) and found.isinf().any()


# --- peers, at equal numbers of steps


def adv_lib_attacks():
    """adv-lib imports a plotting server that nothing here uses; an empty module stands in where it is not installed."""
    if "visdom" not in sys.modules:
        try:
            import visdom  # noqa: F401
        except ImportError:
            sys.modules["visdom"] = types.SimpleNamespace(Visdom=None)
    return pytest.importorskip("adv_lib.attacks")


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


def test_least_norm_is_as_small_as_that_of_adv_libs_ddn(models, test_set):
    ddn = adv_lib_attacks().ddn
    (x, y), model = (test_set[0][:100], test_set[1][:100]), models["ordinary"]
    _, ours = least_norm_l2(model, x, y, max_eps=2.0)
    theirs = length(ddn(model, x, y, steps=300, levels=None) - x)
    assert ours.isfinite().all()
    assert ours.mean() <= 1.01 * theirs.mean()


# --- budgets, boxes, determinism


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


# --- objectives


def test_rescaled_cross_entropy_does_not_depend_on_the_scale_of_the_logits(models, test_set):
    x, y = test_set
    values = []
    for factor in (1e-6, 1.0, 1e6):
        model = nn.Sequential(models["ordinary"], Scale(factor)).eval()
        values.append(accuracy(model, pgd_l2(model, x, y, 0.4, steps=10), y))
    assert max(values) - min(values) <= 0.005


def test_plain_cross_entropy_overrates_the_robustness_at_both_ends_of_the_scale(models, test_set):
    """Why the default objective is what it is. Saturated logits also set off the warning."""
    x, y = test_set

    def plain(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, reduction="none")

    model = models["overconfident"]
    with pytest.warns(UserWarning, match="gradient of the loss was zero"):
        flattering = accuracy(model, pgd_l2(model, x, y, 0.5, loss=plain), y)
    assert flattering > accuracy(model, pgd_l2(model, x, y, 0.5), y) + 0.2
    model = models["1-Lipschitz"]
    assert (
        accuracy(model, pgd_l2(model, x, y, 0.5, loss=plain), y) > accuracy(model, pgd_l2(model, x, y, 0.5), y) + 0.02
    )


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


# --- corruptions


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_of_no_severity_changes_nothing_and_a_stronger_one_stays_in_the_box(name, models, test_set):
    x, y = test_set[0][:20], test_set[1][:20]
    torch.testing.assert_close(CORRUPTIONS[name](models["ordinary"], x, y, 0.0), x, atol=1e-6, rtol=0)
    moved = CORRUPTIONS[name](models["ordinary"], x, y, 1.0)
    assert moved.shape == x.shape and (moved >= 0).all() and (moved <= 1).all()
    before, after = (attacks.margin(models["ordinary"](z), y) for z in (x, moved))
    assert (after >= before).all() and (after > before).any()


def test_severity_means_what_it_says():
    """A model that likes pictures dark, or flat, or smooth, shows how far each corruption goes."""
    generator = torch.Generator().manual_seed(0)
    x = 0.4 + 0.2 * torch.rand(1, 2, 8, 8, generator=generator)
    y = torch.tensor([0])

    def darkness(output: Tensor, y: Tensor) -> Tensor:
        return -output.flatten(1).mean(1)

    def flatness(output: Tensor, y: Tensor) -> Tensor:
        return -output.flatten(1).std(1)

    def change(output: Tensor, y: Tensor) -> Tensor:
        return (output - x).flatten(1).norm(dim=1)

    same = nn.Identity()
    torch.testing.assert_close(attacks.brightness(same, x, y, 0.3, score=darkness), x - 0.3)
    flat = attacks.contrast(same, x, y, 1.0, score=flatness)
    torch.testing.assert_close(flat, x.mean().expand_as(x))
    noisy = attacks.noise(same, x, y, 0.1, draws=1, score=change)
    assert (noisy - x).std().item() == pytest.approx(0.1, rel=0.2)
    impulse = torch.zeros(1, 1, 15, 15)
    impulse[0, 0, 7, 7] = 1.0
    blurred = attacks.blur(same, impulse, y, 1.5, score=flatness)
    offsets = torch.arange(15.0) - 7
    assert blurred.sum().item() == pytest.approx(1, abs=1e-5)
    spread = (blurred[0, 0].sum(0) * offsets.square()).sum().sqrt()
    assert spread.item() == pytest.approx(1.5, rel=0.03)


def test_blur_of_a_constant_picture_is_itself_even_when_the_kernel_is_larger():
    x = torch.full((1, 3, 2, 2), 0.7)
    moved = attacks.blur(linear(torch.randn(2, 12)), x, torch.tensor([0]), 4.0)
    torch.testing.assert_close(moved, x)


# --- the curve


@pytest.mark.parametrize("name", ALL)
def test_curve_starts_at_the_clean_accuracy_never_rises_and_keeps_the_callers_order(name, models, test_set):
    (x, y), model = test_set, models["ordinary"]
    strengths = [0.0, 0.1, 0.3, 0.6, 1.0]
    options = {"steps": 3} if name.startswith("pgd") else {}
    curve = robust_accuracy_curve(model, x, y, strengths, attack=ALL[name], **options)
    assert curve[0].item() == pytest.approx(accuracy(model, x, y))
    assert (curve.diff() <= 0).all() and curve[-1] < curve[0]
    mixed = [3, 0, 4, 2, 1]
    again = robust_accuracy_curve(model, x, y, [strengths[i] for i in mixed], attack=ALL[name], **options)
    assert torch.equal(again, curve[mixed])


def test_curve_of_a_linear_model_is_the_share_of_samples_beyond_the_distance():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 16, generator=generator)
    model = linear(weight)
    x = 0.5 + 0.05 * torch.randn(64, 1, 4, 4, generator=generator)
    y = model(x).argmax(1)
    distance = ((model(x)[:, 0] - model(x)[:, 1]).abs() / (weight[0] - weight[1]).norm()).detach()
    epsilons = [0.01, 0.02, 0.05, 0.1]
    expected = torch.tensor([(distance > e).double().mean() for e in epsilons])
    curve = robust_accuracy_curve(model, x, y, epsilons, batch_size=10)
    assert ((curve - expected).abs() <= 1 / 64).all()


@pytest.mark.parametrize("name", ["pgd_l2", "pgd_linf"])
def test_batches_do_not_matter(name, models, test_set):
    (x, y), model = (test_set[0][:60], test_set[1][:60]), models["1-Lipschitz"]
    curves = [robust_accuracy_curve(model, x, y, [0.1, 0.3], ALL[name], size, steps=5) for size in (7, 60, 500)]
    assert torch.equal(curves[0], curves[1]) and torch.equal(curves[1], curves[2])


# --- wrong input


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
    with pytest.raises(ValueError, match="at least 1"):
        pgd_l2(model, x, y, 0.1, steps=0)
    with pytest.raises(ValueError, match='reduction="none"'):
        pgd_l2(model, x, y, 0.1, loss=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="NaN for 3 of 3"):
        pgd_l2(nn.Sequential(model, Scale(math.nan)), x, y, 0.1)
    with pytest.raises(ValueError, match="negatives"):
        attacks.contrast(model, x, y, 1.5)
    with pytest.raises(ValueError, match="no samples"):
        robust_accuracy_curve(model, x[:0], y[:0], [0.1])
    with pytest.raises(ValueError, match="list of numbers"):
        robust_accuracy_curve(model, x, y, 0.1)
    with pytest.raises(ValueError, match="the model .* is in training mode"):
        robust_accuracy_curve(nn.Sequential(model, nn.Dropout()), x, y, [0.1])


def test_empty_batch_comes_back_empty(models):
    empty = torch.zeros(0, 1, 12, 12)
    assert pgd_l2(models["ordinary"], empty, torch.zeros(0, dtype=torch.long), 0.1).shape == empty.shape


def test_the_curve_does_not_ask_the_model_about_nobody():
    """Once no sample stands, the rest of the curve is zero without another call."""

    class Picky(nn.Module):
        def forward(self, x):
            assert len(x), "called with an empty batch"
            return x.flatten(1)[:, :2] * torch.tensor([1.0, 0.0]) - torch.tensor([0.1, 0.0])

    x = torch.full((4, 1, 2, 2), 0.5)
    labels = torch.zeros(4, dtype=torch.long)
    curve = robust_accuracy_curve(Picky().eval(), x, labels, [0.0, 1.0, 2.0], steps=5)
    assert curve[0] == 1 and curve[1] == curve[2] == 0

"""Steps that a GPU records: what a graph repeats is the very training that steps one by one are."""

import copy

import pytest
import torch
from torch import nn

from lipguide.recorded import WARM_UP, Recorded
from lipguide.tasks.detection import reader_step
from lipguide.tasks.harness import recipe_of
from lipguide.tasks.task import Data
from lipguide.training import Shifted, Supervised, adam, fit
from tests import test_devices
from tests.recording import recording
from tests.test_devices import STEPS, batch_for

CPU = torch.device("cpu")


def fused(model: nn.Module, rate: float = 1e-2) -> torch.optim.Adam:
    """The one that `adam` gives on CUDA."""
    return torch.optim.Adam(model.parameters(), rate, fused=True, capturable=True)


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return test_devices.classifier()


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(32, 3, 6, 6), torch.randint(4, (32,))


def both(model: nn.Module, columns, step: nn.Module, steps: int = 9, batch_size: int = 4, **options):
    """The same training, step by step and recorded: (weights, history) of each."""
    ends = []
    for recorded in (False, True):
        own, its = copy.deepcopy(model), copy.deepcopy(step)
        with recording() as graphs:
            history = fit(own, columns, its, fused(own), steps, batch_size, log_every=3, recorded=recorded, **options)
        assert [graph.replays for graph in graphs] == ([steps - WARM_UP] if recorded else [])
        for record in history:
            del record["samples_per_second"]
        ends.append((own.state_dict(), history))
    return ends


def assert_alike(ends, tolerance: float = 1e-5) -> None:
    """Reports, and weights: along directions in which the loss does not change at all, Adam follows the rounding of
    float32, so those of networks with such directions are held in float64."""
    (weights, history), (theirs, its) = ends
    for mine, other in zip(history, its, strict=True):
        assert list(other.values()) == pytest.approx(list(mine.values()), rel=tolerance)
    for name, value in weights.items():
        if value.dtype == torch.float64:
            assert torch.allclose(value, theirs[name], atol=tolerance), name


def in_float64() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    x, y = pictures()
    return classifier().double(), (x.double(), y)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle"])
def test_a_recorded_training_ends_with_the_same_weights(schedule):
    """Rates and batches are others in each step, and so are the shifts."""
    step = Shifted(Supervised(nn.CrossEntropyLoss()), noise=0.1, mirror=True)
    assert_alike(both(*in_float64(), step, schedule=schedule))


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_clipped_and_in_half_precision_too(clip, precision):
    model, data = in_float64() if precision == torch.float32 else (classifier(), pictures())
    assert_alike(both(model, data, Supervised(nn.CrossEntropyLoss()), clip=clip, precision=precision), 1e-3)


@pytest.mark.parametrize("name", STEPS)
def test_every_recipe_that_is_called_steady_is_steady(name, monkeypatch):
    monkeypatch.setattr(reader_step, "ASKED", set())
    task, recipe = recipe_of(name)
    columns = tuple(torch.cat([column] * 3) for column in batch_for(name, recipe))
    model = task.network(recipe)
    step = task.step(model, recipe, Data("six samples", columns, ""))
    assert step.steady
    assert_alike(both(model, columns, step, steps=5, batch_size=2), 1e-3)


class FromTheHost(nn.Module):
    """What must not be called steady: each step takes another number from the host."""

    steady = False

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, model, batch):
        self.calls += 1
        return nn.functional.cross_entropy(self.calls * model(batch[0]), batch[1])


class Asking(FromTheHost):
    def forward(self, model, batch):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        return loss * 2 if loss.item() > 0 else loss


def test_what_is_not_steady_is_found_by_the_comparison_above():
    with pytest.raises(AssertionError):
        assert_alike(both(*in_float64(), FromTheHost()), 0.01)


def test_a_step_that_asks_for_a_number_cannot_be_recorded():
    model = classifier()
    with recording(), pytest.raises(RuntimeError, match="cannot be recorded.*recorded=False"):
        fit(model, pictures(), Asking(), fused(model), 5, 4, recorded=True)


def test_a_step_that_is_not_finite_is_named_and_leaves_the_weights():
    (x, y), model = pictures(), classifier()
    x[5] = torch.inf
    with recording(), pytest.raises(FloatingPointError, match=r"step \d+: the loss is nan; first not finite is layer"):
        fit(model, (x, y), Supervised(nn.CrossEntropyLoss()), fused(model), 20, 2, log_every=20, recorded=True)
    assert all(part.isfinite().all() for part in model.parameters())


def test_a_recorded_training_goes_on_where_it_stopped(tmp_path):
    whole, data = in_float64()
    parts, step = copy.deepcopy(whole), Supervised(nn.CrossEntropyLoss())
    with recording():
        fit(whole, data, step, fused(whole), 12, 4, log_every=4, recorded=True)

    def interrupt(line: str) -> None:
        if "8/12" in line:
            raise KeyboardInterrupt

    options = {"log_every": 4, "recorded": True, "checkpoint": tmp_path / "run.pt"}
    with recording():
        with pytest.raises(KeyboardInterrupt):
            fit(parts, data, step, fused(parts), 12, 4, report=interrupt, **options)
        fit(parts, data, step, fused(parts), 12, 4, **options)
    for mine, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"precision": torch.float16}, "without float16"),
        ({"after_step": lambda model: None}, "without after_step"),
        ({"optimizer": "plain"}, "capturable=True"),
        ({"data": "list"}, "all columns of data are tensors"),
    ],
)
def test_what_cannot_be_recorded_is_refused(change, message):
    model, data = classifier(), pictures()
    optimizer = adam(model, 1e-2) if change.pop("optimizer", None) else fused(model)
    if change.pop("data", None):
        data = (data[0], data[1].tolist())
    with recording(), pytest.raises(ValueError, match=message):
        fit(model, data, Supervised(nn.CrossEntropyLoss()), optimizer, 5, 4, recorded=True, **change)


def test_on_the_cpu_nothing_is_recorded():
    model = classifier()
    assert len(fit(model, pictures(), Supervised(nn.CrossEntropyLoss()), adam(model, 1e-2), 4, 4, recorded=True)) == 1


def test_a_function_of_tensors_is_repeated_on_new_ones():
    with recording() as graphs:
        double = Recorded(lambda x: (2 * x).clone(), CPU)
        found = [double(torch.tensor([float(number)])).item() for number in range(6)]
    assert found == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0] and graphs[0].replays == 6 - WARM_UP

"""The training loop: interrupted runs, damaged checkpoints, NaN, several processes, and what a batch is."""

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lipguide as lip
from lipguide import deadline, distributed, training
from lipguide.batches import batch_indices
from lipguide.deadline import OutOfTime
from lipguide.losses import MulticlassHKR, MulticlassSoftHKR
from lipguide.training import Shifted, Supervised, fit, learning_rate_factor, supervised

ROOT = Path(__file__).parents[1]


def toy_data(n: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, x[:, :3].argmax(1)


def toy_model(dropout: float = 0.0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


class Run:
    """A model, its optimizer and its loss, trained by ``fit`` with dropout and a loss that has a state."""

    def __init__(self, steps: int = 24) -> None:
        self.model = toy_model(dropout=0.3)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.step_loss = Supervised(MulticlassSoftHKR(5.0, 0.5))
        self.steps = steps

    def fit(self, stop_at: int | None = None, **options) -> list[dict[str, float]]:
        """``stop_at``: an interruption just before the update of that step."""
        calls = {"step": 0}

        def interrupt(model: nn.Module) -> None:
            calls["step"] += 1
            if calls["step"] == stop_at:
                raise KeyboardInterrupt

        options = {"batch_size": 7, "schedule": "one-cycle", "log_every": 5, "after_step": interrupt} | options
        return fit(self.model, toy_data(), self.step_loss, self.optimizer, self.steps, **options)

    def state(self) -> list[Tensor]:
        return [*self.model.state_dict().values(), self.step_loss.loss.mean]


def same(a: Run, b: Run) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state(), b.state(), strict=True))


def accuracy(model: nn.Module) -> float:
    x, y = toy_data()
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).double().mean().item()


# --- it trains


@pytest.mark.parametrize("schedule", training.SCHEDULES)
def test_it_learns_and_reports(schedule):
    model, lines = toy_model(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    before = accuracy(model)
    history = fit(
        model,
        toy_data(),
        Supervised(nn.CrossEntropyLoss()),
        optimizer,
        150,
        schedule=schedule,
        batch_size=25,
        log_every=40,
        report=lines.append,
    )
    assert accuracy(model) > max(0.9, before)
    assert [record["step"] for record in history] == [40, 80, 120, 150]
    assert history[-1]["loss"] < history[0]["loss"] and all(math.isfinite(v) for r in history for v in r.values())
    assert len(lines) == 4 and lines[0].startswith("step  40/150  loss ")


def test_reported_loss_is_the_mean_since_the_last_line():
    model, seen = toy_model(), []

    def step_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        seen.append(loss.item())
        return loss

    history = fit(model, toy_data(), step_loss, torch.optim.SGD(model.parameters(), 0.1), 10, 8, log_every=4)
    expected = [sum(seen[:4]) / 4, sum(seen[4:8]) / 4, sum(seen[8:]) / 2]
    assert [record["loss"] for record in history] == pytest.approx(expected)


def test_plain_loop_written_out_gives_the_same_weights():
    """No clipping, no scaling, no surprise: SGD with a cosine, step by step."""
    ours, theirs = toy_model(), toy_model()
    x, y = toy_data()
    fit(ours, (x, y), Supervised(nn.CrossEntropyLoss()), torch.optim.SGD(ours.parameters(), 0.3), 12, 10, seed=3)
    for step in range(12):
        batch = batch_indices(step, 10, len(x), seed=3)
        rate = 0.3 * (1 + math.cos(math.pi * step / 12)) / 2
        theirs.zero_grad()
        F.cross_entropy(theirs(x[batch]), y[batch]).backward()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter -= rate * parameter.grad
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(samples=st.integers(1, 40), batch_size=st.integers(1, 60), seed=st.integers(0, 10**6))
def test_batches_are_full_and_every_epoch_holds_every_sample_once(samples, batch_size, seed):
    steps = -(-3 * samples // batch_size)
    stream = torch.cat([batch_indices(step, batch_size, samples, seed) for step in range(steps)])
    assert len(stream) == steps * batch_size
    epochs = stream[: 3 * samples].reshape(3, samples)
    assert (epochs.sort(1).values == torch.arange(samples)).all()
    if samples > 10:
        assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("schedule, start, peak", [("cosine", 1.0, 0), ("one-cycle", 0.04, 300), ("constant", 1.0, 0)])
def test_schedules_start_peak_and_end_where_they_should(schedule, start, peak):
    factors = [learning_rate_factor(schedule, step, 1000) for step in range(1001)]
    assert factors[0] == pytest.approx(start) and factors[peak] == pytest.approx(1) and max(factors) <= 1
    assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-12)
    assert max(abs(a - b) for a, b in zip(factors, factors[1:], strict=False)) < 0.01


def test_columns_may_be_lists_and_reach_the_loss_in_step():
    boxes = [torch.full((n % 4, 4), float(n)) for n in range(20)]
    names = [f"picture {n}" for n in range(20)]
    seen = []

    def step_loss(model: nn.Module, batch: tuple) -> Tensor:
        numbers, their_boxes, their_names = batch
        for n, box, name in zip(numbers, their_boxes, their_names, strict=True):
            assert box.shape == (int(n) % 4, 4) and (box == n).all() and name == f"picture {int(n)}"
            seen.append(int(n))
        return model(numbers[:, None]).mean()

    model = nn.Linear(1, 1)
    fit(model, (torch.arange(20.0), boxes, names), step_loss, torch.optim.SGD(model.parameters(), 0.1), 5, 4)
    assert sorted(seen) == list(range(20))


def test_after_step_has_the_last_word_on_the_weights():
    model = toy_model()

    def project(model: nn.Module) -> None:
        with torch.no_grad():
            model[0].weight.clamp_(-0.05, 0.05)

    fit(
        model,
        toy_data(),
        Supervised(nn.CrossEntropyLoss()),
        torch.optim.SGD(model.parameters(), 1.0),
        10,
        after_step=project,
    )
    assert model[0].weight.abs().max() <= 0.05


def test_clipping_bounds_the_update_and_is_off_by_default():
    lengths = {}
    for clip in (None, 1e-3):
        model = toy_model()
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        history = fit(model, toy_data(), Supervised(nn.CrossEntropyLoss()), optimizer, 1, clip=clip)
        lengths[clip] = (nn.utils.parameters_to_vector(model.parameters()) - before).norm().item()
        assert history[0]["gradient_norm"] > 0.01  # as it was before clipping
    assert lengths[None] == pytest.approx(history[0]["gradient_norm"])
    assert lengths[1e-3] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_float32_weights(precision):
    model = toy_model().float()
    x, y = toy_data()
    dtypes = set()

    def step_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0])
        dtypes.add(logits.dtype)
        return F.cross_entropy(logits, batch[1])

    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    fit(model, (x.float(), y), step_loss, optimizer, 100, 25, precision=precision)
    assert dtypes == {precision}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert (model(x.float()).argmax(1) == y).double().mean() > 0.9


def test_callers_random_numbers_and_mode_are_left_as_they_were():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run = Run(steps=3)
    run.model.eval()
    torch.manual_seed(5)
    run.fit()
    assert torch.equal(torch.rand(3), expected)
    assert not run.model.training


# --- interrupted runs


@pytest.fixture(scope="module")
def uninterrupted() -> Run:
    run = Run()
    run.history = run.fit()
    return run


@pytest.mark.parametrize("stops", [[1], [5], [6], [13], [24], [3, 8, 2, 9]])
def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(stops, uninterrupted, tmp_path):
    """Dropout, Adam's moments, the loss's running mean and the batches all go on where they were, bit for bit."""
    path = tmp_path / "run.pt"
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            Run().fit(stop_at=stop, checkpoint=path)
    last = Run()
    history = last.fit(checkpoint=path)
    assert same(last, uninterrupted)
    for ours, theirs in zip(history, uninterrupted.history, strict=True):
        assert {k: v for k, v in ours.items() if k != "samples_per_second"} == {
            k: v for k, v in theirs.items() if k != "samples_per_second"
        }


def test_finished_run_is_read_not_repeated(uninterrupted, tmp_path):
    path = tmp_path / "run.pt"
    Run().fit(checkpoint=path)
    again, lines = Run(), []
    again.fit(checkpoint=path, stop_at=1, report=lines.append)  # would raise if a step were taken
    assert same(again, uninterrupted) and lines == []


def test_different_seeds_give_different_weights(uninterrupted):
    other = Run()
    other.fit(seed=1)
    assert not same(other, uninterrupted)


def test_write_that_fails_leaves_the_old_checkpoint_whole(uninterrupted, tmp_path, monkeypatch):
    """The disk fills up in the middle of the second checkpoint."""
    path = tmp_path / "run.pt"
    write, calls = Path.write_bytes, []

    def full_disk(file: Path, content: bytes) -> None:
        calls.append(1)
        if len(calls) == 2:
            write(file, b"half a checkpoint")
            raise OSError(28, "No space left on device")
        write(file, content)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space"):
        Run().fit(checkpoint=path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True)["step"] == 5
    last = Run()
    last.fit(checkpoint=path)
    assert same(last, uninterrupted)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_damaged_checkpoint_is_named_and_kept(keep, tmp_path):
    path = tmp_path / "run.pt"
    Run(steps=6).fit(checkpoint=path)
    whole = path.read_bytes()
    damaged = whole[: keep if isinstance(keep, int) else int(keep * len(whole))]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"run\.pt is no readable checkpoint"):
        Run(steps=6).fit(checkpoint=path)
    assert path.read_bytes() == damaged


@settings(max_examples=40, deadline=None, derandomize=True)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_flipped_byte_is_noticed(place, flip, tmp_path_factory, finished):
    """torch.load alone would take a damaged weight for a good one, and a zip file's directory has no checksum."""
    path = tmp_path_factory.mktemp("flip") / "run.pt"
    damaged = bytearray(finished)
    damaged[int(place * len(finished))] ^= flip
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="no readable checkpoint"):
        Run(steps=6).fit(checkpoint=path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("finished") / "run.pt"
    run = Run(steps=6)
    run.fit(checkpoint=path)
    return path.read_bytes()


def test_foreign_files_and_other_runs_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="no readable checkpoint"):
        Run().fit(checkpoint=path)
    path.unlink()
    Run().fit(checkpoint=path)
    for change, message in [
        ({"batch_size": 8}, "batch_size = 7 there, 8 here"),
        ({"seed": 2}, "seed = 0 there, 2 here"),
        ({"schedule": "cosine"}, "'one-cycle' there, 'cosine' here"),
        ({"clip": 1.0}, "clip = None there"),
    ]:
        with pytest.raises(ValueError, match=message):
            Run().fit(checkpoint=path, **change)
    other = Run()
    other.optimizer = torch.optim.Adam(other.model.parameters(), lr=0.5)
    with pytest.raises(ValueError, match="optimizer = "):
        other.fit(checkpoint=path)


# --- a time limit


@pytest.fixture
def stopped_at(monkeypatch):
    """The time is up when it is asked for before one of these steps, counted over all runs of a test."""

    def limit(*steps: int) -> None:
        asked = iter(range(10**6))
        monkeypatch.setattr(deadline, "is_up", lambda: next(asked) in steps)

    return limit


@pytest.mark.parametrize("stops", [(3,), (5,), (13, 20), (1, 3, 6, 23)])
def test_a_run_in_slices_ends_with_the_weights_and_the_records_of_one_piece(stops, uninterrupted, stopped_at, tmp_path):
    """No step is made twice, and the mean loss of a report counts those before the stop."""
    path = tmp_path / "run.pt"
    stopped_at(*(stop + k for k, stop in enumerate(stops)))  # a step before which a run stops is asked for twice
    for stop in stops:
        run = Run()
        with pytest.raises(OutOfTime, match=f"stopped before step {stop} of 24$"):
            run.fit(checkpoint=path)
    last = Run()
    history = last.fit(checkpoint=path)
    assert same(last, uninterrupted)
    for ours, theirs in zip(history, uninterrupted.history, strict=True):
        assert {**ours, "samples_per_second": 0} == {**theirs, "samples_per_second": 0}


def test_a_run_whose_time_is_up_at_first_takes_no_step_and_one_without_a_checkpoint_says_so(stopped_at, tmp_path):
    run, path = Run(), tmp_path / "run.pt"
    before = [value.clone() for value in run.state()]
    stopped_at(0)
    with pytest.raises(OutOfTime, match="before step 0 of 24, and no checkpoint is kept"):
        run.fit()
    stopped_at(0)
    with pytest.raises(OutOfTime):
        run.fit(checkpoint=path)
    assert all(torch.equal(a, b) for a, b in zip(run.state(), before, strict=True)) and not path.exists()


def test_the_limit_is_an_environment_variable_which_children_inherit(monkeypatch):
    code = f"import os; print(os.environ[{deadline.VARIABLE!r}])"
    with deadline.limit(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        until = float(done.stdout.split()[0])
        assert time.time() + 60 < until < time.time() + 60 * 2 * (1 - deadline.KEPT)
        assert not deadline.is_up()
    assert deadline.left() == math.inf
    monkeypatch.setenv(deadline.VARIABLE, f"{time.time() - 1} 3")
    with pytest.raises(OutOfTime, match="that much"):
        deadline.check("that much")


@pytest.mark.parametrize("minutes", [0, -1, math.inf, math.nan])
def test_a_limit_that_is_none_is_refused(minutes):
    with pytest.raises(ValueError, match="minutes is"), deadline.limit(minutes):
        pass


# --- NaN


class Poison(nn.Module):
    """Gives NaN at its n-th training call, and whenever that batch comes again."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls, self.batch = at, 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            self.batch = x.detach().clone()
        if self.batch is not None and torch.equal(x, self.batch):
            return x * math.nan
        return x


def poisoned(at: int) -> nn.Sequential:
    plain = toy_model()
    block = nn.Sequential(Poison(at), nn.Tanh())
    return nn.Sequential(plain[0], block, plain[3])


SKIPPING = pytest.mark.parametrize("fused", [None, True], ids=["asked each step", "asked at the report"])


@SKIPPING
def test_first_nan_stops_with_step_and_layer_and_the_weights_before_it(fused):
    model, twin = poisoned(at=8), poisoned(at=10**9)
    step_loss = Supervised(MulticlassHKR(2.0))
    with pytest.raises(
        FloatingPointError, match=r"step 7: the loss is nan; first not finite is layer '1.0' \(Poison\)"
    ):
        sgd = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
        fit(model, toy_data(), step_loss, sgd, 20, 9, "constant", log_every=12)
    assert not hasattr(sgd, "found_inf")
    fit(twin, toy_data(), step_loss, torch.optim.SGD(twin.parameters(), 0.1, fused=fused), 7, 9, "constant")
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nan_of_the_loss_itself_is_said_to_be_that():
    model = toy_model()

    def step_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0]).mean() * math.inf

    with pytest.raises(FloatingPointError, match="the loss itself: the output of every layer is finite"):
        fit(model, toy_data(), step_loss, torch.optim.SGD(model.parameters(), 0.1), 5)


@SKIPPING
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_gradient_that_is_not_finite_is_caught_before_it_reaches_the_weights(optimizer, fused):
    """The square root of an output that is exactly zero: a finite loss, an infinite slope."""
    model = toy_model()
    before = [p.detach().clone() for p in model.parameters()]

    def step_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) * 0).abs().sqrt().sum()

    with pytest.raises(
        FloatingPointError, match=r"step 0: the loss is 0, but the gradient of '0.weight', .* not finite"
    ):
        fit(model, toy_data(), step_loss, optimizer(model.parameters(), 0.1, fused=fused), 5)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


class Once(Supervised):
    """A loss that is not finite at one call, and finite when the same batch comes again."""

    def __init__(self, at: int) -> None:
        super().__init__(nn.CrossEntropyLoss())
        self._calls, self._at = 0, at

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self._calls += 1
        loss = super().forward(model, batch)
        return loss + math.inf if self._calls == self._at else loss


@SKIPPING
def test_a_loss_that_is_not_finite_stops_also_where_its_gradient_is(fused):
    model, twin = toy_model(), toy_model()
    with pytest.raises(FloatingPointError, match=r"step 4: .* not finite, in another process or for this once"):
        fit(model, toy_data(), Once(at=5), torch.optim.SGD(model.parameters(), 0.1, fused=fused), 20, 9, "constant")
    sgd = torch.optim.SGD(twin.parameters(), 0.1, fused=fused)
    fit(twin, toy_data(), Supervised(nn.CrossEntropyLoss()), sgd, 4, 9, "constant")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def numbers_read_back(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int, **options: Any) -> int:
    """How often a run asks the device for a number; on a GPU it waits for it each time."""
    step_loss = Supervised(nn.CrossEntropyLoss())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fit(model, toy_data(), step_loss, optimizer, steps, 9, "constant", log_every=1000, **options)
    reads = [event for event in profile.events() if event.name == "aten::_local_scalar_dense"]
    return sum(not inside_the_fused_kernel(event) for event in reads)


def inside_the_fused_kernel(event: Any) -> bool:
    """On the CPU torch's Adam reads its own count of steps, which its kernel for CUDA does on the GPU."""
    while event is not None and not event.name.startswith("aten::_fused_adam"):
        event = event.cpu_parent
    return event is not None


@pytest.mark.parametrize("options", [{}, {"clip": 1.0}])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_between_two_reports_nothing_is_read_back(make, options):
    """Counted, for it holds on every device: ten steps more ask for no number more, with a fused optimizer."""
    asked = {}
    for fused in (True, None):
        for steps in (2, 12):
            model = toy_model()
            asked[fused, steps] = numbers_read_back(
                make(model.parameters(), 0.01, fused=fused), model, steps, **options
            )
    assert asked[True, 12] == asked[True, 2]
    assert asked[None, 12] >= asked[None, 2] + 10, "the others are asked each step, so the count does count"


def test_weights_that_were_never_finite_are_named():
    model = toy_model()
    model[3].bias.data[1] = math.inf
    with pytest.raises(FloatingPointError, match="parameter '3.bias' is not finite before the update of step 0"):
        fit(model, toy_data(), Supervised(nn.CrossEntropyLoss()), torch.optim.SGD(model.parameters(), 0.1), 5)


# --- wrong input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": (torch.zeros(3, 6), torch.zeros(2))}, r"one length.*\[2, 3\]"),
        ({"data": (torch.zeros(0, 6), torch.zeros(0))}, "not empty"),
        ({"data": ()}, "not empty"),
        ({"steps": 0}, "steps is 0: give it a whole number ≥ 1"),
        ({"batch_size": 0}, "batch_size is 0: give it a whole number ≥ 1"),
        ({"schedule": "linear"}, "constant, cosine, one-cycle"),
        ({"precision": torch.float64}, "torch.float32"),
    ],
)
def test_wrong_settings_are_named(change, message):
    model = toy_model()
    settings = {"data": toy_data(), "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        fit(
            model,
            step_loss=Supervised(nn.CrossEntropyLoss()),
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            **settings,
        )


def test_unknown_device_is_named(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="unknown device 'gpu'; valid: auto, cpu, cuda"):
        distributed.start("gpu")
    assert distributed.start("auto").type in ("cpu", "cuda")


NUMBERS = {
    "clip": [-1.0, 0.0, math.nan, -math.inf],
    "steps": [0, -3, 2.5, None, True],
    "batch_size": [0, -1, 2.0, math.nan],
    "log_every": [0, -1, 0.5],
    "seed": [0.5, None, "one", -1, False],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in NUMBERS.items() for value in values])
def test_a_senseless_number_is_named_and_nothing_is_trained(name, value):
    model, twin = toy_model(), toy_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=name):
        fit(model, toy_data(), Supervised(nn.CrossEntropyLoss()), optimizer, **{"steps": 2, name: value})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("rate", [math.inf, math.nan])
def test_a_learning_rate_that_is_no_number_is_named(rate):
    model = toy_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.param_groups[0]["lr"] = rate
    with pytest.raises(ValueError, match="learning rate must be finite"):
        fit(model, toy_data(), Supervised(nn.CrossEntropyLoss()), optimizer, 1)


def test_weights_that_the_last_update_made_infinite_are_not_returned():
    model = toy_model()
    steep = torch.optim.SGD(model.parameters(), 1e308)
    with pytest.raises(FloatingPointError, match="is not finite after the update of step 0"):
        fit(model, toy_data(), lambda model, batch: 1e6 * plain_loss(model, batch), steep, 1)


@pytest.mark.parametrize(
    "data, message",
    [
        (torch.rand(4, 6), "tuple of columns"),
        (zip([1], [2], strict=True), "tuple of columns"),
        ((torch.rand(4, 6), torch.tensor(1)), "a tensor or a list"),
        ((torch.rand(4, 6), 3), "a tensor or a list"),
    ],
)
def test_data_that_are_no_columns_are_named(data, message):
    model = toy_model()
    with pytest.raises(ValueError, match=message):
        fit(model, data, Supervised(nn.CrossEntropyLoss()), torch.optim.SGD(model.parameters(), 0.1), 1)


def foreign_parameters() -> list[nn.Parameter]:
    return list(toy_model().parameters())


def parameters_before_the_constraint(model: nn.Module) -> list[nn.Parameter]:
    before = list(model.parameters())
    lip.orthogonal(model[0])
    model[3] = nn.Linear(16, 3).double()
    return before


@pytest.mark.parametrize(
    "parameters",
    [
        lambda model: foreign_parameters(),
        lambda model: [*model.parameters(), *foreign_parameters()],
        parameters_before_the_constraint,
    ],
    ids=["another model", "both", "before the model was complete"],
)
def test_an_optimizer_over_other_parameters_is_refused(parameters):
    model = toy_model()
    optimizer = torch.optim.SGD(parameters(model), 0.1)
    with pytest.raises(ValueError, match="belong neither to the model nor to the loss"):
        fit(model, toy_data(), Supervised(nn.CrossEntropyLoss()), optimizer, 3)


def test_a_part_of_the_model_or_a_loss_with_weights_of_its_own_may_be_trained():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(self.scale * model(batch[0]), batch[1])

    model, step_loss = toy_model(), Scaled()
    first = model[0].weight.clone()
    optimizer = torch.optim.SGD([*model[3].parameters(), step_loss.scale], 0.1)
    fit(model, toy_data(), step_loss, optimizer, 3)
    assert torch.equal(model[0].weight, first) and step_loss.scale != 1


def test_models_in_which_nothing_can_be_trained_are_named():
    empty, frozen = nn.Flatten(), toy_model().requires_grad_(False)
    optimizer = torch.optim.SGD(toy_model().parameters(), 0.1)
    with pytest.raises(ValueError, match="Flatten, has no parameters"):
        fit(empty, toy_data(), Supervised(nn.CrossEntropyLoss()), optimizer, 1)
    with pytest.raises(ValueError, match="requires a gradient"):
        fit(frozen, toy_data(), Supervised(nn.CrossEntropyLoss()), torch.optim.SGD(frozen.parameters(), 0.1), 1)


@pytest.mark.parametrize(
    "value",
    [lambda loss: loss.detach(), lambda loss: loss.item(), lambda loss: loss.expand(3), lambda loss: None],
    ids=["detached", "a float", "three numbers", "nothing"],
)
def test_a_loss_that_cannot_be_descended_is_named(value):
    model = toy_model()

    def step_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        return value(F.cross_entropy(model(batch[0]), batch[1]))

    with pytest.raises(ValueError, match="step_loss must return one number that the parameters have a part in"):
        fit(model, toy_data(), step_loss, torch.optim.SGD(model.parameters(), 0.1), 1)


def test_every_part_of_the_model_keeps_its_mode_also_after_an_error():
    model = toy_model(dropout=0.5)
    model[2].eval()
    modes = [part.training for part in model.modules()]
    fit(model, toy_data(), Supervised(nn.CrossEntropyLoss()), torch.optim.SGD(model.parameters(), 0.1), 1)
    assert [part.training for part in model.modules()] == modes
    model.eval()
    with pytest.raises(KeyboardInterrupt):
        fit(model, toy_data(), interrupted_loss, torch.optim.SGD(model.parameters(), 0.1), 1)
    assert not any(part.training for part in model.modules())


def interrupted_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    raise KeyboardInterrupt


# --- checkpoints of another run

TEMPERATURE = 1.0


def plain_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def other_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(2 * model(batch[0]), batch[1])


def tempered_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(TEMPERATURE * model(batch[0]), batch[1])


def weighted(scale: float) -> Callable[..., Tensor]:
    return lambda model, batch: scale * F.cross_entropy(model(batch[0]), batch[1])


def class_weights(*weights: float) -> Supervised:
    return Supervised(nn.CrossEntropyLoss(weight=torch.tensor(weights, dtype=torch.float64)))


def toy_run(path: Path, **changes: Any) -> nn.Module:
    settings = {"model": toy_model(), "data": toy_data(), "loss": Supervised(nn.CrossEntropyLoss()), "steps": 6}
    settings |= {"optimizer": lambda model: torch.optim.Adam(model.parameters(), 1e-2)} | changes
    optimizer = settings["optimizer"](settings["model"])
    options = {"batch_size": 10, "checkpoint": path, "after_step": settings.get("after_step")}
    fit(settings["model"], settings["data"], settings["loss"], optimizer, settings["steps"], **options)
    return settings["model"]


def moved_data() -> tuple[Tensor, Tensor]:
    x, y = toy_data()
    return x + 1e-9, y


def wider() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Dropout(0.0), nn.Linear(17, 3)).double()


def with_relu() -> nn.Sequential:
    model = toy_model()
    model[1] = nn.ReLU()
    return model


def flattened(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.clamp_(-0.1, 0.1)


OTHERS = {
    "data of the same length": ({}, {"data": moved_data()}, "data ="),
    "labels of the same length": ({}, {"data": (toy_data()[0], toy_data()[1].flip(0))}, "data ="),
    "a module for a function": ({"loss": plain_loss}, {}, "step_loss ="),
    "a function for a module": ({}, {"loss": plain_loss}, "step_loss ="),
    "another function": ({"loss": plain_loss}, {"loss": other_loss}, "step_loss ="),
    "another number around it": ({"loss": weighted(1.0)}, {"loss": weighted(2.0)}, "step_loss ="),
    "another partial": (
        {"loss": partial(lambda scale, model, batch: weighted(scale)(model, batch), 1.0)},
        {"loss": partial(lambda scale, model, batch: weighted(scale)(model, batch), 2.0)},
        "step_loss =",
    ),
    "another loss": ({}, {"loss": Supervised(nn.MultiMarginLoss())}, "step_loss ="),
    "another setting of the loss": (
        {"loss": Supervised(MulticlassHKR(1.0))},
        {"loss": Supervised(MulticlassHKR(2.0))},
        "step_loss =",
    ),
    "other class weights": ({"loss": class_weights(1, 2, 3)}, {"loss": class_weights(1, 2, 4)}, "'loss.weight'"),
    "another optimizer": ({}, {"optimizer": lambda model: torch.optim.AdamW(model.parameters(), 1e-2)}, "optimizer ="),
    "an optimizer of fewer": (
        {},
        {"optimizer": lambda model: torch.optim.Adam(model[3].parameters(), 1e-2)},
        "optimizer",
    ),
    "a wider model": ({}, {"model": wider()}, "model ="),
    "another activation": ({}, {"model": with_relu()}, "model ="),
    "another dropout": ({}, {"model": toy_model(dropout=0.1)}, "model ="),
    "a projection after each step": ({}, {"after_step": flattened}, "after_step ="),
}


@pytest.mark.parametrize("first, second, what", OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_run_is_refused_by_name_and_changes_nothing(first, second, what, tmp_path):
    path = tmp_path / "run.pt"
    toy_run(path, **first)
    before = path.read_bytes()
    model = second.get("model", toy_model())
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"run\.pt belongs to another run \(.*{re.escape(what)}"):
        toy_run(path, **second, **({} if "model" in second else {"model": model}))
    assert path.read_bytes() == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_value_of_the_module_that_a_loss_refers_to_is_a_part_of_the_run(tmp_path, monkeypatch):
    toy_run(tmp_path / "run.pt", loss=tempered_loss)
    monkeypatch.setattr(sys.modules[__name__], "TEMPERATURE", 2.0)
    with pytest.raises(ValueError, match="step_loss ="):
        toy_run(tmp_path / "run.pt", loss=tempered_loss)


@pytest.mark.parametrize(
    "loss", [plain_loss, weighted(2.0), class_weights(1, 2, 3), Supervised(MulticlassSoftHKR(5.0, 0.5))]
)
def test_the_same_call_goes_on_also_with_the_objects_that_have_been_trained(loss, tmp_path):
    model, path = toy_model(), tmp_path / "run.pt"
    toy_run(path, model=model, loss=loss)
    weights = [parameter.clone() for parameter in model.parameters()]
    toy_run(path, model=model, loss=loss)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(tmp_path, forked):
    """The limit on the size of files stands for the end of the disk."""
    done = forked.run(FULL_DISK.format(path=str(tmp_path / "run.pt")), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 2
    assert {file.name for file in tmp_path.iterdir()} == {"run.pt"}


FULL_DISK = """
import resource, signal, sys
import torch
from torch import nn
from lipguide.training import Supervised, fit

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = nn.Linear(200, 100)

def fill(line):
    if line.startswith("step 4/"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1))

try:
    data, adam = (torch.rand(8, 200), torch.rand(8, 100)), torch.optim.Adam(model.parameters())
    fit(model, data, Supervised(nn.MSELoss()), adam, 6, 4, log_every=2, checkpoint={path!r}, report=fill)
except OSError as error:
    assert "run.pt could not be written" in str(error), error
else:
    sys.exit("no error")
"""


# --- pictures that are shifted


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), mirror=st.booleans(), height=st.integers(5, 8), width=st.integers(5, 8))
def test_shifted_pictures_and_masks_move_alike_and_what_comes_in_repeats_the_edge(seed, mirror, height, width):
    seen = []

    class Spy(nn.Module):
        def forward(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
            seen.extend(batch)
            return batch[0].sum()

    rows, columns = torch.arange(height)[:, None].expand(height, width), torch.arange(width).expand(height, width)
    where = torch.stack([rows, columns]).float().expand(5, 2, height, width)  # each pixel says where it came from
    mask = (rows * width + columns).expand(5, height, width)
    torch.manual_seed(seed)
    Shifted(Spy(), mirror=mirror)(None, (where, mask, torch.arange(5)))
    moved, moved_mask, labels = seen
    assert labels.tolist() == list(range(5))
    straight = moved[:, 1, 0, 0] <= moved[:, 1, 0, -1]
    assert straight.all() or mirror
    moved = torch.where(straight[:, None, None, None], moved, moved.flip(3))
    moved_mask = torch.where(straight[:, None, None], moved_mask, moved_mask.flip(2))
    assert (moved == moved[:1]).all()  # all of a batch alike
    known = moved_mask != -100
    assert torch.equal(moved_mask[known], (moved[:, 0] * width + moved[:, 1])[known].long())
    down, right = [
        next(d for d in range(-2, 3) if torch.equal((torch.arange(n) + d).clamp(0, n - 1).float(), line))
        for n, line in ((height, moved[0, 0, :, 0]), (width, moved[0, 1, 0, :]))
    ]
    inside = ((rows + down).clamp(0, height - 1) == rows + down) & (
        (columns + right).clamp(0, width - 1) == columns + right
    )
    assert torch.equal(known[0], inside)


def test_noise_comes_on_top_of_the_shift():
    seen = []

    def step(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        seen.append(batch[0])
        return batch[0].sum()

    for noise in (0.0, 0.2):
        torch.manual_seed(0)
        Shifted(step, noise=noise)(None, (torch.full((4, 3, 40, 40), 0.5),))
    assert torch.equal(seen[0], torch.full_like(seen[0], 0.5))
    assert (seen[1] - 0.5).std().item() == pytest.approx(0.2, rel=0.05)


def test_the_short_door_is_adam_with_one_cycle():
    ours, theirs = toy_model(), toy_model()
    loss = nn.CrossEntropyLoss()
    history = supervised(ours, toy_data(), loss, 1e-2, 12, 10, seed=3)
    adam = torch.optim.Adam(theirs.parameters(), 1e-2)
    fit(theirs, toy_data(), Supervised(loss), adam, 12, 10, "one-cycle", seed=3)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert history[-1]["step"] == 12 and not ours.training


# --- several processes

SCRIPT = """
import sys
import torch
from torch import distributed as dist
sys.path.insert(0, {tests!r})
from test_training import distributed_run
from lipguide.distributed import start

torch.set_num_threads(1)
device = start("cpu")
for name in {losses!r}:
    model, history, sizes = distributed_run(name, {folder!r} + "/" + name + ".pt")
    assert sizes == [4 - dist.get_rank()] * 15, sizes
    if dist.get_rank() == 0:
        torch.save((model.state_dict(), history[-1]["loss"]), {folder!r} + "/" + name + ".result")
dist.barrier()
dist.destroy_process_group()
"""
LOSSES = {"hkr": lambda: MulticlassHKR(3.0, 0.5), "soft": lambda: MulticlassSoftHKR(3.0, 0.5)}


class Counting(Supervised):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__(loss)
        self.sizes: list[int] = []

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.sizes.append(len(batch[0]))
        return super().forward(model, batch)


def distributed_run(name: str, checkpoint: str | None = None) -> tuple[nn.Module, list[dict[str, float]], list[int]]:
    """Batches of 7, so that two processes get 4 and 3 samples."""
    model, step_loss = toy_model(), Counting(LOSSES[name]())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    history = fit(model, toy_data(), step_loss, optimizer, 15, 7, checkpoint=checkpoint, log_every=5)
    return model, history, step_loss.sizes


def test_two_processes_under_torchrun_end_with_the_weights_of_one(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests"), folder=str(tmp_path), losses=list(LOSSES)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in LOSSES:
        expected, history, sizes = distributed_run(name)
        assert sizes == [7] * 15
        weights, loss = torch.load(tmp_path / f"{name}.result", weights_only=True)
        for key, value in expected.state_dict().items():
            torch.testing.assert_close(weights[key], value, rtol=1e-9, atol=1e-12)
        assert loss == pytest.approx(history[-1]["loss"], rel=1e-9)
        resumed, _, _ = distributed_run(name, str(tmp_path / f"{name}.pt"))  # one process reads what two have written
        for key, value in resumed.state_dict().items():
            assert torch.equal(weights[key], value)

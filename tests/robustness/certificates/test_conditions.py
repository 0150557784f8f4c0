"""The conditions of a certificate: models and pictures that are not what they are taken for."""

import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipguide import SLL, MaxMin, SLLLinear, export, lipschitz_bound, orthogonal, spectral
from lipguide.robustness.certificates import (
    checked_logits,
)
from tests.robustness.common import generator, lipschitz_network

SQRT2 = math.sqrt(2)
seeds = st.integers(0, 10**6)


def images(n: int = 8) -> Tensor:
    return torch.rand(n, 3, 2, 2, generator=generator(0))


def test_checked_logits_are_the_models_own():
    model = lipschitz_network(0).float()
    logits = checked_logits(model, images(50), batch_size=16)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), model(images(50)).detach(), atol=1e-5, rtol=0)
    assert next(model.parameters()).dtype == torch.float32


def test_normalisation_outside_the_model_is_caught():
    with pytest.raises(ValueError, match=r"pixels must lie in \[0, 1\]"):
        checked_logits(lipschitz_network(0).float(), (images() - 0.5) / 0.2)


class Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) / 0.2


def test_normalisation_inside_the_model_is_caught_unless_it_is_a_part_of_the_constant():
    model = nn.Sequential(Normalise(), lipschitz_network(0).float()).eval()
    with pytest.raises(ValueError, match="refuted by picture"):
        checked_logits(model, images())
    checked_logits(model, images(), lipschitz=5.0)


def test_head_of_larger_norm_is_caught_unless_its_rows_are_given():
    model = lipschitz_network(0).float()
    head = nn.Linear(4, 3, bias=False)
    nn.init.constant_(head.weight, 0.0)
    head.weight.data[0, 0], head.weight.data[1, 1] = 10.0, 10.0
    whole = nn.Sequential(model, head).eval()
    with pytest.raises(ValueError, match="refuted"):
        checked_logits(whole, images())
    checked_logits(whole, images(), rows=head.weight)


def test_constant_of_a_segmentation_network_is_probed_too():
    network = nn.Conv2d(3, 4, 1, bias=False).eval()
    nn.init.orthogonal_(network.weight.data.view(4, 3))
    assert checked_logits(network, images()).shape == (8, 4, 2, 2)
    network.weight.data *= 3
    with pytest.raises(ValueError, match="refuted"):
        checked_logits(network, images())


def test_training_mode_is_caught_and_dropout_named():
    model = nn.Sequential(lipschitz_network(0).float(), nn.Dropout(0.5)).eval()
    checked_logits(model, images())
    model[1].train()
    with pytest.raises(ValueError, match=r"'1' \(Dropout\) is in training mode"):
        checked_logits(model, images())


def test_a_slice_of_a_model_is_judged_by_its_parts():
    model = nn.Sequential(lipschitz_network(0).float(), nn.Dropout(0.5)).eval()
    assert model[:-1].training
    checked_logits(model[:-1], images())
    checked_logits(nn.Sequential(model[:-1]), images())
    model[0][1].train()
    with pytest.raises(ValueError, match=r"the model \(Sequential\) is in training mode"):
        checked_logits(model[:-1], images())


def test_a_sequential_whose_mode_something_looks_at_must_be_in_eval_mode():
    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if self.training else 1)

    part = lipschitz_network(0).float()
    hooked = nn.Sequential(part)
    hooked.register_forward_hook(lambda module, args, output: output * (2 if module.training else 1))
    for model in (Noisy(part), hooked):
        with pytest.raises(ValueError, match="the model .* is in training mode"):
            checked_logits(model, images())
        checked_logits(model.eval(), images())


def test_forgotten_rows_are_thought_of():
    head = nn.Linear(4, 3, bias=False)
    head.weight.data = 10 * torch.eye(3, 4)
    whole = nn.Sequential(lipschitz_network(0).float(), head).eval()
    with pytest.raises(ValueError, match=r"constant of the trunk.*rows=model\[-1\]\.weight"):
        checked_logits(whole, images())
    checked_logits(whole, images(), rows=head.weight)
    with pytest.raises(ValueError, match="refuted") as error:
        checked_logits(whole, images(), 0.01, head.weight)
    assert "trunk" not in str(error.value)
    named = nn.Sequential()
    named.trunk, named.head = whole
    with pytest.raises(ValueError, match="refuted.*rows=model"):
        checked_logits(named, images())


class TensorFloat(nn.Linear):
    """What TF32 does on a GPU: inputs and weights keep 10 bits of their fraction, sums are in float32."""

    def forward(self, x):
        if x.dtype == torch.float64:
            return super().forward(x)
        x, weight = ((v.view(torch.int32) & ~0x1FFF).view(torch.float32) for v in (x.contiguous(), self.weight))
        return nn.functional.linear(x, weight, self.bias)


@pytest.mark.parametrize("seed", range(5))
def test_tf32_is_caught_and_plain_float32_is_not(seed):
    torch.manual_seed(seed)
    for layer, caught in ((nn.Linear, False), (TensorFloat, True)):
        layers = [nn.Flatten(), *(nn.utils.parametrizations.orthogonal(layer(n, m)) for n, m in ((48, 32), (32, 10)))]
        model = nn.Sequential(*layers).eval()
        images = torch.rand(8, 3, 4, 4)
        if caught:
            with pytest.raises(ValueError, match="reduced precision"):
                checked_logits(model, images)
        else:
            checked_logits(model, images)


def test_reduced_precision_is_caught():
    model = lipschitz_network(0).float()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="reduced precision"):
        checked_logits(model, images())

    class CoarseWeights(nn.Linear):  # what TF32 does: float32 in and out, ten bits of mantissa in between
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float32:
                return nn.functional.linear(x.bfloat16(), self.weight.bfloat16()).float()
            return nn.functional.linear(x, self.weight)

    coarse = CoarseWeights(12, 12, bias=False)
    nn.init.orthogonal_(coarse.weight)
    with pytest.raises(ValueError, match="reduced precision"):
        checked_logits(nn.Sequential(nn.Flatten(), coarse).eval(), images())


def test_a_bound_is_not_taken_for_pictures_of_another_size():
    """The average over a picture of 2×2 has four times the constant of one over 8×8, and no gradient need tell."""
    torch.manual_seed(0)
    model = nn.Sequential(spectral(nn.Conv2d(3, 4, 1)), MaxMin(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    large, small = (lipschitz_bound(model, (3, side, side)) for side in (8, 2))
    assert small.value > 3.9 * large.value
    assert large.input_shape == (3, 8, 8)
    checked_logits(model, images(), small)
    with pytest.raises(ValueError, match=r"for inputs of shape \(3, 8, 8\), and the pictures are \(3, 2, 2\)"):
        checked_logits(model, images(), large)


@pytest.mark.parametrize("bad", [torch.zeros(0, 3, 2, 2), torch.zeros(2, 3, 2, 2, dtype=torch.uint8)])
def test_images_of_another_kind_are_refused(bad):
    with pytest.raises(ValueError, match="images must be"):
        checked_logits(lipschitz_network(0).float(), bad)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "cached": parametrize.cached,
    "enable_grad": torch.enable_grad,
}


@pytest.mark.parametrize("mode", MODES)
def test_conditions_are_checked_alike_whatever_the_caller_has_switched(mode):
    constrained = nn.Sequential(nn.Flatten(), spectral(nn.Linear(12, 8)), MaxMin(), spectral(nn.Linear(8, 3))).eval()
    scaled = nn.Sequential(Normalise(), constrained).eval()
    expected = checked_logits(constrained, images(), 1.001)
    with MODES[mode]():
        constrained(images())
        pictures = images()
        assert torch.equal(checked_logits(constrained, pictures, 1.001), expected)
        with pytest.raises(ValueError, match="refuted"):
            checked_logits(scaled, pictures, 1e-3)


def test_a_check_leaves_no_weights_behind_that_training_would_reuse():
    layer = spectral(nn.Linear(12, 3))
    model = nn.Sequential(nn.Flatten(), layer).eval()
    with parametrize.cached():
        checked_logits(model, images(), 1.001)
        model(images()).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None


@pytest.mark.parametrize("seed", range(3))
def test_certified_is_the_network_with_the_weights_that_it_has(seed):
    """SLL leaves room for the rounding of float32. In float64 it would not: four blocks came out 3e-5 apart."""
    torch.manual_seed(seed)
    blocks = [SLL(4, 8, 3) for _ in range(4)]
    model = nn.Sequential(*blocks, nn.Flatten(), SLLLinear(64, 32), orthogonal(nn.Linear(64, 10))).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    pictures = torch.rand(8, 4, 4, 4)
    logits = checked_logits(model, pictures, 1.001)
    assert torch.equal(logits, export(model).double()(pictures.double()))
    assert (logits - model(pictures)).abs().max() < 1e-6 * (1 + logits.abs().max())


class LouderInTraining(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 3 * weight if self.training else weight


def test_weights_that_were_cached_in_another_mode_are_noticed():
    layer = nn.Linear(12, 3)
    parametrize.register_parametrization(layer, "weight", LouderInTraining())
    model = nn.Sequential(nn.Flatten(), layer)
    checked_logits(model.eval(), images(), 10.0)
    with parametrize.cached():
        model.train()(images())
        with pytest.raises(ValueError, match="kept from another mode"):
            checked_logits(model.eval(), images(), 10.0)


class Says(nn.Module):
    """A classifier that answers the same to every picture."""

    def __init__(self, *answer: float) -> None:
        super().__init__()
        self.answer = torch.tensor(answer)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer.to(x) + 0 * x.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_named(bad):
    with pytest.raises(ValueError, match="output was NaN or infinite for 8 of 8"):
        checked_logits(Says(0.0, bad, 1.0).eval(), images())


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_a_constant_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match="lipschitz must be positive and finite"):
        checked_logits(lipschitz_network(0).float(), images(), bad)


def head_on(channels: int, **options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), nn.Conv2d(channels, 4, **options)).eval()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kernel_size": 1, "groups": 2}, "groups=2"),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}, "pads with replicate"),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, "pads with reflect"),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, "pads with circular"),
    ],
)
def test_rows_that_are_not_full_are_refused(options, message):
    model = head_on(2, **options)
    x = torch.rand(3, 2, 2, 2, generator=generator(0))
    with pytest.raises(ValueError, match=message):
        checked_logits(model, x, rows=model[1].weight)
    checked_logits(model, x, 100.0)  # without rows any head will do


def test_rows_of_a_flattened_patch_are_refused_for_they_hide_what_pixels_share():
    model = head_on(2, kernel_size=3, padding=1)
    x = torch.rand(3, 2, 4, 4, generator=generator(0))
    with pytest.raises(ValueError, match="hide its taps"):
        checked_logits(model, x, rows=model[1].weight.flatten(1))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ],
)
def test_full_rows_are_accepted(options):
    model = head_on(2, **options)
    x = torch.rand(3, 2, 4, 4, generator=generator(0))
    checked_logits(model, x, rows=model[1].weight)


class Shifted(nn.Module):
    def forward(self, logits):
        return logits - logits.logsumexp(1, keepdim=True)


class ChannelsLast(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize(
    "behind", [nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.AvgPool2d(2), nn.ReLU()]
)
def test_rows_of_a_head_that_is_not_the_end_are_refused(behind):
    head = head_on(2, kernel_size=1)
    model = nn.Sequential(*head, behind).eval()
    rows = model[1].weight.detach()
    for some in (rows, rows + torch.ones_like(rows[:1])):  # which stand for the same differences
        with pytest.raises(ValueError, match="the logits are not what the head '1' gives"):
            checked_logits(model, torch.rand(3, 2, 4, 4, generator=generator(0)), rows=some)


@pytest.mark.parametrize("behind", [nn.LogSoftmax(1), nn.Identity(), Shifted()])
def test_what_leaves_the_gaps_of_a_head_may_stand_behind_it(behind):
    head = head_on(2, kernel_size=1)
    model = nn.Sequential(*head, behind).eval()
    checked_logits(model, torch.rand(3, 2, 4, 4, generator=generator(0)), rows=model[1].weight)


def test_a_head_may_stand_in_other_places_than_torchs():
    flat = nn.Sequential(*head_on(2, kernel_size=1), nn.Flatten()).eval()
    checked_logits(flat, torch.rand(3, 2, 1, 1, generator=generator(0)), rows=flat[1].weight)
    dense = ChannelsLast(nn.Linear(2, 4)).eval()
    checked_logits(dense, torch.rand(3, 2, 4, 4, generator=generator(0)), rows=dense.head.weight)
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Flatten(), nn.Linear(3, 3)).eval()
    tied[0].weight = tied[2].weight
    checked_logits(tied, torch.rand(5, 3, generator=generator(0)), 3.0, rows=tied[2].weight)


@pytest.mark.parametrize("head", [nn.Linear(4, 3), nn.Conv2d(4, 3, 3, padding=1)])
def test_rows_of_another_head_are_refused(head):
    """Those of an earlier step of training, say, although no gradient on the pictures at hand refutes them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), head).eval()
    x = torch.rand(5, 4, *[3] * (head.weight.dim() - 2), generator=generator(0))
    checked_logits(model, x, 100.0, rows=head.weight)
    checked_logits(model, x, 100.0, rows=head.weight + 0.5)  # as far apart as the rows of the head
    with pytest.raises(ValueError, match="the head '1' .* has other rows than those that are given"):
        checked_logits(model, x, 100.0, rows=0.9 * head.weight)


@pytest.mark.parametrize("behind", [nn.AvgPool2d(2), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 4, 1)])
def test_where_rows_cannot_be_taken_the_error_says_to_leave_them_out(behind):
    """Sound they would be: an average of pixels, and the product of two layers. The whole constant does for both."""
    torch.manual_seed(0)
    model = nn.Sequential(*head_on(2, kernel_size=1), behind).eval()
    rows = model[1].weight
    if isinstance(behind, nn.Conv2d):
        rows = (behind.weight.flatten(1) @ rows.flatten(1))[:, :, None, None]
    x = torch.rand(3, 2, 4, 4, generator=generator(0))
    with pytest.raises(ValueError, match="Leave out rows, and give the constant of the whole network"):
        checked_logits(model, x, rows=rows)
    checked_logits(model, x, lipschitz_bound(model, (2, 4, 4)))


def test_a_batch_has_one_picture_or_more():
    with pytest.raises(ValueError, match="batch_size is 0"):
        checked_logits(lipschitz_network(0).float(), images(), batch_size=0)


class Hot(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def test_rows_do_not_speak_for_a_head_that_computes_something_else_with_them():
    """On these pictures no gradient tells: the trunk uses a tenth of its constant."""
    torch.manual_seed(0)
    x = torch.rand(5, 4, generator=generator(0))
    hot = nn.Sequential(nn.Identity(), Hot(4, 3)).eval()
    with pytest.raises(ValueError, match="the head '1' .Hot. changes what a layer of torch computes"):
        checked_logits(hot, x, 10.0, rows=hot[1].weight)
    hooked = nn.Sequential(nn.Identity(), nn.Linear(4, 3)).eval()
    hooked[1].register_forward_hook(lambda module, args, output: 3 * output)
    with pytest.raises(ValueError, match="it carries a hook"):
        checked_logits(hooked, x, 10.0, rows=hooked[1].weight)

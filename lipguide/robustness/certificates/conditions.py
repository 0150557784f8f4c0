"""The conditions of a certificate, checked on the network and the pictures at hand."""

from __future__ import annotations

from itertools import chain
from typing import SupportsFloat

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipguide.arguments import whole
from lipguide.bounds.walk import check_untouched
from lipguide.checks import HALF, check_eval, check_numbers, lipschitz_constant
from lipguide.layers.brick import computes_as
from lipguide.layers.export import uncached, without_parametrizations
from lipguide.robustness.certificates.radii import check_precision, slopes

__all__ = ["check_full_precision", "checked_logits", "in_float64"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
HEADS = (nn.Linear, *CONVOLUTIONS)
WITHOUT = "Leave out rows, and give the constant of the whole network"
OTHERS = (
    "has other rows than those that are given: give its weight as it is now, in eval mode. What is no weight of a "
    f"head, as a product of two layers, cannot be checked here. {WITHOUT}"
)
PROBED = 32  # pictures on which the network also runs in its own precision, and is differentiated
ROUNDING = 1e-5  # by which logits in float32 may differ from those in float64, relative to the largest


def checked_logits(
    model: nn.Module,
    images: Tensor,
    lipschitz: float | SupportsFloat = 1.0,
    rows: Tensor | None = None,
    batch_size: int = 256,
) -> Tensor:
    """The logits of `model` in float64, ready to be certified, or an error that says why they could not be.

    Checked are the conditions of a certificate: pixels in [0, 1] (so that `lipschitz` has to include the
    normalisation), evaluation mode (no dropout), logits that are numbers, full precision (the model's own logits agree
    with those that the same weights give in float64: no half-precision parameters, no autocast, no TF32), a head of
    full rows whose outputs are the logits, and, on the first 32 pictures, that no gradient exceeds what `lipschitz`
    allows. The last can refute a constant, never prove it: `lip.lipschitz_bound` does. Its bound is for pictures of
    one shape; given as it is, and not as a number, pictures of another one are refused.

    The certificate of these logits is that of the network in exact arithmetic. A network that then runs in float32 is
    another function, if only just: `lipguide.robustness.certificates.radii` says what its rounding takes away.

    Args:
        lipschitz, rows: as for `radius`.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2)).eval()
    >>> _ = nn.init.orthogonal_(model[1].weight), nn.init.orthogonal_(model[2].weight)
    >>> checked_logits(model, torch.rand(5, 1, 2, 2)).dtype
    torch.float64
    """
    _check_images(images)
    whole("batch_size", batch_size)
    check_eval(model, "certifying it")
    constant = lipschitz_constant(lipschitz)
    _check_shape(images, lipschitz)
    with torch.inference_mode(False):
        own = _own_logits(model, images[:PROBED])
        with uncached():  # what is remembered may be of another mode: then the two differ
            twin = in_float64(model)
            with torch.no_grad():
                logits = torch.cat([twin(batch.double()) for batch in images.split(batch_size)])
            _check_logits(logits, own)
            if rows is not None:
                _check_head(twin, images[:PROBED].double(), logits[:PROBED], rows)
            with torch.enable_grad():
                _try_to_refute(twin, images[:PROBED].double(), constant, rows)
    return logits


def in_float64(model: nn.Module) -> nn.Module:
    """A copy that computes in float64 with the very weights that the model computes with.

    They are those that its constraints give in the model's own precision, for which its bound was proved. Constraints
    that computed anew in float64 would give others: an SLL block leaves room for the rounding of float32, which float64
    does not need, and its V would come out larger by 3e-5.

    >>> linear = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2).eval())
    >>> torch.equal(in_float64(linear).weight, linear.weight.double())
    True
    """
    return without_parametrizations(model).double()


def check_full_precision(model: nn.Module, images: Tensor | None = None) -> None:
    """Raise ValueError for weights of a model, or pictures, in another precision than float32 or float64.

    >>> check_full_precision(nn.Linear(2, 2).half())
    Traceback (most recent call last):
    ...
    ValueError: certify in float32 or float64: weights (weight) of torch.float16 are too coarse for a certificate
    """
    if images is not None:
        check_precision(images, "pictures")
    for name, part in chain(model.named_parameters(), model.named_buffers()):
        if part.is_floating_point():
            check_precision(part, f"weights ({name})")


@torch.no_grad()
def _own_logits(model: nn.Module, images: Tensor) -> Tensor:
    """What the caller's model answers, with the weights that are cached if any are; the cache is left as it was."""
    cached = dict(parametrize._cache)
    try:
        return model(images)
    finally:
        parametrize._cache = cached


def _check_logits(logits: Tensor, own: Tensor) -> None:
    if logits.ndim < 2 or logits.shape[1] < 2:
        raise ValueError(f"logits {tuple(logits.shape)} must be (N, C, ...) with at least two classes")
    check_numbers(logits)
    probed = logits[: len(own)]
    error = (own.double() - probed).abs().max().item()
    if own.dtype in HALF or not error <= ROUNDING * (1 + probed.abs().max().item()):
        raise ValueError(
            f"the model's own logits ({own.dtype}) are up to {error:.2g} from those in float64: it runs in reduced "
            "precision (half-precision parameters, autocast or TF32), which no certificate covers, or with weights "
            "that parametrize.cached() kept from another mode"
        )


@torch.no_grad()
def _check_head(model: nn.Module, images: Tensor, logits: Tensor, rows: Tensor) -> None:
    """Refuse `rows` of a head whose classes look at different features, or look at one feature more than once; of one
    whose outputs are not the logits; and those that are not the head's."""
    heads = {part: name for name, part in model.named_modules() if isinstance(part, HEADS)}
    given = _that_give(logits, model, images, list(heads))
    for head in given:
        check_untouched(head)
        reason = _why_not(head, logits, rows)
        if reason:
            raise ValueError(f"the head {heads[head]!r} ({type(head).__name__}) {reason}")
    named = [repr(name) for head, name in heads.items() if _as_far_apart(head.weight, rows)]
    if named and not given:
        raise ValueError(
            f"the logits are not what the head {', '.join(named)} gives: something behind it changes the gaps between "
            f"classes, or repeats them, as up-sampling does, and rows says nothing of that. {WITHOUT}"
        )


def _that_give(logits: Tensor, model: nn.Module, images: Tensor, parts: list[nn.Module]) -> list[nn.Module]:
    """Which of some parts of a model give its logits."""
    found: list[nn.Module] = []

    def look(part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if _are_the_logits(output, logits):
            found.append(part)

    hooks = [part.register_forward_hook(look) for part in parts]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _are_the_logits(output: Tensor, logits: Tensor) -> bool:
    """Up to a shift of all classes alike, which a log-softmax makes, and up to where the classes stand."""
    if output.numel() != logits.numel():
        return False
    close = 1e-9 * (1 + float(logits.abs().max()))
    classes_last = output.movedim(-1, 1)  # of a dense head that is called pixel by pixel
    for part in (output, classes_last):
        if part.shape[:2] == logits.shape[:2]:
            apart = _gaps(part) - _gaps(logits)
            if float(apart.abs().max()) <= close:
                return True
    return False


def _gaps(logits: Tensor) -> Tensor:
    """(N, C, ...) to (N, C, P): of each class to the first one, one pixel for a classifier."""
    maps = logits.reshape(*logits.shape[:2], -1)
    return maps - maps[:, :1]


def _why_not(head: nn.Module, logits: Tensor, rows: Tensor) -> str:
    """Why these must not be given as the rows of this head; nothing if they may."""
    if not computes_as(head, *HEADS):
        return "changes what a layer of torch computes with its weight, so that rows says nothing of it: leave out rows"
    if isinstance(head, nn.Linear):
        return "" if _as_far_apart(head.weight, rows) else OTHERS
    if head.transposed:
        return "is transposed: its weight holds no row a class, so leave out rows"
    if head.groups > 1:
        return (
            f"has groups={head.groups}: its classes look at different features, so that the difference of two rows "
            "means nothing. Leave out rows, or take groups=1"
        )
    if rows.shape != head.weight.shape:
        return (
            f"has a weight {tuple(head.weight.shape)}: give it as it is, for rows {tuple(rows.shape)} hide its taps or "
            f"are not its own. {WITHOUT}"
        )
    if not _as_far_apart(head.weight, rows):
        return OTHERS
    if head.padding_mode == "zeros":
        return ""
    sides = [stride * outputs for stride, outputs in zip(head.stride, logits.shape[2:], strict=True)]
    spans = [(taps - 1) * step + 1 for taps, step in zip(head.kernel_size, head.dilation, strict=True)]
    all_different = all(span <= side for span, side in zip(spans, sides, strict=True))
    if max(spans) == 1 or (head.padding_mode == "circular" and all_different):
        return ""
    return (
        f"pads with {head.padding_mode} pixels: a class may look at one pixel more than once, and its row weighs more "
        "than rows says. Leave out rows, or pad with zeros"
    )


def _as_far_apart(weight: Tensor, rows: Tensor) -> bool:
    """Are the differences of two rows those of the weight? A part that all rows have alike does not matter."""
    weight, rows = (part.detach().double().flatten(1) for part in (weight, rows.to(weight.device)))
    if weight.shape != rows.shape:
        return False
    return torch.allclose(weight - weight[:1], rows - rows[:1], rtol=0, atol=1e-6 * float(weight.abs().max()))


def _try_to_refute(model: nn.Module, images: Tensor, lipschitz: float, rows: Tensor | None) -> None:
    """Hold the gradient of the gap between two classes against its bound, where the gap is smallest."""
    images = images.clone().requires_grad_()
    logits = model(images)
    logits = logits.reshape(*logits.shape[:2], -1)  # (N, C, P), one pixel for a classifier
    best, classes = logits.topk(2, dim=1)  # (N, 2, P)
    gap = best[:, 0] - best[:, 1]  # (N, P)
    pixel = gap.argmin(1, keepdim=True)  # (N, 1)
    (gradient,) = torch.autograd.grad(gap.gather(1, pixel).sum(), images)
    steepness = gradient.flatten(1).norm(dim=1)
    first, second = (classes[:, rank].gather(1, pixel).squeeze(1) for rank in (0, 1))
    allowed = slopes(logits.shape[1], lipschitz, rows, logits.device)[first, second]
    worst = int((steepness - allowed).argmax())
    if not steepness[worst] <= allowed[worst] * (1 + 1e-6):
        raise ValueError(
            f"lipschitz = {lipschitz} is refuted by picture {worst}: the gap between its two best classes grows by "
            f"{steepness[worst]:.4g} per unit of the input, and {allowed[worst]:.4g} was allowed. "
            f"{_what_may_be_wrong(model, rows)}"
        )


def _what_may_be_wrong(model: nn.Module, rows: Tensor | None) -> str:
    normalisation = "A normalisation of the input inside the model multiplies the constant by 1 / min(std)"
    children = list(model.named_children())
    if rows is not None or not children or not isinstance(children[-1][1], (nn.Linear, *CONVOLUTIONS[:2])):
        return normalisation
    name = children[-1][0]
    head = "model[-1]" if isinstance(model, nn.Sequential) else f"model.{name}"
    return f"Is this the constant of the trunk, all but the last layer? Then pass rows={head}.weight. {normalisation}"


def _check_shape(images: Tensor, lipschitz: float | SupportsFloat) -> None:
    """A `Bound` knows for which inputs it was made; a number does not."""
    made_for = getattr(lipschitz, "input_shape", None)
    if made_for is not None and images.shape[1:] != made_for:
        raise ValueError(
            f"lipschitz is a bound for inputs of shape {made_for}, and the pictures are {tuple(images.shape[1:])}: an "
            "average over a smaller picture has a larger constant. Take lip.lipschitz_bound for the shape of these"
        )


def _check_images(images: Tensor) -> None:
    if len(images) == 0 or not images.is_floating_point():
        raise ValueError(f"images must be a batch of floating-point pixels, not {tuple(images.shape)} {images.dtype}")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"pixels must lie in [0, 1], and these lie in [{low:.4g}, {high:.4g}]: give the pictures as they are, make "
            "the normalisation the first layer of the model, and its 1 / min(std) a factor of lipschitz"
        )

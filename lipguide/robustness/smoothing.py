"""Randomized smoothing of a segmentation network: SegCertify (Fischer et al., 2021), for comparison.

The smoothed network gives pixel p the class that the network gives it most often under Gaussian noise of deviation σ.
If that class has a probability above τ > 1/2, no perturbation of L2 norm below R = σ Φ⁻¹(τ) can change it. The
probability is not known: it is tested on draws, for all pixels of a picture at once, with Holm's correction, so that
with probability 1 − α *all* labels given for a picture are right to be given. Pixels that fail the test are abstained
from. The certificate is of the smoothed network, with a confidence; that of a 1-Lipschitz network is certain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from lipguide.arguments import whole
from lipguide.checks import IGNORE, check_eval, check_numbers, class_indices
from lipguide.robustness.scores import counted, labelled

__all__ = ["ABSTAIN", "Votes", "holm", "noisy_copies", "segcertify", "smoothed_miou", "smoothing_radius", "votes"]

ABSTAIN = -1


@dataclass(frozen=True)
class Votes:
    """guess: (N, H, W) the class guessed from the first draws; hits: (N, H, W) how many of the further ones agree."""

    guess: Tensor
    hits: Tensor
    draws: int
    sigma: float


@torch.no_grad()
def votes(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    sigma: float,
    guesses: int = 10,
    draws: int = 100,
    batch_size: int = 50,
    generator: torch.Generator | None = None,
) -> Votes:
    """Ask the network about noisy copies of each picture: first to guess a class a pixel, then to count who agrees.

    Args:
        model: (N, 3, H, W) to logits (N, C, H, W), in eval mode; noisy pixels leave [0, 1].
        sigma: standard deviation of the noise a pixel.
        guesses, draws: copies of a picture for the one and for the other; they must not be the same ones.

    >>> bright = torch.nn.Conv2d(1, 2, 1).eval()
    >>> bright.weight.data, bright.bias.data = torch.tensor([[1.0], [-1.0]])[:, :, None, None], torch.tensor([0.0, 1.0])
    >>> votes(bright, torch.tensor([0.1, 0.9]).reshape(1, 1, 1, 2), sigma=0.05, draws=20).hits
    tensor([[[20, 20]]])
    """
    _check_sigma(sigma)
    if len(images) == 0:
        raise ValueError("0 pictures have no votes: give one or more")
    for name, value in (("guesses", guesses), ("draws", draws), ("batch_size", batch_size)):
        whole(name, value)
    check_numbers(images, "a picture")
    if isinstance(model, torch.nn.Module):
        check_eval(model, "it votes")
    generator = generator or torch.Generator(images.device).manual_seed(0)

    def labels(image: Tensor, copies: int) -> Tensor:
        parts = []
        for noisy in noisy_copies(image, copies, sigma, batch_size, generator):
            logits = model(noisy)
            check_numbers(logits)
            parts.append(logits.argmax(1))
        return torch.cat(parts)

    guess = torch.stack([labels(image, guesses).mode(0).values for image in images])
    hits = [(labels(image, draws) == g).sum(0) for image, g in zip(images, guess, strict=True)]
    return Votes(guess, torch.stack(hits), draws, sigma)


def noisy_copies(
    image: Tensor, copies: int, sigma: float, batch_size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Batches (n, 3, H, W) of a picture under Gaussian noise of deviation sigma, `copies` pictures in all.

    >>> [len(batch) for batch in noisy_copies(torch.zeros(3, 2, 2), 5, 0.1, 2, torch.Generator())]
    [2, 2, 1]
    """
    for first in range(0, copies, batch_size):
        count = min(batch_size, copies - first)
        noise = torch.randn(count, *image.shape, device=image.device, dtype=image.dtype, generator=generator)
        yield image + sigma * noise


def segcertify(cast: Votes, tau: float = 0.75, alpha: float = 0.001) -> Tensor:
    """Labels (N, H, W) that hold within `smoothing_radius(sigma, tau)`, and `ABSTAIN` where the test failed.

    For each picture, all its labels together are wrongly given with probability alpha at most.

    >>> cast = Votes(torch.tensor([[[7, 7]]]), torch.tensor([[[100, 80]]]), draws=100, sigma=0.25)
    >>> segcertify(cast).tolist()
    [[[7, -1]]]
    """
    _check_tau(tau)
    chance = _binomial_tail(cast.draws, tau).to(cast.hits.device)[cast.hits]  # of so many hits if τ were the truth
    given = holm(chance.flatten(1), alpha).reshape(cast.guess.shape)
    return torch.where(given, cast.guess, ABSTAIN)


def smoothing_radius(sigma: float, tau: float) -> float:
    """R = σ Φ⁻¹(τ): below this L2 norm no perturbation can change a label that `segcertify` gives.

    >>> round(smoothing_radius(0.25, 0.75), 4)
    0.1686
    """
    return _check_sigma(sigma) * NormalDist().inv_cdf(_check_tau(tau))


def holm(p_values: Tensor, alpha: float) -> Tensor:
    """Which of each row's hypotheses to reject, with a probability of alpha at most that one of them is true.

    Holm's step-down test: the k-th smallest of P values is held against alpha / (P − k + 1), until the first fails.

    >>> holm(torch.tensor([[0.01, 0.04, 0.03, 0.005]]), alpha=0.05)
    tensor([[ True, False, False,  True]])
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is a probability between 0 and 1, not {alpha}")
    ordered, order = p_values.double().sort(1)
    count = p_values.shape[1]
    passed = ordered <= alpha / torch.arange(count, 0, -1, device=p_values.device, dtype=torch.float64)
    return torch.zeros_like(passed).scatter(1, order, passed.long().cumprod(1).bool())


def smoothed_miou(labels: Tensor, masks: Tensor, classes: int, ignore_index: int = IGNORE) -> Tensor:
    """Lower bound of each picture's mIoU, over the classes of its mask, within the radius of `segcertify`: (N,).

    A label that was given cannot change. The pixels without one go, for each class by itself, where they hurt it most.

    >>> smoothed_miou(torch.tensor([[[0, 0, ABSTAIN, 1]]]), torch.tensor([[[0, 0, 0, 1]]]), classes=2)
    tensor([0.5833], dtype=torch.float64)
    """
    given, decided = class_indices(labels, ABSTAIN)
    given, truth, _ = counted(given, masks, ignore_index, classes)
    _, counts = labelled(masks, ignore_index)
    given, truth, decided, counts = (part.flatten(1) for part in (given, truth, decided, counts))
    bounds = []
    for c in range(classes):
        mine = counts & (truth == c)
        correct = (mine & decided & (given == c)).sum(1)
        claimed = (counts & ~mine & ((given == c) | ~decided)).sum(1)
        bounds.append(torch.where(mine.any(1), correct / (mine.sum(1) + claimed).clamp(min=1).double(), math.nan))
    return torch.stack(bounds).nanmean(0)


def _check_sigma(sigma: float) -> float:
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, not {sigma}")
    return sigma


def _check_tau(tau: float) -> float:
    if not 0.5 < tau < 1:
        raise ValueError(f"tau is a probability between 1/2 and 1, not {tau}: below, another class could win")
    return tau


def _binomial_tail(draws: int, chance: float) -> Tensor:
    """Entry k, for k = 0 to draws: the probability of k hits or more. Summed from the small end, rounded up."""
    k = torch.arange(draws + 1, dtype=torch.float64, device="cpu")
    n = torch.tensor(float(draws), dtype=torch.float64, device="cpu")
    log_ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    each = (log_ways + k * math.log(chance) + (n - k) * math.log1p(-chance)).exp()
    return (each.flip(0).cumsum(0).flip(0) * (1 + 1e-9)).clamp(max=1.0)

"""How like SVHN is SHN? Everything that can be measured where SVHN's pictures are at hand: what networks read and find
on real pictures that saw synthetic ones alone, and figures of the pictures that need no label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipguide.book.transfer import SYN_DIGITS, logits_of, share_read, train_reader
from lipguide.data.digits import Digits, digits
from lipguide.data.shn import SyntheticHouseNumbers
from lipguide.data.shn.cache import content_hash
from lipguide.data.shn.colours import LUMA
from lipguide.data.shn.difficulty import Difficulty
from lipguide.data.svhn import SVHN
from lipguide.tasks.detection.boxes import unit_range
from lipguide.tasks.detection.data import Split, load_split
from lipguide.tasks.detection.scores import detections, score
from lipguide.tasks.harness import trained

__all__ = ["CLASSIFIER", "DETECTOR", "SHARES", "likeness", "looks", "report"]

CLASSIFIER = "classification-ordinary"
DETECTOR = "tinier-ssd-naive"
SHARES = (5, 25, 50, 75, 95)  # the percentiles of `looks`


def looks(images: Tensor) -> dict[str, list[float]]:
    """What crops look like, as percentiles over the crops of six figures, none of which needs a label.

    Brightness and colourfulness are means over a crop; contrast is the distance between its 5th and its 95th percentile
    of brightness; sharpness is its steepest slope (98th percentile) in units of the contrast; grain is the median
    distance of a pixel to the mean of its four neighbours; "dark on light" is mean minus median in units of the
    deviation, below zero where the larger part is the brighter one.

    Args:
        images: (N, 3, H, W) in [0, 1].

    >>> looks(torch.full((2, 3, 8, 8), 0.5))["brightness"][0]
    0.5
    """
    grey = (images * torch.from_numpy(LUMA).float()[:, None, None]).sum(1)  # (N, H, W)
    flat = grey.flatten(1)
    low, high = torch.quantile(flat, torch.tensor([0.05, 0.95]), dim=1)
    contrast = high - low
    across, down = grey.diff(dim=2)[:, 1:], grey.diff(dim=1)[:, :, 1:]
    steepest = torch.quantile((across**2 + down**2).sqrt().flatten(1), 0.98, dim=1)
    neighbours = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    grain = (grey[:, 1:-1, 1:-1] - neighbours / 4).abs().flatten(1).median(dim=1).values
    figures = {
        "brightness": flat.mean(1),
        "colourfulness": (images.amax(1) - images.amin(1)).flatten(1).mean(1),
        "contrast": contrast,
        "sharpness": steepest / contrast.clamp(min=1e-3),
        "grain": grain,
        "dark on light": (flat.mean(1) - flat.median(dim=1).values) / flat.std(1).clamp(min=1e-3),
    }
    where = torch.tensor(SHARES) / 100
    return {name: [round(v, 5) for v in torch.quantile(f, where).tolist()] for name, f in figures.items()}


def distance(ours: list[float], real: list[float]) -> float:
    """The largest difference of two lists of percentiles, in units of the real one's spread.

    >>> distance([0.0, 1.0, 2.0], [0.0, 1.0, 4.0])
    0.5
    """
    spread = max(real[-1] - real[0], 1e-9)
    return max(abs(a - b) for a, b in zip(ours, real, strict=True)) / spread


def _log_loss(logits: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy at the temperature that suits best: less noisy than the accuracy on few digits."""
    losses = [F.cross_entropy(logits.double() / (0.5 + 0.1 * k), labels).item() for k in range(46)]
    return min(losses)


def _read(model: nn.Module, data: Digits, device: str | torch.device) -> dict[str, float]:
    logits = logits_of(model, data, device)
    return {"accuracy": 100 * share_read(logits, data), "log_loss": _log_loss(logits, data.labels)}


@torch.no_grad()
def _find(model: nn.Module, scenes: Split) -> dict[str, float]:
    scores = score(detections(model, unit_range(scenes.images)), scenes.targets)
    return {"map50": scores.map50, "recall": scores.recall}


def likeness(
    svhn: str | Path,
    split: str = "test",
    size: int | None = None,
    epochs: int = 12,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """All figures: a small reader trained here on `size` synthetic scenes, the classifier and the detector that ship
    (trained on synthetic ones), and the looks; each on real pictures and on synthetic test pictures.

    Args:
        svhn: the folder that holds the split.
        split: of the real pictures.
        size: synthetic scenes that the reader learns from, and the most that are tested on; None for all.
        epochs: of the reader's training.

    >>> likeness("nowhere")
    Traceback (most recent call last):
    FileNotFoundError: nowhere/test is missing: get SVHN with `python -m lipguide data svhn --root nowhere`
    """
    folder = SVHN(svhn, split)
    twin, lessons = (SyntheticHouseNumbers(part, size, seed) for part in ("test", "train"))
    tests = {"svhn": digits(folder), "shn": digits(twin)}
    taught = digits(lessons)
    reader = train_reader(taught, epochs, device, seed)
    classifier, _ = trained(CLASSIFIER, device)
    detector, _ = trained(DETECTOR, device)
    scenes = {"svhn": load_split(split, None, seed, torch.device(device), svhn)}
    scenes["shn"] = load_split("test", size, seed, torch.device(device))
    return {
        "split": split,
        "hash": content_hash("train", seed, Difficulty()),
        "scenes": {"svhn": len(folder), "shn": len(twin), "lessons": len(lessons)},
        "digits": {name: len(data.labels) for name, data in tests.items()},
        "windows": {name: len(part.images) for name, part in scenes.items()},
        "syn_digits": 100 * SYN_DIGITS,
        "reader": {name: _read(reader, data, device) for name, data in tests.items()},
        "classifier": {name: _read(classifier, data, device) for name, data in tests.items()},
        "detector": {name: _find(detector, part) for name, part in scenes.items()},
        "looks": {"svhn": looks(tests["svhn"].images), "shn": looks(taught.images[:20000])},
    }


def report(found: dict[str, Any]) -> str:
    """The figures as a table to print.

    Args:
        found: what `likeness` returns.

    >>> percentiles = {"svhn": {"grain": [0.0, 1.0]}, "shn": {"grain": [0.0, 0.5]}}
    >>> one = {"svhn": {"accuracy": 80.0, "log_loss": 0.6}, "shn": {"accuracy": 90.0, "log_loss": 0.3}}
    >>> two = {"svhn": {"map50": 70.0, "recall": 75.0}, "shn": {"map50": 80.0, "recall": 85.0}}
    >>> found = {"split": "test", "digits": {"svhn": 9, "shn": 8}, "windows": {"svhn": 4, "shn": 3}, "reader": one,
    ...          "classifier": one, "detector": two, "looks": percentiles, "syn_digits": 86.9}
    >>> print(report(found).splitlines()[1])
    small network, digits read (%)                                80.00      90.00
    """
    row = "{:56s}{:>11s}{:>11s}".format
    lines = [row("trained on synthetic house numbers alone", f"SVHN {found['split']}", "SHN test")]
    for title, name, figure in (
        ("small network, digits read (%)", "reader", "accuracy"),
        ("small network, log loss", "reader", "log_loss"),
        (f"{CLASSIFIER}, digits read (%)", "classifier", "accuracy"),
        (f"{CLASSIFIER}, log loss", "classifier", "log_loss"),
        (f"{DETECTOR}, mAP at 0.5, number view (%)", "detector", "map50"),
        (f"{DETECTOR}, recall (%)", "detector", "recall"),
    ):
        lines.append(row(title, *(f"{found[name][data][figure]:.2f}" for data in ("svhn", "shn"))))
    for title, name in (("digits", "digits"), ("scenes of the number view", "windows")):
        lines.append(row(title, *(str(found[name][data]) for data in ("svhn", "shn"))))
    lines.append(f"a network trained on SYN DIGITS reads {found['syn_digits']:.1f} % (published, DIRT-T table 1)")
    lines.append(row("looks of crops: largest difference of percentiles / spread", "", "SHN"))
    for name, real in found["looks"]["svhn"].items():
        lines.append(row(f"  {name}", "", f"{distance(found['looks']['shn'][name], real):.2f}"))
    return "\n".join(lines)

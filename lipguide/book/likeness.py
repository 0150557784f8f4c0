"""How like SVHN is each version of SHN? Everything that can be measured where SVHN's pictures are at hand: what
networks read and find on real pictures that saw synthetic ones alone, and figures of the pictures that need no label.

Every network is trained on every version, but where weights ship that were. What is trained is kept in a folder, with
its checkpoint while it trains, so that a command that was interrupted goes on where it stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipguide.book.transfer import SYN_DIGITS, logits_of, share_read, small_reader, train_reader
from lipguide.data.digits import Digits, digits
from lipguide.data.shn import SyntheticHouseNumbers
from lipguide.data.shn.cache import content_hash
from lipguide.data.shn.colours import LUMA
from lipguide.data.shn.difficulty import Difficulty
from lipguide.data.shn.looks import DEFAULT, LOOKS
from lipguide.data.svhn import SVHN
from lipguide.files import write_json
from lipguide.layers.export import to_be_loaded
from lipguide.tasks.detection.attacks import attack_l2
from lipguide.tasks.detection.boxes import unit_range
from lipguide.tasks.detection.data import Split, load_split
from lipguide.tasks.detection.evaluation import EPSILON
from lipguide.tasks.detection.scores import Score, detections, score
from lipguide.tasks.harness import recipe_of, train_by, trained
from lipguide.tasks.task import Recipe
from lipguide.tasks.weights import fingerprint, load, made_as, save

__all__ = ["CLASSIFIER", "DETECTOR", "SHARES", "Plan", "distance", "gain", "likeness", "looks", "report"]

logger = logging.getLogger(__name__)
CLASSIFIER = "classification-ordinary"
DETECTOR = "tinier-ssd-naive"
SHARES = (5, 25, 50, 75, 95)  # the percentiles of `looks`
Train = Callable[[Path], tuple[nn.Module, dict[str, Any]]]  # from where its checkpoint is kept


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


@dataclass(frozen=True)
class Plan:
    """How much is measured, and how long networks learn for it; None for as long as the recipes say.

    Args:
        versions: of the twin.
        size: the most synthetic scenes of the test that anything is measured on.
        lessons: scenes that the small reader learns from.
        epochs: how often it sees them.
        classifier_steps: of a classifier that is trained here; 0 where none is to be.
        detector_steps: of a detector, likewise.
        seeds: by how many seeds the classifier learns from each version.
        attacked: the most scenes that are attacked.
        attack_steps: of an attack.
    """

    versions: Sequence[int] = tuple(LOOKS)
    size: int | None = 2000
    lessons: int = 12_000
    epochs: int = 12
    classifier_steps: int | None = None
    detector_steps: int | None = None
    seeds: int = 1
    attacked: int = 250
    attack_steps: int = 20


def likeness(
    svhn: str | Path,
    split: str = "test",
    folder: str | Path = Path("study", "likeness"),
    plan: Plan | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of all versions: what a small reader, the ordinary classifier and the naive detector make of real
    pictures and of the test pictures of each version, by the version that they have learnt from; and the looks.

    Args:
        svhn: the folder that holds the split.
        split: of the real pictures.
        folder: keeps what is trained.

    >>> likeness("nowhere")
    Traceback (most recent call last):
    FileNotFoundError: nowhere/test is missing: get SVHN with `python -m lipguide data svhn --root nowhere`
    """
    real = SVHN(svhn, split)
    plan, folder, device = plan or Plan(), Path(folder), torch.device(device)
    folder.mkdir(parents=True, exist_ok=True)
    twins = {
        f"shn{version}": SyntheticHouseNumbers("test", plan.size, seed, version=version) for version in plan.versions
    }
    tests = {"svhn": digits(real)} | {name: digits(twin) for name, twin in twins.items()}
    scenes = {"svhn": load_split(split, None, seed, device, svhn)}
    scenes |= {name: load_split("test", plan.size, seed, device, version=twin.version) for name, twin in twins.items()}
    read: dict[str, Any] = {"detector": {}, "classifier": {}, "reader": {}, "classifiers": {}}
    right: dict[int, Tensor] = {}  # what classifiers read right, by version: (networks, digits)
    for name, twin in twins.items():
        for kind, found in _networks(twin.version, plan, folder, device, seed):
            model, run = found
            figures = {"run": run}
            for what in tests:
                pictures = scenes[what] if kind == "detector" else tests[what]
                figures[what] = _once(folder / f"{kind}-{name}-{what}.json", model, pictures, plan)
            read[kind][name] = figures
            if kind == "classifier":
                read["classifiers"][name], right[twin.version] = _by_seeds(
                    [model, *_further(twin.version, plan, folder, device, seed)], tests["svhn"]
                )
    seen = {name: looks(data.images[:20_000]) for name, data in tests.items()}
    return {
        "data": {"name": f"SVHN, {split}, {len(real)} pictures", "hash": scenes["svhn"].hash},
        "split": split,
        "plan": asdict(plan),
        "hash": {name: content_hash("train", seed, Difficulty(), twin.version) for name, twin in twins.items()},
        "pictures": {"svhn": len(real)} | {name: len(twin) for name, twin in twins.items()},
        "digits": {name: len(data.labels) for name, data in tests.items()},
        "windows": {name: len(part.images) for name, part in scenes.items()},
        "syn_digits": 100 * SYN_DIGITS,
        **read,
        "gain": {f"shn{one}": gain(right[min(right)], right[one]) for one in sorted(right)[1:]},  # over the earliest
        "looks": seen,
        "difference": {name: {k: distance(v, seen["svhn"][k]) for k, v in seen[name].items()} for name in twins},
    }


# What is trained


def _networks(
    version: int, plan: Plan, folder: Path, device: torch.device, seed: int
) -> Iterator[tuple[str, tuple[nn.Module, dict[str, Any]]]]:
    """What has learnt from a version, one after the other, each with its run."""
    for kind, name, steps in (
        ("detector", DETECTOR, plan.detector_steps),
        ("classifier", CLASSIFIER, plan.classifier_steps),
    ):
        if version == DEFAULT or steps != 0:
            yield kind, _taught(name, version, steps, folder, device, seed)
    yield "reader", _reader(version, plan, folder, device, seed)


def _reader(
    version: int, plan: Plan, folder: Path, device: torch.device, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The small reader that has learnt from a version."""
    setting = {"lessons": plan.lessons, "epochs": plan.epochs, "seed": seed}

    def train(checkpoint: Path) -> tuple[nn.Module, dict[str, Any]]:
        lessons = digits(SyntheticHouseNumbers("train", plan.lessons, seed, version=version))
        model = train_reader(lessons, plan.epochs, device, seed, checkpoint=checkpoint)
        return model, setting | {"digits": len(lessons.labels)}

    return _learnt(f"small-reader-{version}", setting, train, small_reader(), folder, device)


def _further(version: int, plan: Plan, folder: Path, device: torch.device, seed: int) -> list[nn.Module]:
    """Classifiers of the next seeds: each has its own first weights and its own order of the same digits."""
    seeds = 1 if plan.classifier_steps == 0 else plan.seeds
    steps = plan.classifier_steps
    return [_taught(CLASSIFIER, version, steps, folder, device, seed, again)[0] for again in range(1, seeds)]


def _taught(
    name: str, version: int, steps: int | None, folder: Path, device: torch.device, seed: int, again: int = 0
) -> tuple[nn.Module, dict[str, Any]]:
    """A network of a recipe that has learnt from a version: the one that ships, or else one that is trained here.

    Args:
        again: which training it is, each by the next seed; the first is 0.
    """
    task, recipe = recipe_of(name)
    if version == DEFAULT and not again:
        model, run = trained(name, device)
        return model, _told(run, recipe)
    recipe = replace(recipe, data=f"house-numbers-{version}")
    steps = recipe.steps if steps is None else steps

    def train(checkpoint: Path) -> tuple[nn.Module, dict[str, Any]]:
        return train_by(task, recipe, device, seed + again, steps, checkpoint)

    plain = to_be_loaded(task.network(recipe))
    file = f"{name}-{version}-{again}" if again else f"{name}-{version}"
    model, run = _learnt(file, {"steps": steps}, train, plain, folder, device)
    return model, _told(run, recipe)


def _learnt(
    name: str, setting: dict[str, Any], train: Train, plain: nn.Module, folder: Path, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """What an earlier call has trained, or else what `train` gives now, with its run.

    Args:
        plain: a network without constraints that takes the weights.
    """
    if not made_as(folder / f"{name}.safetensors", setting):
        logger.info("%s: %s", name, setting)
        checkpoint = folder / f".{name}"
        save(name, *train(checkpoint), folder)
        checkpoint.unlink(missing_ok=True)
    run = load(name, plain, folder)
    return plain.eval().requires_grad_(False).to(device), run


def _told(run: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What the figures say of a training."""
    data = run["data"] if isinstance(run["data"], str) else run["data"]["name"]
    return {"steps": run["steps"], "batch_size": recipe.batch_size, "data": data, "seconds": run["seconds"]}


# What is measured


def _once(path: Path, model: nn.Module, pictures: Digits | Split, plan: Plan) -> dict[str, float]:
    """The figures of a network on pictures: those that an earlier call left, or else those that are measured now."""
    weights, images = fingerprint(*model.state_dict().values()), fingerprint(pictures.images)
    setting = {"weights": weights, "images": images, "attacked": plan.attacked, "attack_steps": plan.attack_steps}
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.get("setting") != setting:
        found = _find(model, pictures, plan) if isinstance(pictures, Split) else _read(model, pictures)
        known = {"setting": setting, "figures": found}
        write_json(path, known)
        logger.info("%s: %s", path.stem, found)
    return known["figures"]


def _log_loss(logits: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy at the temperature that suits best: less noisy than the accuracy on few digits."""
    losses = [F.cross_entropy(logits.double() / (0.5 + 0.1 * k), labels).item() for k in range(46)]
    return min(losses)


def _read(model: nn.Module, data: Digits) -> dict[str, float]:
    return _reading(logits_of(model, data, next(model.parameters()).device), data)


def _reading(logits: Tensor, data: Digits) -> dict[str, float]:
    return {"accuracy": 100 * share_read(logits, data), "log_loss": _log_loss(logits, data.labels)}


def _by_seeds(networks: list[nn.Module], data: Digits) -> tuple[dict[str, list[float]], Tensor]:
    """The figures of some networks on the same digits, and what each reads right: (networks, digits)."""
    logits = [logits_of(model, data, next(model.parameters()).device) for model in networks]
    readings = [_reading(one, data) for one in logits]
    figures = {what: [reading[what] for reading in readings] for what in readings[0]}
    right = torch.stack([(one.argmax(dim=1) == data.labels).double() for one in logits])
    return figures, right


def gain(before: Tensor, after: Tensor) -> dict[str, float]:
    """How many points more of the same digits are read, and the standard error of that, digits being independent.

    Args:
        before: what the networks of one version read right, (networks, digits).
        after: the same of another.

    >>> gain(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]]))
    {'points': 50.0, 'error': 50.0}
    """
    points = 100 * (after.mean(0) - before.mean(0))
    return {"points": float(points.mean()), "error": float(points.std() / len(points) ** 0.5)}


def _find(model: nn.Module, scenes: Split, plan: Plan) -> dict[str, float]:
    """Clean on all scenes; under an attack, and clean once more, on the first of them."""
    few = scenes.part(slice(plan.attacked))
    pictures = unit_range(few.images)
    moved = attack_l2(model, pictures, few.targets, EPSILON, steps=plan.attack_steps)
    clean, attacked = _scored(model, unit_range(scenes.images), scenes), _scored(model, moved, few)
    return {
        "map50": clean.map50,
        "recall": clean.recall,
        "attacked": len(few.images),
        "map50_of_attacked": _scored(model, pictures, few).map50,
        "pgd_map50": attacked.map50,
    }


@torch.no_grad()
def _scored(model: nn.Module, pictures: Tensor, scenes: Split) -> Score:
    return score(detections(model, pictures), scenes.targets)


def report(found: dict[str, Any]) -> str:
    """The figures as a table to print: a column for each set of pictures, a row for each network and what it learnt.

    Args:
        found: what `likeness` returns.

    >>> read = {"shn2": {"svhn": {"accuracy": 80.0}, "shn2": {"accuracy": 90.0}}}
    >>> seen = {"map50": 70.0, "pgd_map50": 40.0}
    >>> found = {"split": "test", "digits": {"svhn": 9, "shn2": 8}, "windows": {"svhn": 4, "shn2": 3}, "reader": read,
    ...          "classifier": read, "detector": {"shn2": {"svhn": seen, "shn2": seen}}, "syn_digits": 86.9,
    ...          "classifiers": {"shn2": {"accuracy": [80.0]}}, "difference": {"shn2": {"grain": 0.5}}}
    >>> print(report(found).splitlines()[1])
    small reader, learnt from shn2, digits read (%)                   80.00      90.00
    """
    sets = list(found["digits"])
    row = ("{:60s}" + "{:>11s}" * len(sets)).format
    lines = [row("", *(f"SVHN {found['split']}" if name == "svhn" else f"{name} test" for name in sets))]
    for title, network, figure, says in (
        ("small reader", "reader", "accuracy", "digits read (%)"),
        (CLASSIFIER, "classifier", "accuracy", "digits read (%)"),
        (DETECTOR, "detector", "map50", "mAP (%)"),
        (DETECTOR, "detector", "pgd_map50", "attacked (%)"),
    ):
        for taught, seen in found[network].items():
            values = (f"{seen[name][figure]:.2f}" for name in sets)
            lines.append(row(f"{title}, learnt from {taught}, {says}", *values))
    for taught, seen in found["classifiers"].items():
        read = seen["accuracy"]
        if len(read) > 1:
            what = f"{CLASSIFIER}, by {len(read)} seeds, from {taught}, read (%)"
            lines.append(row(what, f"{min(read):.1f}-{max(read):.1f}", *("" for _ in sets[1:])))
    for title, name in (("digits", "digits"), ("scenes of the number view", "windows")):
        lines.append(row(title, *(str(found[name][data]) for data in sets)))
    lines.append(f"a network trained on SYN DIGITS reads {found['syn_digits']:.1f} % (published, DIRT-T table 1)")
    lines.append(row("looks of crops: largest difference / spread", "", *found["difference"]))
    for name in next(iter(found["difference"].values())):
        lines.append(row(f"  {name}", "", *(f"{one[name]:.2f}" for one in found["difference"].values())))
    return "\n".join(lines)

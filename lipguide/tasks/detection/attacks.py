r"""Attacks on detectors, within an L2 ball around each picture.

The training loss is what the case study ascends, and it is a weak objective: most of it is about priors that matter to
no detection. The three attacks of the guide aim at what a detector says:

* *vanish*: for each object, lower the score of its class at every prior whose box could still match it;
* *fabricate*: raise the score of any class where no object is;
* *mislabel*: at the priors that find an object, raise a wrong class over the right one.

`strongest` keeps, for each picture, the attack that does most harm.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from lipguide.arguments import whole
from lipguide.robustness.attacks import BlindAttack, pgd_l2
from lipguide.tasks.detection.boxes import NOTHING, Targets, check_number, check_targets
from lipguide.tasks.detection.scores import check_call, detections, hits
from lipguide.tasks.detection.suppression import MIN_SCORE

__all__ = ["ATTACKS", "TRAINING_LOSS", "attack_l2", "attacked", "mixture", "most_harmful", "objective", "strongest"]

TRAINING_LOSS = "training loss"  # the attack that the case study knows, beside those of `ATTACKS`

FAR = -1e4  # stands in for a logarithm of 0: it must not win a maximum, nor turn a sum into NaN
MATCHES, REACHES = 0.5, 0.4  # overlap at which a box matches an object, and from which a little push may make it
FEW = 3  # alarms that "fabricate" raises at once
# An object whose class scores a quarter of what counts is lost, and so is one that a wrong class outscores by as much
# as that leaves: the attack turns to the objects that are left, and lets go of a scene that has none.
LOST = math.log(MIN_SCORE / 4)
ROUNDING = 1e-4  # of a sum of a few such numbers

Objective = Callable[[tuple[Tensor, ...], Targets], Tensor]


class _Margins:
    """What all objectives need: log-probabilities, and which prior's box lies on which object."""

    def __init__(self, output: tuple[Tensor, ...], targets: Targets, model: nn.Module) -> None:
        self.log_p = model.log_scores(output)  # (N, P, C)
        boxes, labels = check_targets(targets, classes=self.log_p.shape[2])
        self.there = labels != NOTHING  # (N, M)
        self.labels = labels.clamp(min=0)
        overlaps = box_iou(model.boxes(output).detach(), boxes)
        self.overlaps = overlaps.masked_fill(~self.there[:, None], 0.0)  # (N, P, M)

    def of_class(self) -> Tensor:
        """(N, P, M): log-probability of each object's class at each prior."""
        index = self.labels[:, None].expand(-1, self.log_p.shape[1], -1)
        return self.log_p.gather(2, index)

    def on_object(self, values: Tensor, overlap: float) -> Tensor:
        """(N, M): the largest value among the priors whose box lies on an object; FAR if there is none."""
        return values.masked_fill(self.overlaps < overlap, FAR).amax(1).masked_fill(~self.there, FAR)


def _vanish(output: tuple[Tensor, ...], targets: Targets, model: nn.Module) -> Tensor:
    margins = _Margins(output, targets, model)
    best = margins.on_object(margins.of_class(), REACHES)
    return -torch.where(margins.there, best, 0.0).clamp(min=LOST).sum(1)


def _fabricate(output: tuple[Tensor, ...], targets: Targets, model: nn.Module) -> Tensor:
    margins = _Margins(output, targets, model)
    alarms = margins.log_p.amax(2)
    elsewhere = alarms.masked_fill((margins.overlaps >= MATCHES).any(2), FAR)
    return elsewhere.topk(FEW, dim=1).values.clamp(min=-20.0).sum(1)


def _mislabel(output: tuple[Tensor, ...], targets: Targets, model: nn.Module) -> Tensor:
    margins = _Margins(output, targets, model)
    classes = torch.arange(margins.log_p.shape[2], device=margins.labels.device)
    own = margins.labels[..., None] == classes  # (N, M, C)
    wrong = margins.log_p[:, :, None].masked_fill(own[:, None], FAR).amax(3)
    lead = margins.on_object(margins.of_class() - wrong, REACHES)
    return -torch.where(margins.there, lead, 0.0).clamp(min=LOST, max=20.0).sum(1)


ATTACKS: dict[str, Callable[..., Tensor]] = {"vanish": _vanish, "fabricate": _fabricate, "mislabel": _mislabel}
OF_OBJECTS = ("vanish", "mislabel")  # which ask nothing of a scene without objects, and have done when all are lost


def objective(name: str, model: nn.Module) -> Objective:
    """What attack `name` on `model` ascends: one number a scene from the detector's output and the targets.

    "training loss" is the case study's, as the model's method `training_loss(reduction)` gives it.

    >>> from lipguide.tasks.detection.fcos import fcos
    >>> objective("training loss", fcos(width=4))
    FCOSLoss()
    """
    if name == TRAINING_LOSS:
        return model.training_loss("none")
    if name not in ATTACKS:
        raise ValueError(f"attack must be one of {TRAINING_LOSS}, {', '.join(ATTACKS)}, not {name!r}")
    function = ATTACKS[name]
    return lambda output, targets: function(output, targets, model)


def attack_l2(
    model: nn.Module,
    images: Tensor,
    targets: Targets,
    eps: float,
    name: str = TRAINING_LOSS,
    steps: int = 20,
    restarts: int = 1,
    batch_size: int = 128,
) -> Tensor:
    """Pictures within `eps` of `images` that one attack finds, batch by batch.

    A scene without objects stays as it is under "vanish" and "mislabel": there is nothing to vanish. One whose objects
    are all lost leaves the search, for these attacks can gain nothing more there; the others go on to the last step.
    More `restarts` never find a weaker attack: each picture keeps the best of all.

    >>> from lipguide.tasks.detection.boxes import pad_targets
    >>> from lipguide.tasks.detection.configurations import naive
    >>> model, x = naive().eval(), torch.rand(2, 3, 74, 74)
    >>> targets = pad_targets([torch.tensor([[0.1, 0.1, 0.5, 0.9]])] * 2, [torch.tensor([1])] * 2)
    >>> moved = attack_l2(model, x, targets, eps=0.5, name="vanish", steps=2)
    >>> bool(((moved - x).flatten(1).norm(dim=1) <= 0.5 + 1e-4).all())
    True
    """
    aim = objective(name, model)
    # Here, not only in the search, which a scene without objects never comes to.
    check_call(model, images, batch_size)
    check_number("eps", eps, 0, math.inf)
    whole("steps", steps, "an attack takes one step or more")
    whole("restarts", restarts, "an attack starts once or more")
    known = check_targets(targets, classes=None)
    if len(known.labels) != len(images):
        raise ValueError(f"pictures of {len(images)} scenes, but targets of {len(known.labels)}")
    objects = (known.labels != NOTHING).sum(1)
    moved = images.detach().clone()
    chosen = torch.arange(len(images), device=images.device)
    if name in OF_OBJECTS:
        chosen = objects.nonzero().squeeze(1)
    for part in chosen.split(batch_size):
        if len(part):  # many a model refuses an empty batch
            enough = -LOST * objects[part] - ROUNDING if name in OF_OBJECTS else None
            some = known.part(part)
            moved[part] = pgd_l2(model, images[part], some, eps, steps, restarts, loss=aim, enough=enough)
    return moved


def attacked(
    model: nn.Module, images: Tensor, targets: Targets, eps: float, name: str, steps: int
) -> tuple[Tensor, int]:
    """What `attack_l2` finds in all scenes at once, and for how many it was blind: met no gradient that was not zero.

    That such scenes stand says nothing about the detector. A run of hours puts their number on record; elsewhere a
    warning says it.

    >>> from lipguide.tasks.detection.boxes import pad_targets
    >>> from lipguide.tasks.detection.configurations import naive
    >>> targets = pad_targets([torch.tensor([[0.1, 0.1, 0.5, 0.9]])], [torch.tensor([1])])
    >>> attacked(naive().eval(), torch.rand(1, 3, 74, 74), targets, 0.5, "vanish", 2)[1]
    0
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moved = attack_l2(model, images, targets, eps, name, steps, batch_size=max(len(images), 1))
    blind = 0
    for warning in caught:
        if isinstance(warning.message, BlindAttack):
            blind += warning.message.blind
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return moved, blind


def strongest(
    model: nn.Module, images: Tensor, targets: Targets, candidates: dict[str, Tensor], min_score: float = MIN_SCORE
) -> Tensor:
    """For each picture the candidate with the fewest objects found, and of those the one with the most false alarms.

    No candidate leaves a lower recall than this mixture. A lower mAP it may leave, for mAP ranks the detections of all
    pictures together: a figure called the strongest is the lower of the mixture's mAP and of each candidate's.

    Args:
        candidates: attacked pictures by the name of the attack, such as `attack_l2` gives.
        min_score: above which a box counts, as for the recall and the false alarms that are reported. At another one
            the choice is another, and may be the weaker attack.
    """
    check_number("min_score", min_score)
    found = {}
    for name, moved in candidates.items():
        if moved.shape != images.shape:
            raise ValueError(f"candidate {name!r} has shape {tuple(moved.shape)}, the pictures {tuple(images.shape)}")
        found[name] = detections(model, moved, min_score=min_score)
    worst = torch.tensor(most_harmful(found, targets), dtype=torch.long, device=images.device)
    stacked = torch.stack(list(candidates.values()))
    return stacked[worst, torch.arange(len(images), device=images.device)]


def most_harmful(found: dict[str, list[dict[str, Tensor]]], targets: Targets) -> list[int]:
    """For each scene which attack, by its place, leaves the fewest objects found, and of those the most false alarms.

    Args:
        found: by the name of the attack, what a detector finds on the attacked pictures.

    >>> from lipguide.tasks.detection.boxes import pad_targets
    >>> box, label = torch.tensor([[0.1, 0.1, 0.5, 0.9]]), torch.tensor([1])
    >>> right = {"boxes": box, "scores": torch.tensor([0.9]), "labels": label}
    >>> most_harmful({"weak": [right], "strong": [right | {"labels": label + 1}]}, pad_targets([box], [label]))
    [1]
    """
    if not found:
        raise ValueError("the strongest of no attack is undefined: give one candidate or more")
    harm = []
    for scenes in found.values():
        right = torch.tensor(hits(scenes, targets), dtype=torch.float64, device="cpu")
        made = torch.tensor([len(scene["labels"]) for scene in scenes], dtype=torch.float64, device="cpu")
        harm.append(-right + (made - right) / 1000)  # an object counts more than any number of alarms
    return torch.stack(harm).argmax(0).tolist()


def mixture(found: dict[str, list[dict[str, Tensor]]], targets: Targets) -> list[dict[str, Tensor]]:
    """What is found where each scene is under the attack that does it most harm.

    Args:
        found: as `most_harmful` takes it.

    >>> from lipguide.tasks.detection.boxes import pad_targets
    >>> mixture({"weak": [], "strong": []}, pad_targets([], []))
    []
    """
    attacks = list(found.values())
    return [attacks[attack][scene] for scene, attack in enumerate(most_harmful(found, targets))]

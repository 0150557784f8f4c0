"""The multibox loss of single-shot detectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipguide.arguments import whole
from lipguide.distributed import mean_over_ranks
from lipguide.layers.together import together
from lipguide.tasks.detection.boxes import Checked, Targets, encode, match, offsets, single, unit_range

__all__ = ["DetectionStep", "Multibox", "check_output"]


class Multibox(nn.Module):
    r"""Classes by cross-entropy, with three hard negatives for each positive; boxes by the L1 distance of offsets:

    .. math:: \frac1P \Big( \sum_{p \in \text{positive or hard}} \mathrm{CE}(z_p, c_p) \Big) +
        \frac{1}{4P} \sum_{p\ \text{positive}} \lVert o_p - \hat o_p \rVert_1

    P is the number of positives, of the whole batch for "mean" and of a scene for "none". A scene without objects has
    no positives and keeps three negatives.

    Args:
        priors: (number, 4), as the model has them.
        negatives: hard negatives for each positive: those with the largest cross-entropy in their scene.
        per_prior: the loss of logits (N, C, P) and classes (N, P), one value each; cross-entropy unless given.
        reduction: "mean", or "none" for one value a scene, as attacks need it.

    >>> from lipguide.tasks.detection.boxes import pad_targets, prior_boxes
    >>> priors = prior_boxes([2], [0.5], [1.0])
    >>> targets = pad_targets([torch.tensor([[0.0, 0.0, 0.5, 0.5]])], [torch.tensor([1])], classes=2)
    >>> Multibox(priors)((torch.zeros(1, 4, 3), torch.zeros(1, 4, 4)), targets)  # 4 log 3: one positive, 3 negatives
    tensor(4.3944)
    """

    priors: Tensor
    anything: Tensor

    def __init__(
        self, priors: Tensor, negatives: int = 3, per_prior: nn.Module | None = None, reduction: str = "mean"
    ) -> None:
        super().__init__()
        anything = priors.new_tensor([0.0, 0.0, 1.0, 1.0])
        encode(anything, priors)  # refuses priors without area, once for all
        if reduction not in ("mean", "none"):
            raise ValueError(f'reduction must be "mean" or "none", not {reduction!r}')
        self.register_buffer("priors", priors.clone(), persistent=False)
        self.register_buffer("anything", anything, persistent=False)  # made here: in a step a GPU would be waited for
        self.negatives = whole("negatives", negatives, "that many stand beside each positive", least=0)
        self.reduction = reduction
        self.per_prior = per_prior or nn.CrossEntropyLoss(reduction="none")

    def forward(self, output: tuple[Tensor, Tensor], targets: Targets) -> Tensor:
        logits, said = output  # (N, P, C + 1) and (N, P, 4)
        check_output(logits, len(self.priors), targets)
        background = logits.shape[2] - 1
        classes, boxes = match(targets, self.priors, background)
        positive = classes != background
        values = self.per_prior(single(logits).mT, classes)
        kept = positive | self._hard(values.detach(), positive)
        wanted = offsets(torch.where(positive[..., None], boxes, self.anything), self.priors)
        distance = F.l1_loss(single(said), wanted, reduction="none").mean(2)
        scene = (values * kept + distance * positive).sum(1)
        if self.reduction == "none":
            return scene / positive.sum(1).clamp(min=1)
        return mean_over_ranks(scene.sum(), positive.sum(), logits)

    def _hard(self, values: Tensor, positive: Tensor) -> Tensor:
        """The `negatives` · positives negatives of each scene that have the largest values."""
        ranked = values.masked_fill(positive, -1.0).argsort(dim=1, descending=True, stable=True)
        count = self.negatives * positive.sum(1, keepdim=True).clamp(min=1)
        chosen = torch.zeros_like(positive)
        ranks = torch.arange(values.shape[1], device=values.device).expand_as(values)
        return chosen.scatter(1, ranked, ranks < count) & ~positive


def check_output(logits: Tensor, places: int, targets: Targets) -> None:
    """Raise ValueError unless logits (N, P, C) are those of a detector with so many places, and of as many scenes as
    the targets.

    >>> check_output(torch.zeros(2, 5, 3), 5, Targets(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.long)))
    """
    if logits.shape[1] != places:
        raise ValueError(
            f"the output has {logits.shape[1]} places where the detector has {places}: it takes pictures of one size"
        )
    if len(logits) != len(targets.labels):
        raise ValueError(f"the output is of {len(logits)} scenes, but there are targets of {len(targets.labels)}")


class DetectionStep(nn.Module):
    """The step of `lipguide.training.fit` for columns (images, boxes, labels), the latter two from `pad_targets`.

    Images may be bytes, which are brought to [0, 1] batch by batch.

    Args:
        loss: of the detector's output and targets.
        known: the targets of all scenes, where `check_targets` has seen them: then it does not look at those of each
            batch again, for which a GPU would wait.
    """

    def __init__(self, loss: nn.Module, known: Checked | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.classes = None if known is None else known.classes
        self.steady = known is not None

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, boxes, labels = batch
        with together(model):
            output = model(unit_range(images))
        if self.classes is None:
            return self.loss(output, Targets(boxes, labels))
        return self.loss(output, Checked(boxes, labels, self.classes))

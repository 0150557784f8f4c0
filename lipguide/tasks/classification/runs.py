"""The digits that records made of many trainings learn from and are judged on."""

from __future__ import annotations

from typing import Any

from lipguide.tasks.classification.data import pictures
from lipguide.tasks.task import Data
from lipguide.tasks.weights import TEST_SEED, TRAIN_SEED

__all__ = ["Digits", "house_digits"]

DATA = "house-numbers-3"  # what the records of this edition are made on


def house_digits(split: str, scenes: int | None, seed: int) -> Data:
    """The digits of so many synthetic scenes, with the name and the hash that a record keeps of them.

    >>> house_digits("test", 2, seed=0).facts["name"]
    'house-numbers-3'
    """
    return Data.named(DATA, *pictures(DATA, split, scenes, seed))


class Digits:
    """What networks learn from, what settings are chosen on, and what judges, each of so many scenes.

    >>> list(Digits(2, 1, 1).facts)
    ['train', 'chosen on', 'judged on']
    """

    def __init__(self, train: int | None, choosing: int | None, test: int | None) -> None:
        self.train = house_digits("train", train, TRAIN_SEED)
        self.choose = house_digits("test", choosing, TRAIN_SEED)
        self.judge = house_digits("test", test, TEST_SEED)

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """What a record says about them."""
        return {"train": self.train.facts, "chosen on": self.choose.facts, "judged on": self.judge.facts}

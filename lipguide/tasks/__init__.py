"""Networks that learn something: classification, segmentation and detection of house numbers.

One harness trains the recipes of all tasks; a task is imported when one of its recipes is asked for.
"""

from lipguide.tasks.harness import FULL, TASKS, ensure, network_of, recipe_of, train, train_by, trained
from lipguide.tasks.task import Data, Recipe, Task
from lipguide.tasks.weights import TEST_SEED, WEIGHTS, fingerprint

__all__ = [
    "FULL",
    "TASKS",
    "TEST_SEED",
    "WEIGHTS",
    "Data",
    "Recipe",
    "Task",
    "ensure",
    "fingerprint",
    "network_of",
    "recipe_of",
    "train",
    "train_by",
    "trained",
]

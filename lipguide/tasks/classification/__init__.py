"""Classification of digits: networks, what they learn from, and the recipes of the weights that ship."""

from lipguide.tasks.classification.networks import NETWORKS, build, check_labels, resnet, sll, vgg

__all__ = ["NETWORKS", "build", "check_labels", "resnet", "sll", "vgg"]

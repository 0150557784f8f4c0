"""Segmentation of house numbers: networks, what they learn from, what attacks are after, and the recipes."""

from lipguide.tasks.segmentation.attacks import flipped, soft_flips
from lipguide.tasks.segmentation.networks import NETWORKS, build, fcn, unet

__all__ = ["NETWORKS", "build", "fcn", "flipped", "soft_flips", "unet"]

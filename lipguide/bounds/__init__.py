"""Bounds of whole networks: from above with a proof, from below by a search."""

from lipguide.bounds.below import lipschitz_lower_bound, most_stretched_pair, stretch
from lipguide.bounds.network import Bound, LayerBound, Unbounded, lipschitz_bound

__all__ = [
    "Bound",
    "LayerBound",
    "Unbounded",
    "lipschitz_bound",
    "lipschitz_lower_bound",
    "most_stretched_pair",
    "stretch",
]

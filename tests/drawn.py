"""The libraries that draw the synthetic pictures: other versions of them may change single pixels."""

from importlib import metadata

__all__ = ["other_libraries_draw"]

DRAWN_WITH = {"numpy": "2.2.6", "scipy": "1.15.3", "pillow": "12.3.0", "matplotlib": "3.10.9"}


def other_libraries_draw() -> bool:
    """Is one of them another version than those that drew the pictures of the weights that ship?"""
    return {name: metadata.version(name) for name in DRAWN_WITH} != DRAWN_WITH

"""Segmentation of house numbers: networks, what they learn from, and the recipes of the weights that ship."""

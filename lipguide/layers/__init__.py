"""Layers of a known Lipschitz constant; `lipguide` itself offers them by name."""

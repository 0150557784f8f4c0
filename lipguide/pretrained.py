"""Trained weights that ship with the package, each with the run that made it.

A file `weights/<name>.safetensors` holds a state dict and, in its header, the run: what was trained, for how long, on
what. A chapter loads it, and prints the numbers of these very weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lipguide.data.files import replacing

__all__ = ["WEIGHTS", "load", "save"]

WEIGHTS = Path(__file__).resolve().parent / "weights"


def save(name: str, model: nn.Module, run: dict[str, Any], folder: str | Path = WEIGHTS) -> Path:
    """Write a model's state and the run that made it, whole or not at all, and return the file's path.

    Args:
        name: of the file, without its ending.
        run: what a reader needs to judge and repeat the weights; anything that JSON can hold.

    >>> import tempfile
    >>> folder, layer = tempfile.mkdtemp(), nn.Linear(2, 3)
    >>> path = save("small", layer, {"steps": 10, "device": "cpu"}, folder)
    >>> load("small", nn.Linear(2, 3), folder)
    {'device': 'cpu', 'steps': 10}
    """
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    broken = [key for key, value in state.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"{broken[0]!r} of {name!r} is not finite: such weights are not worth keeping")
    with replacing(Path(folder) / f"{name}.safetensors") as temporary:
        save_file(state, temporary, metadata={"run": json.dumps(run, sort_keys=True)})
    return Path(folder) / f"{name}.safetensors"


def load(name: str, model: nn.Module, folder: str | Path = WEIGHTS) -> dict[str, Any]:
    """Load the weights ``name`` into ``model``, which must have the same layers, and return the run that made them.

    The model keeps its device and its training mode. See ``save`` for an example.
    """
    path = Path(folder) / f"{name}.safetensors"
    if not path.exists():
        there = ", ".join(sorted(p.stem for p in Path(folder).glob("*.safetensors"))) or "none"
        raise FileNotFoundError(f"no weights {name!r} in {folder}; there are: {there}")
    try:
        with safe_open(path, framework="pt") as file:
            run = json.loads((file.metadata() or {})["run"])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no file of weights that lipguide wrote ({error}): install it again") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights {name!r} belong to another model: {error}") from error
    return run

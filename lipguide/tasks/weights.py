"""Trained weights that ship with the package, each with the run that made it.

A file `weights/<name>.safetensors` holds a state dict and, in its header, the run: what was trained, for how long, on
what. A chapter loads it, and prints the numbers of these very weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipguide.files import replacing
from lipguide.layers.constraints import WARM_UP
from lipguide.layers.sll import SLL

__all__ = [
    "TEST_SEED",
    "TRAIN_SEED",
    "WEIGHTS",
    "fingerprint",
    "give",
    "halved",
    "go_on_from",
    "load",
    "made_as",
    "run_of",
    "save",
]

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
TRAIN_SEED = 0  # of the synthetic pictures that networks learn from; on it layers, losses and rates were chosen
TEST_SEED = 1  # of those that judge the weights


def fingerprint(*tensors: Tensor) -> str:
    """Twelve digits that tell data apart: of the SHA-256 over the bytes of the tensors, one after the other.

    >>> fingerprint(torch.tensor([1, 2]), torch.tensor([3])) == fingerprint(torch.tensor([1, 2, 3]))
    True
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


@torch.no_grad()
def halved(model: nn.Module) -> nn.Module:
    """A model whose weights are numbers of float16, in the precision that they have. Vectors, which weigh little and of
    which some are small variances, stay as they are.

    >>> layer = halved(nn.Linear(3, 2))
    >>> torch.equal(layer.weight, layer.weight.half().float())
    True
    """
    for value in _heavy(model.state_dict()).values():
        value.copy_(value.half())
    return model


def _heavy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if value.ndim > 1 and value.is_floating_point()}


def save(name: str, model: nn.Module, run: dict[str, Any], folder: str | Path = WEIGHTS) -> Path:
    """Write a model's state and the run that made it, whole or not at all, and return the file's path.

    Weights that are numbers of float16, as `halved` leaves them, are written as such: they are read as what they were.

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
    short = {key: value.half() for key, value in _heavy(state).items()}
    if all(torch.equal(value.to(state[key]), state[key]) for key, value in short.items()):
        state |= short
    path = Path(folder) / f"{name}.safetensors"
    metadata = {"run": json.dumps(run, sort_keys=True, allow_nan=False)}
    try:
        with replacing(path) as temporary:
            save_file(state, temporary, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written, is the disk full? ({error})") from error
    return path


def load(name: str, model: nn.Module, folder: str | Path = WEIGHTS) -> dict[str, Any]:
    """Load the weights `name` into `model`, which must have the same layers, and return the run that made them.

    The model keeps its device and its training mode. See `save` for an example.
    """
    path = Path(folder) / f"{name}.safetensors"
    if not path.exists():
        there = ", ".join(sorted(p.stem for p in Path(folder).glob("*.safetensors"))) or "none"
        raise FileNotFoundError(f"no weights {name!r} in {folder}; there are: {there}")
    with _opened(path) as file:
        run, state = _run_in(file), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights {name!r} belong to another model: {error}") from error
    return run


@torch.no_grad()
def go_on_from(model: nn.Module, plain: nn.Module) -> None:
    """Give a model with constraints the values of one without; what satisfies a constraint stays nearly as it is.

    >>> from lipguide.layers.affine import unit_rows
    >>> model, plain = unit_rows(nn.Linear(2, 1)), nn.Linear(2, 1)
    >>> plain.weight.data = torch.tensor([[0.6, 0.8]])
    >>> go_on_from(model, plain)
    >>> torch.equal(model.weight, plain.weight)
    True
    """
    modules = dict(model.named_modules())
    for name, value in plain.state_dict().items():
        parent, _, last = name.rpartition(".")
        if isinstance(modules[parent], SLL) and last == "weight":
            modules[parent].parametrizations.weight.original.copy_(value)
        elif parametrize.is_parametrized(modules[parent], last):
            give(modules[parent], last, value)
        else:
            getattr(modules[parent], last).copy_(value)


def give(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a constrained parameter a value; what satisfies the constraint stays nearly as it is."""
    setattr(module, name, value)  # torch asks the constraint what to keep
    for _ in range(WARM_UP):  # a power iteration knows the norm of the weight before
        getattr(module, name)


def made_as(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether an earlier run has left weights at `path`; ValueError if it was another run than the one `wanted`.

    >>> made_as(Path("nowhere.safetensors"), {"steps": 10})
    False
    """
    if not path.exists():
        return False
    made = run_of(path)
    for what, value in wanted.items():
        if made.get(what) != value:
            raise ValueError(
                f"{path} was made by another run ({what} = {made.get(what)} there, {value} here): move it away, or "
                "name another folder"
            )
    return True


def run_of(path: str | Path) -> dict[str, Any]:
    """The run that made a file of weights. See `save` for an example.

    >>> run_of(WEIGHTS / "segmentation-unet.safetensors")["recipe"]["network"]
    'unet'
    """
    with _opened(Path(path)) as file:
        return _run_in(file)


def _run_in(file: Any) -> dict[str, Any]:
    return json.loads((file.metadata() or {})["run"])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of weights, or ValueError, also later on, for one that turns out to be none."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no file of weights that lipguide wrote ({error}): install it again") from error

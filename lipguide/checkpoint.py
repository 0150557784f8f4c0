"""Checkpoints of the training loop: what a run is, and how it goes on where it stopped.

A checkpoint holds the states of what changes in a run, and a description of what must not change: settings, data,
model, loss and optimizer. A run that is described otherwise does not go on from it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lipguide.files import replacing

__all__ = ["Checkpoint", "Progress", "Tally", "content_of", "kind_of"]

# What torch.load raises for a file of another kind, beside RuntimeError, OSError, KeyError, TypeError and ValueError.
UNREADABLE = (EOFError, NotImplementedError, pickle.UnpicklingError)
DIGEST = hashlib.sha256().digest_size  # bytes at the end of the file, the hash of all that stands before them


class Progress(NamedTuple):
    """How far a run has come: updates made, and one record for each line reported."""

    step: int
    history: list[dict[str, float]]


class Tally:
    """What has happened since the last report; a part of the checkpoint, for a run may stop between two reports.

    >>> tally = Tally(torch.device("cpu"))
    >>> tally.add(torch.tensor(0.5)), tally.add(torch.tensor(0.25)), tally.taken()[0::2]
    (None, None, (2, 0.75))
    """

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), device=device, dtype=torch.float64)  # the sum over the steps
        self.steps, self._seconds = 0, 0.0
        self.begin()

    def begin(self) -> None:
        """Count seconds from now on."""
        self._since = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        self._loss += loss
        self.steps += 1

    def pause(self) -> None:
        """Count the seconds until now."""
        self._seconds += time.perf_counter() - self._since
        self.begin()

    def taken(self) -> tuple[int, float, float]:
        """Steps, seconds, and the sum of the losses; all begin at 0 again."""
        self.pause()
        found = self.steps, self._seconds, self._loss.item()
        self._loss.zero_()
        self.steps, self._seconds = 0, 0.0
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self._loss.item(), "steps": self.steps, "seconds": self._seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loss.fill_(state["loss"])
        self.steps, self._seconds = state["steps"], state["seconds"]


class Checkpoint:
    """The file of a run.

    Args:
        path: None for a run that keeps no file.
        parts: what has a `state_dict`, such as model and optimizer, by name.
        run: what must be the same to go on, by name.
        constants: tensors by name, such as class weights, that must be the same as well, unless the run changes them.

    >>> import os, tempfile
    >>> file, layer = os.path.join(tempfile.mkdtemp(), "run.pt"), nn.Linear(2, 1)
    >>> checkpoint = Checkpoint(file, {"model": layer}, {"seed": 0})
    >>> checkpoint.resume()
    Progress(step=0, history=[])
    >>> checkpoint.save(Progress(5, [{"loss": 0.5}]))
    >>> Checkpoint(file, {"model": nn.Linear(2, 1)}, {"seed": 0}).resume()
    Progress(step=5, history=[{'loss': 0.5}])
    """

    def __init__(
        self,
        path: str | Path | None,
        parts: Mapping[str, Any],
        run: Mapping[str, Any],
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.parts, self.run = parts, dict(run)
        self.begun = {name: content_of(tensor) for name, tensor in (constants or {}).items()}

    def save(self, progress: Progress) -> None:
        """Write how far the run is, whole or not at all."""
        if self.path is None:
            return
        states = {name: part.state_dict() for name, part in self.parts.items()}
        content = {"run": self.run, "begun": self.begun, "states": states} | progress._asdict()
        written = io.BytesIO()
        torch.save(content, written)
        whole = written.getvalue()
        try:
            with replacing(self.path) as temporary:
                temporary.write_bytes(whole + hashlib.sha256(whole).digest())
        except OSError as error:
            raise OSError(f"{self.path} could not be written, is the disk full? ({error})") from error

    def resume(self) -> Progress:
        """Load the states of the parts and say how far the run is: nowhere, if there is no file.

        Nothing is loaded if the file is damaged or belongs to another run, which is a ValueError.
        """
        if self.path is None or not self.path.exists():
            return Progress(0, [])
        saved = self._read()
        differences = [*_differences(saved["run"], self.run), *self._changed_constants(saved)]
        if differences:
            what = "; ".join(differences)
            raise ValueError(f"{self.path} belongs to another run ({what}): delete it or name another file")
        for name, part in self.parts.items():
            part.load_state_dict(saved["states"][name])
        return Progress(saved["step"], saved["history"])

    def _read(self) -> dict[str, Any]:
        try:
            content = self.path.read_bytes()
            whole, digest = content[:-DIGEST], content[-DIGEST:]
            # torch.load looks at no checksum, and those of a zip file do not cover its directory.
            if hashlib.sha256(whole).digest() != digest:
                raise ValueError("its content is not what was written")
            saved = torch.load(io.BytesIO(whole), map_location="cpu", weights_only=True)
            return {key: saved[key] for key in ("run", "begun", "states", "step", "history")}
        except (RuntimeError, OSError, KeyError, TypeError, ValueError, *UNREADABLE) as error:
            raise ValueError(f"{self.path} is no readable checkpoint ({error}): delete it to start over") from error

    def _changed_constants(self, saved: dict[str, Any]) -> list[str]:
        """The constants that differ from those of the run, apart from what the run itself has changed since."""
        states = saved["states"].get("step_loss", {})
        differences = []
        for name, before in saved["begun"].items():
            kept = name not in states or content_of(states[name]) == before
            if kept and self.begun.get(name) != before:
                differences.append(f"the values of {name!r} are others")
        return differences


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    names = [*here, *(name for name in there if name not in here)]
    return [
        f"{name} = {there.get(name)!r} there, {here.get(name)!r} here"
        for name in names
        if there.get(name) != here.get(name)
    ]


def content_of(*values: Any) -> str:
    """A hash of the content of tensors, lists and plain values.

    >>> content_of(torch.tensor([1, 2])) == content_of(torch.tensor([1, 3]))
    False
    """
    digest = hashlib.blake2b(digest_size=6)
    for value in values:
        _feed(digest, value)
    return digest.hexdigest()


def kind_of(thing: Any) -> str:
    """What a model, a loss or a function is, apart from the state that training changes: its name and a hash.

    Two modules are of one kind if their parts have the same classes, the same settings (numbers and texts among their
    attributes) and tensors of the same shapes. Two functions are if they have the same code and refer to the same.

    >>> kind_of(nn.Linear(2, 3)) == kind_of(nn.Linear(2, 3)), kind_of(nn.Dropout(0.1)) == kind_of(nn.Dropout(0.2))
    (True, False)
    """
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    digest = hashlib.blake2b(digest_size=6)
    _feed(digest, thing)
    return f"{name} {digest.hexdigest()}"


PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
SETTINGS = (*PLAIN, tuple, FunctionType, functools.partial)  # attributes that say what a module computes


def _feed(digest: Any, value: Any, seen: set[int] | None = None) -> None:
    """Add to a hash what a value is. What has no known content counts by its class.

    Args:
        seen: the functions and modules that are in the hash already.
    """
    seen = set() if seen is None else seen
    digest.update(type(value).__qualname__.encode())
    if isinstance(value, PLAIN):
        digest.update(repr(value).encode())
    elif isinstance(value, Tensor):
        _feed_tensor(digest, value)
    elif isinstance(value, list | tuple):
        digest.update(str(len(value)).encode())
        for part in value:
            _feed(digest, part, seen)
    elif isinstance(value, dict):
        _feed(digest, list(value.items()), seen)
    elif isinstance(value, functools.partial):
        _feed(digest, [value.func, value.args, value.keywords], seen)
    elif isinstance(value, MethodType):
        _feed(digest, [value.__func__, value.__self__], seen)
    elif isinstance(value, CodeType):
        digest.update(value.co_code)
        _feed(digest, [*value.co_names, *value.co_consts], seen)
    elif isinstance(value, nn.Module | FunctionType):
        if id(value) not in seen:
            seen.add(id(value))
            (_feed_module if isinstance(value, nn.Module) else _feed_function)(digest, value, seen)
    elif hasattr(value, "__array__"):
        _feed_tensor(digest, torch.as_tensor(value))
    elif callable(value):
        digest.update(getattr(value, "__qualname__", "").encode())


def _feed_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if not tensor.requires_grad:  # what is trained has no content to tell runs apart by
        for part in tensor.reshape(-1).split(2**24):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy())


def _feed_module(digest: Any, module: nn.Module, seen: set[int]) -> None:
    """Classes, settings and shapes of all its parts."""
    for name, part in module.named_modules():
        digest.update(f"{name} {type(part).__qualname__}".encode())
        for key, value in sorted(vars(part).items()):
            if key != "training" and not key.startswith("_") and isinstance(value, SETTINGS):
                _feed(digest, [key, value], seen)
    for key, tensor in module.state_dict().items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())


def _feed_function(digest: Any, function: FunctionType, seen: set[int]) -> None:
    """Its code, its defaults, and what it refers to: the variables around it, and the names of its module."""
    digest.update(function.__qualname__.encode())
    _feed(digest, [function.__code__, function.__defaults__, function.__kwdefaults__], seen)
    around = function.__globals__
    referred = [around[name] for name in function.__code__.co_names if name in around]
    referred = [value for value in referred if not isinstance(value, FunctionType) or value.__globals__ is around]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            referred.append(cell.cell_contents)
    for value in referred:
        if isinstance(value, (*SETTINGS, Tensor, nn.Module)):
            _feed(digest, value, seen)

"""A GPU that is not there: tensors that say they lie on CUDA, while a CPU computes them.

    python -m tests.pretended MODULE [ARGUMENT ...]

runs a module, such as `pytest` or `lipguide`, in a process that takes it for a real one. So code for a GPU is run where
there is none, and two kinds of mistakes are seen: tensors on different devices in one operation, which is an error here
as there, and what makes the host wait for the device, which is one after `torch.cuda.set_sync_debug_mode("error")`, as
there. Times mean nothing, and autocast to half precision does nothing.

torch gives its key "PrivateUse1" to backends like this one. That cannot be undone in a process, hence one of its own.
"""

from __future__ import annotations

import runpy
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
import torchvision  # noqa: F401  (before anything is pretended: it asks which CUDA it was built for)
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["Pretended", "pretended"]

NAME, CLAIMED = "pretended", torch.device("cuda", 0)
DEVICES = (torch.device, str)  # tuples, for `isinstance` takes far longer with a union
NESTED = (list, tuple)
ACROSS = ("_to_copy", "copy_", "_foreach_copy_")  # operations that may have tensors on either side
INDEXED = ("index", "index_put_", "_index_put_impl_")  # whose indices may lie on the CPU
# What ends with a number on the host, or with a tensor whose size only the values say.
WAITING = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "_linalg_check_errors", "_unique2",
    "unique_consecutive", "unique_dim",
}  # fmt: skip


class Pretended(Tensor):
    """A tensor on the GPU that is not there, around one on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.shape, **layout, dtype=held.dtype, device=f"{NAME}:0")
        made.held = held
        return made

    device = property(lambda self: CLAIMED)
    is_cuda = property(lambda self: True)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"Pretended({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Computed(TorchDispatchMode):
    """Operations that make tensors on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Named(TorchFunctionMode):
    """Whoever names CUDA means the device that is not there."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and isinstance(args[0], Pretended):
            args = args[0], _each(_index, args[1])
        result = func(*map(_meant, args), **{key: _meant(value) for key, value in (kwargs or {}).items()})
        if func is Tensor.device.__get__ and result.type == NAME:  # also of those that `vmap` makes
            return CLAIMED
        return result


def _meant(value: Any) -> Any:
    if isinstance(value, DEVICES) and str(value).partition(":")[0] == "cuda":
        return torch.device(NAME, 0)
    return value


def _index(value: Any) -> Any:
    """CUDA takes indices from the CPU, for which the host waits. The gradient of this backend does not."""
    return value.to(torch.device(NAME, 0)) if isinstance(value, Tensor) and not isinstance(value, Pretended) else value


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation, on the CPU; what comes out lies where it would."""
    name = func.overloadpacket.__name__
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    there = [part for part in tensors if isinstance(part, Pretended)]
    target = kwargs.get("device")
    if name == "_pin_memory":
        return args[0].clone()
    # Most operations: nothing in them is on the device, or goes there.
    if not there and target is None and not kwargs.get("pin_memory"):
        return func(*args, **kwargs)
    here = [part for part in tensors if not isinstance(part, Pretended)]
    goes_there = bool(there) if target is None else torch.device(target).type in (NAME, "cuda")
    if name == "copy_":
        goes_there = isinstance(args[0], Pretended)
    if there:
        _check_devices(name, args, here)
    if _waits(name, args, kwargs, there, here, goes_there):
        _wait(name)
    options = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if target is not None:
        options["device"] = torch.device("cpu")
    result = func(*_each(_plain, args), **{key: _each(_plain, value) for key, value in options.items()})
    if not goes_there:
        return result
    result = _each(_moved, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if there and _aliases(func) else result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, which may be lists, also nested."""
    # torch's own walk through trees takes ten times as long, and there are two hundred thousand operations.
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, NESTED):
            yield from _tensors(value)


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """A function of a value, or of each in a list."""
    if isinstance(value, NESTED):
        return type(value)([_each(function, part) for part in value])
    return function(value)


@cache
def _aliases(func: Any) -> bool:
    """Does an operation change an argument, or give another view of it?"""
    return any(part.alias_info is not None for part in (*func._schema.arguments, *func._schema.returns))


def _plain(value: Any) -> Any:
    return value.held if isinstance(value, Pretended) else value


def _moved(value: Any) -> Any:
    """Nobody would see the mark of a conjugate, or of a negative, that is to be taken later."""
    return Pretended(value.resolve_conj().resolve_neg()) if isinstance(value, Tensor) else value


def _check_devices(name: str, args: tuple[Any, ...], here: list[Tensor]) -> None:
    """CUDA takes numbers from the CPU, as tensors without a dimension, and indices."""
    if not here or name in ACROSS:
        return
    allowed = list(_tensors(args[1])) if name in INDEXED else []
    wrong = [part for part in here if part.dim() and not any(part is index for index in allowed)]
    if wrong:
        shapes = ", ".join(str(tuple(part.shape)) for part in wrong)
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but {shapes} on the CPU")


def _waits(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    there: list[Tensor],
    here: list[Tensor],
    goes_there: bool,
) -> bool:
    """Does the host wait for CUDA in this operation?"""
    if name in ACROSS:
        leaves, enters = bool(there) and not goes_there, bool(here) and goes_there
        sent_along = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        return leaves or (enters and any(part.dim() for part in here) and not sent_along)
    if not there:
        return False
    if name in INDEXED:
        indices = list(_tensors(args[1]))
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        fills = name != "index" and len(indices) == 1 and args[2].numel() == 1  # torch fills, and counts nothing
        moves = name != "index" and not fills and not isinstance(args[2], Pretended)  # a number of the host
        here = any(index.dim() and not isinstance(index, Pretended) for index in indices)
        return bool(masks and not fills) or moves or here
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in WAITING


class _Generator(torch.Generator):
    """Of the CPU, for whatever device."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls, torch.device("cpu"))


class _Debug:
    """What `torch.cuda.set_sync_debug_mode` sets."""

    mode = "default"

    @classmethod
    def set(cls, mode: str) -> None:
        cls.mode = mode


def _wait(name: str) -> None:
    if _Debug.mode == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {name}")


def _nothing(*_: Any, **__: Any) -> None:
    pass


CUDA: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "is_current_stream_capturing": lambda: False,
    "device_count": lambda: 1,
    "get_device_name": lambda *_: "a GPU that is not there",
    "max_memory_allocated": lambda *_: 0,
    "get_rng_state": lambda *_: torch.zeros(0),
    "set_sync_debug_mode": _Debug.set,
    **dict.fromkeys(("synchronize", "empty_cache", "manual_seed_all", "set_rng_state"), _nothing),
    **dict.fromkeys(("reset_peak_memory_stats", "set_device"), _nothing),
}


MODULE = {
    "is_initialized": lambda: True,
    "current_device": lambda: 0,
    "_is_in_bad_fork": lambda: False,
    "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    **CUDA,
}


def _empty(size: Any, dtype: Any = None, *_: Any, **__: Any) -> Tensor:
    return Pretended(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, *_: Any, **__: Any) -> Tensor:
    return Pretended(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(source, Pretended) != isinstance(target, Pretended) and not non_blocking:
        _wait("_copy_from")
    _plain(target).copy_(_plain(source))
    return target


# What torch calls below all modes, for instance where it makes a tensor of a list of indices.
BELOW = {"empty.memory_format": _empty, "empty_strided": _empty_strided, "_copy_from": _copy_from}


@contextmanager
def pretended() -> Iterator[None]:
    """Within it, `torch.cuda` is there."""
    _setup_privateuseone_for_python_backend(NAME, types.SimpleNamespace(**MODULE))
    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        mock.patch.multiple(torch.cuda, **CUDA),
        mock.patch("lipguide.training.can_record", lambda device: False),  # a graph it is not
        mock.patch.object(torch, "Generator", _Generator),
        _Computed(),
        _Named(),
    ):
        for name, function in BELOW.items():
            library.impl(name, function, "PrivateUse1")
        yield


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with pretended():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

"""The norm of a linear map of pictures whose entries have one sign: what averages pixels or copies them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipguide.bounds.calls import NoBound
from lipguide.layers.norms import matrix_norm
from lipguide.layers.symbol import CUSHION

__all__ = ["DENSE", "nonnegative"]

DENSE = 1024  # pixels up to which a map is written out as a matrix
FLOAT32_EXACT = 2**24  # whole numbers up to this one are exact in float32

Operation = Callable[[Tensor], Tensor]
"""Takes (N, 1, …) and treats each picture alike."""
Pixels = tuple[int, ...]
"""The sides of a picture."""


def nonnegative(operation: Operation, pixels: Pixels) -> float:
    """The norm of a linear map of pictures whose entries have one sign, such as an average or a copy.

    A map that *copies* pixels has the norm √(most copies of one pixel). Others are exact but for large pictures whose
    windows are uneven: there √(largest row sum · largest column sum) bounds the matrix, after Schur.

    Args:
        operation: takes (N, 1, …) and treats each picture alike. It is asked in float32 and in float64, for an index
            that is computed from a scale factor may differ between the two; the bound holds for both.
        pixels: the sides of a picture.

    >>> round(nonnegative(lambda x: torch.nn.functional.pad(x, (1, 1), mode="replicate"), (3,)), 4)
    1.4142
    """
    copies = [_most_copies(operation, pixels, dtype) for dtype in (torch.float32, torch.float64)]
    if None not in copies:
        return math.sqrt(max(copies)) * (1 + CUSHION)
    _check_same_in_float32(operation, pixels)
    return _norm_of_averages(operation, pixels)


def _most_copies(operation: Operation, pixels: Pixels, dtype: torch.dtype) -> int | None:
    """How often the most copied pixel occurs, or None where the operation does more than to copy pixels.

    A matrix with a single one in each row has columns that are orthogonal, and their lengths are its singular values.
    """
    count = math.prod(pixels)
    if count > FLOAT32_EXACT:
        return None
    # Where pixels are copied, the number of a pixel is what is found in each place of its copies.
    numbered = torch.arange(count, dtype=dtype, device="cpu").reshape(1, 1, *pixels)
    found = operation(numbered).flatten()
    if found.numel() == 0 or float(found.min()) < 0 or float(found.max()) > count - 1:
        return None
    places = found.long()
    if not torch.equal(places.to(dtype), found):
        return None
    picture = _random_picture(pixels, dtype)
    if not torch.equal(operation(picture).flatten(), picture.flatten()[places]):
        return None
    copies = torch.bincount(places, minlength=count)  # (pixels,)
    return int(copies.max())


def _random_picture(pixels: Pixels, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, 1, *pixels, generator=generator, dtype=dtype, device="cpu")


def _check_same_in_float32(operation: Operation, pixels: Pixels) -> None:
    x = _random_picture(pixels, torch.float64)
    exact = operation(x)
    rounded = operation(x.float()).double()
    room = 1e-4 * float(exact.abs().max())
    if not torch.allclose(exact, rounded, rtol=0, atol=room):
        raise NoBound("it takes other pixels in float32 than in float64; give it a size in place of a scale factor")


@torch.enable_grad()
def _norm_of_averages(operation: Operation, pixels: Pixels) -> float:
    """From the sums of the rows and of the columns of the matrix, or from the matrix itself where it is small."""
    ones = torch.ones(1, 1, *pixels, dtype=torch.float64, device="cpu", requires_grad=True)
    rows = operation(ones)
    (columns,) = torch.autograd.grad(rows.sum(), ones)
    _check_adjoint(operation, pixels)
    rows = rows.detach()
    schur_is_exact = _all_equal(rows) and _all_equal(columns)
    if schur_is_exact or ones.numel() > DENSE:
        square = rows.abs().max() * columns.abs().max()
        return math.sqrt(float(square)) * (1 + CUSHION)
    basis = torch.eye(ones.numel(), dtype=torch.float64, device="cpu").reshape(-1, 1, *pixels)
    return matrix_norm(operation(basis).flatten(1))


def _check_adjoint(operation: Operation, pixels: Pixels) -> None:
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩ for random x and y, where autograd says what Aᵀ y is."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1, *pixels, generator=generator, dtype=torch.float64, device="cpu")
    x.requires_grad_()
    image = operation(x)
    y = torch.rand(image.shape, generator=generator, dtype=torch.float64, device="cpu")
    product = (image * y).sum()
    (back,) = torch.autograd.grad(product, x)  # of a scalar: for others torch loads a library first
    product_of_adjoint = (x * back).sum()
    if not torch.allclose(product, product_of_adjoint, rtol=1e-11, atol=0):
        raise NoBound("torch's gradient of it is not the adjoint of its forward, so its column sums are not known")


def _all_equal(sums: Tensor) -> bool:
    return torch.allclose(sums, sums.flatten()[0], rtol=1e-12)

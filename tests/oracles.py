"""Oracles: the true Jacobian, whole for small pictures and through its largest value for big ones."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, nn

from lipguide.layers.export import without_parametrizations


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def true_jacobian(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobian of any function at x, as a matrix."""
    return torch.autograd.functional.jacobian(fn, x, vectorize=True).reshape(-1, x.numel())


def sigma_max(fn: Callable[[Tensor], Tensor], x: Tensor) -> float:
    return torch.linalg.matrix_norm(true_jacobian(fn, x), ord=2).item()


def largest_norm(matrices: Tensor) -> float:
    """The largest σ_max of many matrices (…, n, m), from their Gram matrices: several times faster than their SVD."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    return torch.linalg.eigvalsh(wide @ wide.mH).max().clamp_min(0).sqrt().item()


def steepest(model: nn.Module, shape: tuple[int, ...], points: int = 3) -> float:
    """σ_max of the true Jacobian at random points, in float64."""
    twin = without_parametrizations(model).double()
    return max(sigma_max(twin, 2 * randn(1, *shape, seed=seed)) for seed in range(points))


# Of affine layers


def jacobian(layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """The matrix of an affine layer for one input of `shape` (without batch), in float64."""
    layer = _float64(layer)
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    basis = torch.eye(zero.numel(), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        return (layer(basis) - layer(zero)).flatten(1).T


def singular_values(layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.linalg.svdvals(jacobian(layer, shape))


def largest_singular_value(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """σ_max of an affine layer by Lanczos iteration on products with the layer and its adjoint."""
    layer = _float64(layer)
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    with torch.no_grad():
        bias = layer(zero)

    def forward(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return (layer(torch.from_numpy(np.ascontiguousarray(x)).reshape(1, *shape)) - bias).flatten().numpy()

    def adjoint(y: np.ndarray) -> np.ndarray:
        x = zero.clone().requires_grad_()
        out = layer(x)
        return (
            torch.autograd.grad(out, x, torch.from_numpy(np.ascontiguousarray(y)).reshape(out.shape))[0]
            .flatten()
            .numpy()
        )

    operator = LinearOperator((bias.numel(), zero.numel()), matvec=forward, rmatvec=adjoint, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(min(operator.shape))
    return float(svds(operator, k=1, return_singular_vectors=False, v0=start, tol=1e-6, maxiter=5000)[0])


def jacobian_norm(function: Callable[[Tensor], Tensor], x: Tensor, products: int = 5) -> float:
    """A lower bound of the norm of the true Jacobian at x, by products with it and its transpose."""
    v = torch.randn_like(x)
    for _ in range(products):
        v = v / v.norm()
        _, jv = torch.autograd.functional.jvp(function, x, v)
        _, v = torch.autograd.functional.vjp(function, x, jv)
    return float(v.norm().sqrt())


def _float64(layer: nn.Module) -> nn.Module:
    """The layer with the weights that it uses now, plain and in float64."""
    if isinstance(layer, nn.Linear):
        twin = nn.Linear(layer.in_features, layer.out_features)
    else:
        extra = {"output_padding": layer.output_padding} if isinstance(layer, nn.ConvTranspose2d) else {}
        twin = type(layer)(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            **extra,
        )
    twin = twin.double()
    with torch.no_grad():
        twin.weight.copy_(layer.weight)
        twin.bias.zero_()
    return twin

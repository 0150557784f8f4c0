"""What a forward calls as a function is, with its options, a layer of torch, and has that layer's constant.

`F.max_pool2d(x, 3, 2)` has the rule of `nn.MaxPool2d(3, 2)`: no constant stands twice, and what a layer's rule refuses
is refused here. The layer must compute what the call computes, which is tried on a random input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lipguide.bounds.calls import Call, NoBound
from lipguide.bounds.torch_layers import LAYERS
from lipguide.seeded import normal

if TYPE_CHECKING:
    from lipguide.bounds.forwards import Traveller

__all__ = ["TWINS", "Twin", "advice", "functions", "layer_rule"]


class Twin(NamedTuple):
    """The layer that a function is."""

    layer: Callable[..., nn.Module]
    options: tuple[str, ...]
    """What the function takes behind its input, in its order; the layer has the same names."""


def _padding(pad: tuple[int, ...], mode: str = "constant", value: float = 0.0) -> nn.Module:
    """The layer that `F.pad` is.

    >>> _padding((1, 1), "replicate")
    ReplicationPad1d((1, 1))
    """
    kinds = {"constant": "Constant", "reflect": "Reflection", "replicate": "Replication", "circular": "Circular"}
    layer = getattr(nn, f"{kinds[mode]}Pad{len(pad) // 2}d")
    return layer(pad, value) if mode == "constant" else layer(pad)


SLOPES = {
    "relu": (nn.ReLU, ""),
    "relu6": (nn.ReLU6, ""),
    "hardtanh": (nn.Hardtanh, "min_val max_val"),
    "tanh": (nn.Tanh, ""),
    "sigmoid": (nn.Sigmoid, ""),
    "hardsigmoid": (nn.Hardsigmoid, ""),
    "softsign": (nn.Softsign, ""),
    "softplus": (nn.Softplus, "beta threshold"),
    "softshrink": (nn.Softshrink, "lambd"),
    "tanhshrink": (nn.Tanhshrink, ""),
    "logsigmoid": (nn.LogSigmoid, ""),
    "leaky_relu": (nn.LeakyReLU, "negative_slope"),
    "rrelu": (nn.RReLU, "lower upper training"),
    "elu": (nn.ELU, "alpha"),
    "celu": (nn.CELU, "alpha"),
    "selu": (nn.SELU, ""),
    "gelu": (nn.GELU, "approximate"),
    "silu": (nn.SiLU, ""),
    "mish": (nn.Mish, ""),
    "hardswish": (nn.Hardswish, ""),
}
POOLS = {
    "max_pool{}d": ("MaxPool{}d", "kernel_size stride padding dilation ceil_mode return_indices"),
    "avg_pool{}d": ("AvgPool{}d", "kernel_size stride padding ceil_mode count_include_pad divisor_override"),
    "adaptive_max_pool{}d": ("AdaptiveMaxPool{}d", "output_size return_indices"),
    "adaptive_avg_pool{}d": ("AdaptiveAvgPool{}d", "output_size"),
    "dropout{}d": ("Dropout{}d", "p training"),
}
OTHERS = {
    "dropout": (nn.Dropout, "p training"),
    "alpha_dropout": (nn.AlphaDropout, "p training"),
    "softmax": (nn.Softmax, "dim"),
    "log_softmax": (nn.LogSoftmax, "dim"),
    "pad": (_padding, "pad mode value"),
    "interpolate": (nn.Upsample, "size scale_factor mode align_corners recompute_scale_factor"),
    "pixel_shuffle": (nn.PixelShuffle, "upscale_factor"),
    "pixel_unshuffle": (nn.PixelUnshuffle, "downscale_factor"),
    "channel_shuffle": (nn.ChannelShuffle, "groups"),
}
IN_EACH_DIMENSION = {
    name.format(axes): (getattr(nn, layer.format(axes)), options)
    for name, (layer, options) in POOLS.items()
    for axes in (1, 2, 3)
}
TWINS: dict[str, Twin] = {
    name: Twin(layer, tuple(options.split()))
    for name, (layer, options) in (SLOPES | IN_EACH_DIMENSION | OTHERS).items()
    if layer is _padding or layer in LAYERS
}

UNSEEN = {"inplace", "_stacklevel"}  # say nothing of the value

NORMALISES = "it divides by the spread of its own input, which may be as small as it likes; use lip.BatchCentering"
ADVICE = {
    **{f"conv{axes}d": f"make it nn.Conv{axes}d in __init__, and call that" for axes in (1, 2)},
    **{f"conv_transpose{axes}d": f"make it nn.ConvTranspose{axes}d in __init__, and call that" for axes in (1, 2)},
    "linear": "make it nn.Linear in __init__, and call that",
    "prelu": "make it nn.PReLU in __init__, and call that",
    "batch_norm": "make it nn.BatchNorm2d in __init__, and call that",
    **dict.fromkeys(("layer_norm", "group_norm", "instance_norm"), NORMALISES),
    "normalize": "it divides by the norm of its own input, which may be as small as it likes; leave it out",
    **dict.fromkeys(("cross_entropy", "nll_loss"), "return the logits, and leave the loss to the training"),
    "softmin": "write softmax(-x)",
}


def advice(name: str) -> str:
    """What would do in place of a function that has no constant, where something is known that would.

    >>> advice("linear"), advice("exp")
    ('make it nn.Linear in __init__, and call that', '')
    """
    return ADVICE.get(name, "")


def functions() -> dict[Any, str]:
    """Each function of torch that is a layer, and its name in `TWINS`.

    >>> functions()[torch.relu], functions()[F.relu]
    ('relu', 'relu')
    """
    return {getattr(room, name): name for name in TWINS for room in (torch, F) if hasattr(room, name)}


def layer_rule(twin: Twin) -> Callable[[Traveller, fx.Node, Any], float]:
    """The rule for calls of a function: that of the layer which the call is.

    Args:
        twin: the layer of the function.

    >>> layer_rule(TWINS["relu"]).__name__
    'rule'
    """

    def rule(walk: Traveller, node: fx.Node, value: Tensor) -> float:
        constant = walk.number(node, node.args[0])
        layer = twin.layer(**_options(walk, node, twin)).eval()
        shape = tuple(walk.value(node.args[0]).shape)
        try:
            slope = LAYERS[type(layer)](layer, Call(shape, tuple(value.shape)))
        except NoBound as error:
            raise NoBound(f"its forward uses {walk.written(node)}: {error}") from error
        if not _computes(layer, walk, node):
            return walk.refuse(node)
        return slope * constant

    return rule


def _options(walk: Traveller, node: fx.Node, twin: Twin) -> dict[str, Any]:
    """What the call gives behind its input; None stands for what the function does if nothing is given."""
    given = dict(zip(twin.options, node.args[1:], strict=False))
    if len(given) < len(node.args) - 1 or given.keys() & node.kwargs.keys():
        return walk.refuse(node)
    given |= node.kwargs
    if any(part is not node.args[0] and walk.of(part) != 0.0 for part in node.all_input_nodes):
        return walk.refuse(node)
    options = {}
    for name, argument in given.items():
        option = fx.node.map_arg(argument, walk.value)
        learned = any(isinstance(part, Tensor) for part in tree_leaves(option))
        if learned or option != fx.node.map_arg(argument, walk.earlier):  # which differs with the size of the batch
            return walk.refuse(node)
        if name == "training":
            _check_evaluates(walk, node, option)
        elif name in twin.options and option is not None:
            options[name] = option
        elif name not in UNSEEN and option not in (None, False):
            return walk.refuse(node)
    return options


def _check_evaluates(walk: Traveller, node: fx.Node, training: bool) -> None:
    if training:
        raise NoBound(
            f"its forward uses {walk.written(node)}, which draws at random in eval mode too; give it "
            "training=self.training"
        )


def _computes(layer: nn.Module, walk: Traveller, node: fx.Node) -> bool:
    """Does the layer do what the call does?"""
    like = walk.value(node.args[0])
    x = normal(like.shape, like.dtype).to(like.device)
    args = fx.node.map_arg(node.args[1:], walk.value)
    kwargs = fx.node.map_arg(node.kwargs, walk.value)
    call = getattr(type(x), node.target) if node.op == "call_method" else node.target
    return torch.equal(call(x.clone(), *args, **kwargs), layer(x.clone()))

"""What torch may round: a certificate speaks of float32, and a GPU rounds convolutions to three digits by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["full_precision"]


@contextmanager
def full_precision() -> Iterator[None]:
    """Within it no product of float32 numbers is rounded further: no TF32, no bfloat16, no autocast.

    >>> with full_precision():
    ...     torch.backends.cudnn.conv.fp32_precision
    'ieee'
    """
    cuda, cpu = torch.backends.cudnn.conv, torch.backends.mkldnn.conv
    switches = [cuda, cpu, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [switch.fp32_precision for switch in switches]
    with ExitStack() as stack:
        for device in ("cuda", "cpu"):
            stack.enter_context(torch.autocast(device, enabled=False))
        for switch, precision in zip(switches, before, strict=True):
            stack.callback(setattr, switch, "fp32_precision", precision)
            switch.fp32_precision = "ieee"
        yield

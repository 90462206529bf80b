"""Which of torch's attention kernels the ViT runs, by a table for each device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from monkey_kernels.tuning import launch_parameters

#: Names in a device's file. ``"torch"`` leaves the choice to torch.
BACKENDS = {
    "torch": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class SelfAttention:
    """An entry ``self_attention`` of ``configs/<device>.json``."""

    # Nothing has been timed: torch knows the device, and files are for what has been.
    backend: str = field(default="torch", metadata={"choices": tuple(BACKENDS)})


DEFAULT = SelfAttention()


def candidates() -> Iterator[SelfAttention]:
    """What a tuner tries, by ``tuning.trying("self_attention", candidate)``."""
    return map(SelfAttention, BACKENDS)


def self_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` by ``F.scaled_dot_product_attention``, and the device's table.

    The table is for what a ViT runs on a GPU: half precision and a head width that is a multiple of
    8. Elsewhere, and in compiled graphs, torch chooses.

    Args:
        query, key, value: [crops, heads, N, d], any strides with d contiguous: read in place.

    Returns:
        [crops, heads, N, d].

    Raises:
        ValueError: the device's file is wrong.
        RuntimeError: the backend that the file names cannot run here.
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and query.shape[-1] % 8 == 0 and not torch.compiler.is_compiling():
        chosen = BACKENDS[launch_parameters("self_attention", DEFAULT, query.device).backend]
        if chosen is not None:
            with sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)

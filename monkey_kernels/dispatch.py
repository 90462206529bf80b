"""Call an op past torch's dispatcher, where the dispatcher would only call it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_plain_call(*tensors: Tensor) -> bool:
    """Whether torch's dispatcher would do nothing for a call on ``tensors`` but make it.

    The way through a ``torch.library.custom_op`` costs about 40 us of Python, as much as the op's
    own work on the host. It is needed for gradients, meta tensors, compiled graphs, modes (fake
    tensors, FLOP counters), subclasses, functorch's transforms and profilers.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
    ):
        return False
    trains = torch.is_grad_enabled()
    return all(
        type(x) in _PLAIN and not x.is_meta and not (trains and x.requires_grad) for x in tensors
    )

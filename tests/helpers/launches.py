"""What a piece of inference launches on a GPU, counted without one: kernels, and bytes they move.

The operations run on fake CUDA tensors, which have shapes and no values. The rule:

* An operation of aten or of ``monkey_kernels`` is one launch. Views and allocations are none.
* ``F.scaled_dot_product_attention`` is one: flash attention and cuDNN's are.
* ``native_layer_norm`` of rows that do not follow each other is two: CUDA's copies them first.
* A launch reads its tensor arguments once and writes its results once. Caches are not counted: a
  product that reads its weights again for each tile counts them once.
* A copy between host and device, and what hands a value to Python, waits: it is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from monkey_model.encoder import parameter_cache, vit

GPU = torch.device("cuda", 0)
#: Operations that hand values to Python, or take their shape from them.
WAITING = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "unique")
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
VIEWS = ("_unsafe_view", "_reshape_alias", "detach", "device", "lift_fresh")


@torch.library.custom_op("counted::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise NotImplementedError("it is only counted")


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Flash attention's layout, [batch, N, heads, d].
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )


@dataclass
class Launches:
    """Name and bytes of each launch, in order."""

    made: list[tuple[str, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.made)

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.made)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.made]


def _size(x: Tensor) -> int:
    """Bytes of the values of ``x``: those that an expanded tensor repeats count once."""
    shape = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or size == 0]
    return x.element_size() * torch.Size(shape).numel()


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches = Launches()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in WAITING:
            raise AssertionError(f"{func} waits for its tensor")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if len({x.device for x in [*inputs, *outputs] if x.dim()}) > 1:
            raise AssertionError(f"{func} copies between host and device")
        if func.is_view or name in VIEWS or name in ALLOCATIONS:
            return out
        if name == "native_layer_norm" and not inputs[0].is_contiguous():
            self.launches.made.append(("copy", 2 * _size(inputs[0])))
        moved = sum(map(_size, inputs)) + sum(map(_size, outputs))
        self.launches.made.append((name, moved))
        return out


@contextlib.contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors made inside may lie on a GPU that does not exist; caches keep their values."""
    with monkeypatch.context() as patch, FakeTensorMode():
        patch.setattr(parameter_cache.ParameterCache, "can_watch", staticmethod(lambda _: True))
        patch.setattr(parameter_cache, "_state", id)
        patch.setattr(F, "scaled_dot_product_attention", _attention)
        # There is no table for a device that does not exist.
        patch.setattr(vit, "self_attention", _attention)
        # Its binding asks CUDA for the device.
        patch.setattr(Tensor, "contiguous", _contiguous)
        yield


def _contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def on_fake_gpu(module: nn.Module) -> nn.Module:
    """``module``, of any device, with its parameters on the fake one."""
    return module._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=GPU))


def count_launches(call: Callable[[], Any]) -> Launches:
    """Of ``call``, in inference; it runs once before, which fills caches."""
    with torch.no_grad():
        call()
        with _Counter() as counter:
            call()
    return counter.launches

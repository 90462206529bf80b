"""Values computed from parameters alone, kept until a parameter changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

Value = TypeVar("Value")


class ParameterCache(Generic[Value]):
    """One value that :meth:`get` builds again when a parameter has changed, moved or been cast.

    A change is seen by a parameter's address, version count, dtype and device. One through
    ``parameter.data`` leaves no trace, and a fused optimizer leaves none either: :meth:`drop` after
    them. A parameter made under ``torch.inference_mode()`` counts no versions: outside that mode
    torch refuses to change it in place, inside a change leaves no trace either. The value is
    neither copied nor pickled.
    """

    def __init__(self) -> None:
        self._held: tuple[tuple[Any, ...], Value] | None = None

    @staticmethod
    def can_watch(parameters: Sequence[Tensor]) -> bool:
        """Whether changes can be seen: not of tensors without memory."""
        return not any(p.is_meta or isinstance(p, FakeTensor) for p in parameters)

    def get(self, parameters: Sequence[Tensor], extra: Any, build: Callable[[], Value]) -> Value:
        """``build()``, or what it gave for the same parameters and ``extra``."""
        if not self.can_watch(parameters):
            return build()
        key = (extra, *map(_state, parameters))
        held = self._held  # read once: another thread may drop it meanwhile
        if held is None or held[0] != key:
            # Plain tensors, whichever mode the caller is in: autograd and compiled graphs take no
            # inference tensors. A view of a parameter stays what that is.
            with torch.inference_mode(False), torch.no_grad():
                held = self._held = (key, build())
        return held[1]

    def held(self, extra: Any) -> Value | None:
        """What was built last for ``extra``, whether or not parameters have changed since."""
        held = self._held
        return held[1] if held is not None and held[0][0] == extra else None

    def drop(self) -> None:
        """Forget the value."""
        self._held = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": None}


def held_values(module: nn.Module) -> list[Any]:
    """What the caches of ``module`` and of its parts hold: kept alive by whoever keeps the list."""
    attributes = (value for part in module.modules() for value in vars(part).values())
    return [cache._held for cache in attributes if isinstance(cache, ParameterCache)]


def _state(parameter: Tensor) -> tuple[Any, ...]:
    version = None if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, parameter.dtype, parameter.device

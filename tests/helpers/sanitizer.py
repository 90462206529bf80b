"""tilelens' symbolic sanitizer, as Triton's interpreter calls it since 3.9."""

from __future__ import annotations

from typing import Any

from tilelens.clients.sanitizer.sanitizer import SymbolicSanitizer


class Sanitizer(SymbolicSanitizer):
    """tilelens 3.1 expects the argument lists of unmasked accesses that came before 3.9."""

    def _op_raw_load_overrider(self, ptr: Any, *_: Any) -> Any:
        return self._op_load_overrider(ptr, None, None)

    def _op_raw_store_overrider(self, ptr: Any, value: Any, *_: Any) -> Any:
        return self._op_store_overrider(ptr, value, None)

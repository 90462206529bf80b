"""Settings that must precede every import of a kernel."""

from __future__ import annotations

import os

import pytest
import torch

# Triton reads this when a kernel is decorated. Without a GPU, kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))

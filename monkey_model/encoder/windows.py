"""Upstream's way to cut a canvas into windows, for code that imports it; nothing here uses it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sliding_window(matrix: Tensor, window_size: tuple[int, int], stride: int) -> list[list[Tensor]]:
    """Cut [B, C, H, W] into windows, as views: ``windows[row][column]`` is [B, C, *window_size]."""
    height, width = matrix.shape[2:]
    return [
        [
            matrix[:, :, top : top + window_size[0], left : left + window_size[1]]
            for left in range(0, width - window_size[1] + 1, stride)
        ]
        for top in range(0, height - window_size[0] + 1, stride)
    ]


def reconstruct_matrix(windows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Put the windows of :func:`sliding_window` (stride = window size) together again."""
    return torch.cat([torch.cat(list(row), dim=3) for row in windows], dim=2)

"""Position tables of the ViT and the resampler."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from monkey_model.encoder.parameter_cache import ParameterCache


def get_abs_pos(abs_pos: Tensor, tgt_size: int) -> Tensor:
    """A square position table resized (bicubic) to another square.

    Args:
        abs_pos: [L, C], L a square number.
        tgt_size: number of positions wanted, a square number.

    Returns:
        [tgt_size, C] in the dtype of ``abs_pos``; the table itself where the sizes agree.

    Raises:
        ValueError: L or tgt_size is not a square number.
    """
    source, target = math.isqrt(abs_pos.shape[0]), math.isqrt(tgt_size)
    for name, side, size in (
        ("abs_pos", source, abs_pos.shape[0]),
        ("tgt_size", target, tgt_size),
    ):
        if side * side != size:
            raise ValueError(f"{name} must have a square number of positions; got {size}")
    if source == target:
        return abs_pos
    wide = torch.promote_types(abs_pos.dtype, torch.float32)
    table = abs_pos.to(wide).view(1, source, source, -1).permute(0, 3, 1, 2)
    table = F.interpolate(table, (target, target), mode="bicubic", align_corners=False)
    return table.permute(0, 2, 3, 1).flatten(0, 2).to(abs_pos.dtype)


def get_2d_sincos_pos_embed(
    embed_dim: int, grid_size: int, cls_token: bool = False
) -> npt.NDArray[np.float32]:
    """Fixed 2-D sine-cosine positions, the column's half of the channels before the row's.

    Args:
        embed_dim: channels, a multiple of 4.
        grid_size: rows and columns of the square grid.
        cls_token: whether a row of zeros for a class token comes first.

    Returns:
        [grid_size**2 (+ 1), embed_dim], a numpy array as upstream's.

    Raises:
        ValueError: embed_dim is not a positive multiple of 4.

    Source: He et al., Masked Autoencoders (2021).
    """
    if embed_dim < 4 or embed_dim % 4:
        raise ValueError(f"embed_dim must be a positive multiple of 4; got {embed_dim}")
    exponent = np.arange(embed_dim // 4, dtype=np.float32) / np.float32(embed_dim / 4)
    omega = np.float32(1) / np.float32(10000) ** exponent
    angle = np.arange(grid_size, dtype=np.float32)[:, None] * omega
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    column, row = np.tile(axis, (grid_size, 1)), np.repeat(axis, grid_size, axis=0)
    table = np.concatenate([column, row], axis=1)
    return np.concatenate([np.zeros_like(table[:1]), table]) if cls_token else table


def resized_positions(cache: ParameterCache[Tensor], table: Tensor, tokens: int) -> Tensor:
    """:func:`get_abs_pos`, resized once as long as no gradient is wanted."""
    if torch.compiler.is_compiling():
        return get_abs_pos(table, tokens)
    if table.requires_grad and torch.is_grad_enabled():
        cache.drop()
        return get_abs_pos(table, tokens)
    return cache.get([table], tokens, lambda: get_abs_pos(table.detach(), tokens))

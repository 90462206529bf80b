"""Upstream's algorithm, written out plainly, on the weights of our modules.

Five sequential passes in [N, crops, E] layout, an equality check of query and key in every block,
bmm, softmax, bmm, and queries repeated for every crop. tests/model/test_visual.py holds it against
the outputs of the stock code, so that what we compare with is what users run.

Source: upstream ``monkey_model/visual.py``.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from monkey_kernels import CLIP_MEAN, CLIP_STD
from monkey_model.resampler import get_abs_pos
from monkey_model.visual import VisionTransformer, VisualAttentionBlock, sliding_window


def upstream_crops(image: Image.Image, interpolation: str = "bicubic") -> Tensor:
    """One decoded image to [5, 3, 448, 448]: Pillow, to tensor, normalise, cut, interpolate."""
    resized = image.convert("RGB").resize((896, 896), Image.Resampling[interpolation.upper()])
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
    canvas = pixels.to(torch.float32).div(255)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    canvas = canvas.sub_(mean).div_(std).unsqueeze(0)
    windows = sliding_window(canvas, (448, 448), 448)
    small = F.interpolate(canvas, size=(448, 448), mode=interpolation)
    return torch.cat([window for row in windows for window in row] + [small])


def torch_crops(image: Tensor, interpolation: str, dtype: torch.dtype) -> Tensor:
    """The strongest torch form that runs on any device: [H, W, 3] uint8 to [5, 3, 448, 448].

    Float all the way: torch's antialiased filter takes no uint8 on a GPU.
    """
    x = image.permute(2, 0, 1).unsqueeze(0).float()
    canvas = F.interpolate(x, (896, 896), mode=interpolation, antialias=True)
    canvas = canvas.round().clamp(0, 255) / 255
    mean, std = (torch.tensor(c, device=x.device).view(3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    canvas = (canvas - mean) / std
    windows = [w for row in sliding_window(canvas, (448, 448), 448) for w in row]
    small = F.interpolate(canvas, size=(448, 448), mode=interpolation)
    return torch.cat([*windows, small]).to(dtype)


def _attention(attn: Any, x: Tensor, idx: int | None) -> Tensor:
    assert torch.equal(x, x)  # upstream compares query with key: a device synchronisation
    tokens, batch, width = x.shape
    heads, head_width = attn.num_heads, width // attn.num_heads
    mixed = attn.in_proj(x)
    if idx is not None:
        mixed += attn.in_proj_lora[idx](x)
    mixed = mixed.view(tokens, batch, heads, 3 * head_width)
    q, k, v = (
        part.reshape(tokens, batch * heads, head_width).transpose(0, 1)
        for part in mixed.split(head_width, dim=-1)
    )
    probabilities = torch.bmm(q / head_width**0.5, k.transpose(-2, -1)).softmax(dim=-1)
    context = torch.bmm(probabilities, v).view(batch, heads, tokens, head_width)
    context = context.permute(2, 0, 1, 3).contiguous().view(tokens, batch, width)
    out = attn.out_proj(context)
    if idx is not None:
        out += attn.out_proj_lora[idx](context)
    return out


def upstream_block(block: VisualAttentionBlock, x: Tensor, idx: int | None) -> Tensor:
    """One block on [N, crops, E]."""
    x = x + _attention(block.attn, block.ln_1(x), idx)
    residual = x
    x = x + block.mlp(block.ln_2(x))
    if idx is not None:
        x = x + block.mlp_lora[idx](residual)
    return x


def upstream_resampler(pool: Any, x: Tensor) -> Tensor:
    """[crops, N, kv_dim] to [crops, Nq, E], through ``nn.MultiheadAttention``."""
    positions = get_abs_pos(pool.pos_embed, x.shape[1])
    x = pool.ln_kv(pool.kv_proj(x)).permute(1, 0, 2)
    query = pool.ln_q(pool.query).unsqueeze(1).repeat(1, x.shape[1], 1)
    out = pool.attn(query + pool.pos_embed.unsqueeze(1), x + positions.unsqueeze(1), x)[0]
    return out.permute(1, 0, 2)


def upstream_vit(encoder: VisionTransformer, x: Tensor, idx: int | None) -> Tensor:
    """Crops [N, 3, 448, 448] of one adapter to patch tokens [N, 1024, width]."""
    x = encoder.conv1(x).flatten(2).permute(0, 2, 1)
    x = encoder.ln_pre(x + get_abs_pos(encoder.positional_embedding, x.shape[1]))
    x = x.permute(1, 0, 2)
    for block in encoder.transformer.resblocks:
        x = upstream_block(cast(VisualAttentionBlock, block), x, idx)
    return x.permute(1, 0, 2)


def upstream_tokens(encoder: VisionTransformer, crops: Tensor) -> Tensor:
    """Crops [B * 5, 3, 448, 448] to [B, 1280, output_dim]: a pass for each crop position."""
    tokens = []
    for position, adapter in enumerate(encoder.adapter_index()):
        x = upstream_vit(encoder, crops[position :: encoder.crops_per_image], adapter)
        x = upstream_resampler(encoder.attn_pool, x)
        tokens.append(encoder.ln_post(x) @ encoder.proj)
    return torch.cat(tokens, dim=1)

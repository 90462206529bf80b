"""The shapes that are measured, defined once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from monkey_model.visual import TransformerBlock, VisionTransformer

#: (height, width) of a decoded photo.
PHOTO_SIZES = {"640x480": (480, 640), "1600x1200": (1200, 1600), "4000x3000": (3000, 4000)}

#: Monkey's encoder as published, but for the number of layers.
REAL_CONFIG: dict[str, Any] = {
    "image_size": 896,
    "patch_size": 14,
    "width": 1664,
    "heads": 16,
    "mlp_ratio": 4.9231,
    "n_queries": 256,
    "output_dim": 4096,
}


def photo(height: int, width: int) -> Tensor:
    """A decoded photo [H, W, 3] uint8: smooth shades and fine noise, so that no level is rare."""
    generator = torch.Generator().manual_seed(0)
    y = torch.linspace(0, 9, height)[:, None, None]
    x = torch.linspace(0, 7, width)[None, :, None]
    channel = torch.arange(3)[None, None, :]
    shade = 128 + 90 * torch.sin(x + y + channel)
    noise = torch.randint(-30, 31, (height, width, 3), generator=generator)
    return (shade + noise).clamp(0, 255).to(torch.uint8)


def real_encoder(layers: int = 2, dtype: torch.dtype = torch.float32) -> VisionTransformer:
    """The encoder at real width, seeded, with adapters that are no no-ops."""
    torch.manual_seed(0)
    encoder = VisionTransformer(**REAL_CONFIG, layers=layers, interpolation="bicubic")
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_b" in name:
                parameter.normal_(std=0.02)
    return encoder.to(dtype).eval()


def real_blocks(
    layers: int, dtype: torch.dtype = torch.float32, adapters: int = 4
) -> TransformerBlock:
    """The ViT's blocks at real width, seeded."""
    torch.manual_seed(0)
    norm_layer = partial(nn.LayerNorm, eps=1e-6)
    width, heads, ratio = (REAL_CONFIG[key] for key in ("width", "heads", "mlp_ratio"))
    return TransformerBlock(
        width, layers, heads, ratio, norm_layer=norm_layer, lora_repeat_num=adapters
    ).to(dtype)

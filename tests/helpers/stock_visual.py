"""An encoder in upstream's layout, for which torch, numpy and Pillow are enough.

The arithmetic is that of ``benchmarks/baselines.py``, which is held against upstream's outputs.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import nn

from benchmarks import baselines
from monkey_model.visual import VisionTransformer as OurVisionTransformer


class VisionTransformer(nn.Module):
    """Upstream's encoder: one crop position after the other, images by their paths."""

    def __init__(
        self,
        image_size,
        patch_size,
        width,
        layers,
        heads,
        mlp_ratio,
        n_queries,
        output_dim,
        lora_repeat_num=4,
        **kwargs,
    ):
        super().__init__()
        ours = OurVisionTransformer(
            image_size,
            patch_size,
            width,
            layers,
            heads,
            mlp_ratio,
            n_queries,
            output_dim,
            lora_repeat_num,
        )
        self.image_size = (image_size, image_size)
        self.patch_size = (patch_size, patch_size)
        self.output_dim = output_dim
        for name, module in ours.named_children():
            setattr(self, name, module)
        self.positional_embedding, self.proj = ours.positional_embedding, ours.proj

    def encode(self, image_paths):
        crops = [baselines.upstream_crops(Image.open(path)) for path in image_paths]
        crops = torch.stack(crops)  # [B, 5, 3, 448, 448]
        return [[crops[:, 0], crops[:, 1]], [crops[:, 2], crops[:, 3]]], crops[:, 4]

    def forward(self, x, idx=None):
        x = x.to(self.conv1.weight.device, self.conv1.weight.dtype)
        x = baselines.upstream_resampler(self.attn_pool, baselines.upstream_vit(self, x, idx))
        return self.ln_post(x) @ self.proj

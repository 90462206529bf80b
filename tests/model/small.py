"""A tiny encoder for tests."""

from __future__ import annotations

import torch

from monkey_model.visual import VisionTransformer

SMALL = {
    "image_size": 56,
    "patch_size": 14,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "mlp_ratio": 2.0,
    "n_queries": 4,
    "output_dim": 128,
    "crop_size": 28,
}


def small_encoder(seed: int = 0, **settings) -> VisionTransformer:
    """In eval mode; no adapter of it is a no-op."""
    torch.manual_seed(seed)
    encoder = VisionTransformer(**{**SMALL, **settings}).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_b" in name or "lora_scale" in name:
                parameter.normal_()
    return encoder

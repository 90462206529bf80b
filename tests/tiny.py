"""A tiny seeded Monkey model of this project, in which no adapter is a no-op."""

from __future__ import annotations

import torch
from torch import Tensor

from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.modeling_monkey import MonkeyLMHeadModel

VISUAL = {
    "image_size": 56,
    "patch_size": 14,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "mlp_ratio": 2.0,
    "n_queries": 4,
    "output_dim": 128,
    "crop_size": 28,
    "image_start_id": 300,
}
SPAN = 5 * VISUAL["n_queries"]
IMAGE = [300, *[302] * SPAN, 301]


def tiny_config(blocks: int = 3, **settings) -> MonkeyConfig:
    visual = {**VISUAL, **settings.pop("visual", {})}
    return MonkeyConfig(
        vocab_size=320,
        hidden_size=128,
        num_attention_heads=2,
        kv_channels=64,
        intermediate_size=128,
        num_hidden_layers=blocks,
        visual=visual,
        **settings,
    )


def tiny_model(blocks: int = 3, seed: int = 0, **settings) -> MonkeyLMHeadModel:
    torch.manual_seed(seed)
    model = MonkeyLMHeadModel(tiny_config(blocks, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name or "lora_scale" in name:
                parameter.normal_(std=0.5)
    return model


def tiny_batch(seed: int = 0) -> dict[str, Tensor]:
    """One prompt with a picture."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 256, (6,), generator=generator).tolist()
    input_ids = torch.tensor([[1, *IMAGE, *text]])
    pixel_values = torch.randn(1, 5, 3, 28, 28, generator=generator)
    return {"input_ids": input_ids, "pixel_values": pixel_values, "labels": input_ids.clone()}

"""An encoder and a whole model of a few thousand weights, and prompts for it.

The ids are those of ``tests.helpers.vocabulary``: what a tiny tokenizer writes, a tiny model reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.modeling_monkey import MonkeyLMHeadModel
from monkey_model.visual import VisionTransformer
from tests.helpers.vocabulary import SPECIAL_IDS

CROPS, QUERIES = 5, 4
SPAN = CROPS * QUERIES  # visual tokens per image
SIDE = 28
VOCAB = 640
IMG, END, PAD = (SPECIAL_IDS[token] for token in ("<img>", "</img>", "<imgpad>"))
END_OF_TEXT = SPECIAL_IDS["<|endoftext|>"]  # pads a batch, too

VISUAL = {
    "image_size": 2 * SIDE,
    "crop_size": SIDE,
    "patch_size": 14,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "mlp_ratio": 2.0,
    "n_queries": QUERIES,
    "output_dim": 128,
}


def tiny_encoder(seed: int = 0, **settings: Any) -> VisionTransformer:
    """In eval mode; no adapter of it is a no-op."""
    torch.manual_seed(seed)
    encoder = VisionTransformer(**{**VISUAL, **settings}).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_b" in name or "lora_scale" in name:
                parameter.normal_()
    return encoder


def tiny_config(**settings: Any) -> MonkeyConfig:
    visual = {**VISUAL, "image_start_id": IMG, **settings.pop("visual", {})}
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 32,
        "intermediate_size": 128,
        "seq_length": 2048,
        "pad_token_id": END_OF_TEXT,
        "visual": visual,
    }
    return MonkeyConfig(**{**defaults, **settings})


def tiny_model(seed: int = 0, **settings: Any) -> MonkeyLMHeadModel:
    """In eval mode; no weight of it is a no-op."""
    torch.manual_seed(seed)
    model = MonkeyLMHeadModel(tiny_config(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def span(path: str = "") -> list[int]:
    """``<img>``, the path's bytes, pads, ``</img>``."""
    data = list(path.encode())
    return [IMG, *data, *[PAD] * (SPAN - len(data)), END]


def pixels(images: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, CROPS, 3, SIDE, SIDE, generator=generator)


def left_pad(rows: list[list[int]], pad: int = END_OF_TEXT) -> dict[str, Tensor]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    }


def tiny_batch(seed: int = 0) -> dict[str, Tensor]:
    """A prompt with a picture, to train on."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 256, (6,), generator=generator).tolist()
    input_ids = torch.tensor([[1, *span(), *text]])
    return {"input_ids": input_ids, "pixel_values": pixels(1, seed), "labels": input_ids.clone()}

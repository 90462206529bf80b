"""The shapes that are measured, defined once."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from monkey_model.visual import TransformerBlock, VisionTransformer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

#: "tiny" proves that every benchmark runs; its figures mean nothing, and no run of it is kept.
SCALE = os.environ.get("MONKEY_BENCHMARK_SCALE", "real")
if SCALE not in ("real", "tiny"):
    raise ValueError(f"MONKEY_BENCHMARK_SCALE must be real or tiny; got {SCALE!r}")

#: (height, width) of a decoded photo.
PHOTO_SIZES = {"640x480": (480, 640), "1600x1200": (1200, 1600), "4000x3000": (3000, 4000)}
#: Photos of many sizes in one call.
RAGGED_SIZES = [(480 + 37 * i % 1000, 640 + 53 * i % 1400) for i in range(64)]
#: Different inputs that a GPU's rounds take in turn.
INPUTS = 3 if DEVICE.type == "cuda" else 1

#: Monkey's encoder as published, but for the number of layers.
PUBLISHED_CONFIG: dict[str, Any] = {
    "image_size": 896,
    "patch_size": 14,
    "width": 1664,
    "heads": 16,
    "mlp_ratio": 4.9231,
    "n_queries": 256,
    "output_dim": 4096,
}
#: What is measured: that, unless the scale is tiny.
REAL_CONFIG = dict(PUBLISHED_CONFIG)
#: Blocks of the published model's ViT.
PUBLISHED_LAYERS = 48
LAYERS = PUBLISHED_LAYERS if DEVICE.type == "cuda" else 2
DTYPES = ["bfloat16"] if DEVICE.type == "cuda" else ["float32", "bfloat16"]
if DEVICE.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
    DTYPES = ["float32"]  # bfloat16 is emulated there, many times slower
#: Without AMX a CPU's bfloat16 is the slower one. What is measured in one dtype is in the faster.
FASTEST = DTYPES[-1 if torch.cpu._is_amx_tile_supported() else 0]

if SCALE == "tiny":
    PHOTO_SIZES = {name: (h // 8, w // 8) for name, (h, w) in PHOTO_SIZES.items()}
    RAGGED_SIZES = [(h // 8, w // 8) for h, w in RAGGED_SIZES[:3]]
    REAL_CONFIG |= {"width": 104, "heads": 2, "output_dim": 256}
    LAYERS = 2

#: Patch tokens of a crop, and crops of an image.
TOKENS, CROPS = 1024, 5
WIDTH, OUT_WIDTH, QUERIES = (REAL_CONFIG[k] for k in ("width", "output_dim", "n_queries"))
MLP_WIDTH = int(WIDTH * REAL_CONFIG["mlp_ratio"])

#: Arithmetic of one crop, adapters apart: a block's products and its attention, and the folded
#: resampler with ``proj``, the least that is known to do it.
BLOCK_FLOP = 2 * TOKENS * WIDTH * (4 * WIDTH + 2 * MLP_WIDTH) + 4 * TOKENS**2 * WIDTH
RESAMPLER_FLOP = (
    2 * TOKENS * WIDTH * (2 * OUT_WIDTH + WIDTH // 2)
    + 4 * QUERIES * TOKENS * OUT_WIDTH
    + 4 * QUERIES * OUT_WIDTH**2
)


def photo(height: int, width: int, seed: int = 0) -> Tensor:
    """A decoded photo [H, W, 3] uint8: smooth shades and fine noise, so that no level is rare."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.linspace(0, 9, height)[:, None, None]
    x = torch.linspace(0, 7, width)[None, :, None]
    channel = torch.arange(3)[None, None, :]
    shade = 128 + 90 * torch.sin(x + y + channel)
    noise = torch.randint(-30, 31, (height, width, 3), generator=generator)
    return (shade + noise).clamp(0, 255).to(torch.uint8)


def random_crops(images: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normalised crops [images * 5, 3, 448, 448]."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shape = (images * CROPS, 3, 448, 448)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def real_encoder(layers: int = LAYERS, dtype: torch.dtype = torch.float32) -> VisionTransformer:
    """The encoder at real width, seeded, with adapters that are no no-ops; in eval mode."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        encoder = VisionTransformer(**REAL_CONFIG, layers=layers)
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                if "lora_b" in name:
                    parameter.normal_(std=0.02)
    return encoder.to(DEVICE, dtype).eval()


def train_adapters_and_resampler(encoder: VisionTransformer) -> list[nn.Parameter]:
    """Upstream's fine-tuning recipe, in training mode; returns what trains."""
    for name, parameter in encoder.train().named_parameters():
        trained = "lora" in name or name.startswith("attn_pool.")
        parameter.requires_grad_(trained and not name.endswith("pos_embed"))
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]


def parameter_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


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
